"""Reading ``model.bin`` of CTranslate2 (binary versions 4 to 6): named arrays, and other names for some of them.

The file is untrusted: no size in it is believed before it is compared with what is left of the file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trtpass.errors import InputError

_VERSIONS = (4, 5, 6)
_KINDS = {0: "float32", 1: "int8", 2: "int16", 3: "int32", 4: "float16"}  # 5 is bfloat16, which numpy has not
_MOST_RANK = 8


@dataclass(frozen=True)
class Archive:
    """What the file holds: the name of the architecture, its revision, and the arrays by all their names."""

    spec: str
    revision: int
    variables: dict[str, np.ndarray]


def read(file: Path) -> Archive:
    """Read the file; the arrays are views of its bytes.

    Raises:
        InputError: the file is truncated, of another version, or not such a file.
    """
    try:
        reader = _Reader(file.read_bytes(), file)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}", "a model.bin of CTranslate2") from error
    version = reader.number(4)
    if version not in _VERSIONS:
        raise InputError(f"{file} has version {version}", f"a model.bin of CTranslate2, version {_VERSIONS}")
    spec, revision = reader.text(), reader.number(4)
    variables: dict[str, np.ndarray] = {}
    for _ in range(reader.number(4)):  # a wrong count ends at the end of the file
        name = reader.text()
        variables[name] = reader.array(name)
    aliases = {reader.text(): reader.text() for _ in range(reader.number(4))}
    for alias, name in aliases.items():
        if name not in variables:
            raise InputError(f"{file}: '{alias[:60]}' stands for '{name[:60]}', which is not there", "a variable")
        variables[alias] = variables[name]
    if reader.at != len(reader.data):
        raise InputError(f"{file} has {len(reader.data) - reader.at} bytes behind its end", "none")
    return Archive(spec, revision, variables)


class _Reader:
    """A cursor that never passes the end."""

    def __init__(self, data: bytes, file: Path) -> None:
        self.data, self.file, self.at = data, file, 0

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.at:
            raise InputError(
                f"{self.file} ends within something of {count} bytes at byte {self.at}", "a complete model.bin",
                "copy or install it again",
            )  # fmt: skip
        self.at += count
        return memoryview(self.data)[self.at - count : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def text(self) -> str:
        """A length of two bytes that counts the closing zero, then the bytes."""
        raw = bytes(self.take(self.number(2)))
        try:
            return raw.removesuffix(b"\0").decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{self.file} has a name that is no text at byte {self.at}", "UTF-8") from error

    def array(self, name: str) -> np.ndarray:
        rank = self.number(1)
        if rank > _MOST_RANK:
            raise InputError(f"{self.file}: '{name[:60]}' has {rank} axes", f"at most {_MOST_RANK}")
        shape = [self.number(4) for _ in range(rank)]
        kind, size = self.number(1), self.number(4)
        if kind not in _KINDS:
            raise InputError(f"{self.file}: '{name[:60]}' has type {kind}", f"one of {sorted(_KINDS)}")
        dtype = np.dtype(_KINDS[kind])
        if size != math.prod(shape) * dtype.itemsize:
            raise InputError(f"{self.file}: '{name[:60]}' has {size} bytes", f"{dtype} of shape {shape}")
        return np.frombuffer(self.take(size), dtype.newbyteorder("<")).reshape(shape)

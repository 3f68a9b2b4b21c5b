"""Native CPU kernels: one ONNX Runtime custom-op library, built on the machine that uses it, or the reason why not.

The library is looked for in one place, ``plugins/_native/lib``, and never in a model's folder: a model is data.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import plugins
from plugins import all_ops
from trtpass.errors import InputError
from trtpass.op import DOMAIN, Op

if TYPE_CHECKING:
    from collections.abc import Mapping

SOURCES = Path(plugins.__file__).parent / "_native"
LIBRARY = SOURCES / "lib" / "libtrtpass.so"
ABOUT = SOURCES / "lib" / "libtrtpass.json"
SWAPPED = f"{DOMAIN}.bshd"  # the domain of the same operators on tensors that lie as [B, S, H, D]
BUILD = "make native (it needs a C++ compiler and ONNX Runtime's C headers; HEADERS=folder for your own)"


@dataclass(frozen=True)
class Library:
    """A library that was built from the sources that are here.

    Attributes:
        path: the file to register with ONNX Runtime.
        operators: ONNX names of the operators that it has.
        isas: instruction sets that it was compiled for, best first.
        compiler: what built it.
    """

    path: Path
    operators: tuple[str, ...]
    isas: tuple[str, ...]
    compiler: str


def operators() -> dict[str, Op]:
    """Operators that have a ``kernel.cc``, by ONNX name."""
    return {name: op for name, op in all_ops().items() if (SOURCES.parent / op.folder / "kernel.cc").is_file()}


def sources() -> list[Path]:
    """Everything that the library is compiled from, apart from what is generated."""
    shared = [file for file in sorted(SOURCES.iterdir()) if file.suffix in (".h", ".cc")]
    return shared + [SOURCES.parent / op.folder / "kernel.cc" for op in operators().values()]


def fingerprint() -> str:
    """Of all sources and of the declarations that the library was generated from."""
    from trtpass.native_build import registry

    digest = hashlib.sha256(registry(("any",)).encode())
    for file in sources():
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@cache
def find() -> Library | str:
    """The library, or the reason in words why there is none."""
    if not operators():
        return "there are no native kernels in this installation"
    if not LIBRARY.is_file() or not ABOUT.is_file():
        return f"the library of native kernels has not been built: {BUILD}"
    try:
        about = json.loads(ABOUT.read_text())
        library = Library(LIBRARY, tuple(about["operators"]), tuple(about["isas"]), about["compiler"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        return f"{ABOUT} is not readable ({error}): {BUILD}"
    if about.get("fingerprint") != fingerprint():
        return f"the library of native kernels was built from other sources: {BUILD}"
    try:
        loaded = _loaded()
    except OSError as error:
        return f"the library of native kernels does not load ({error}): {BUILD}"
    if loaded.trtpass_fingerprint().decode() != about["fingerprint"]:
        return f"the library of native kernels is not the one that {ABOUT.name} describes: {BUILD}"
    return library


@cache
def _loaded() -> Any:
    library = ctypes.CDLL(str(LIBRARY))
    library.trtpass_fingerprint.restype = ctypes.c_char_p
    library.trtpass_isa.restype = ctypes.c_char_p
    library.trtpass_force_isa.argtypes = [ctypes.c_char_p]
    return library


def register(options: Any) -> bool:
    """Register the library, where there is one, with ONNX Runtime's session options: nodes without it run as bodies."""
    library = find()
    if isinstance(library, str):
        return False
    options.register_custom_ops_library(str(library.path))
    return True


def isa() -> str:
    """The instruction set that the kernels use on this machine.

    Raises:
        InputError: there is no library.
    """
    need()
    return str(_loaded().trtpass_isa().decode())


def force_isa(name: str | None) -> None:
    """Use another instruction set in this process, for tests and comparisons; None chooses the best again.

    Raises:
        InputError: there is no library, or this machine or the library does not have that instruction set.
    """
    library = need()
    if not _loaded().trtpass_force_isa(None if name is None else name.encode()):
        raise InputError(f"instruction set '{name}'", f"one of {', '.join(library.isas)} that this machine has")


def need() -> Library:
    """The library.

    Raises:
        InputError: there is none.
    """
    library = find()
    if isinstance(library, str):
        raise InputError(why(library), "the library of native kernels", BUILD)
    return library


def why(reason: str) -> str:
    """A reason of ``find`` without what to do about it, for where that is said beside it."""
    return reason.removesuffix(f": {BUILD}")


def fits(op: Op, dtypes: Mapping[str, str | None]) -> bool | str:
    """Whether a native kernel can take the place of a node, or the reason in words why not.

    There is no way back inside ONNX Runtime: a node whose types its kernel does not have is an error when it loads.

    Args:
        op: the operator of the node.
        dtypes: dtype of each input by port name, None where it is not known.
    """
    library = find()
    if isinstance(library, str):
        return library
    if op.name not in library.operators:
        return "no native kernel for this operator"
    for port in op.inputs:
        if dtypes.get(port.name) not in port.dtypes:
            return f"its {port.name} is {dtypes.get(port.name) or 'of unknown type'}, not {' or '.join(port.dtypes)}"
    floating = {dtypes[port.name] for port in op.inputs if port.floating}
    if len(floating) > 1:
        return f"its inputs mix {' and '.join(sorted(str(d) for d in floating))}"
    return True

"""The values of an untrusted model: types, shapes, tensors, external data. See ``trtpass.untrusted``."""

from __future__ import annotations

import os
import stat
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NoReturn

import onnx
import onnx_ir as ir
from onnx import TensorProto

from trtpass.errors import InputError

MAX_RANK = 32  # numpy 1's limit
MAX_ELEMENTS = 1 << 48

_ELEMENT_TYPES = frozenset(TensorProto.DataType.values()) - {TensorProto.UNDEFINED}
_TYPED_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
_TYPED_FIELD = {
    "FLOAT": "float_data",
    "COMPLEX64": "float_data",
    "DOUBLE": "double_data",
    "COMPLEX128": "double_data",
    "INT64": "int64_data",
    "UINT32": "uint64_data",
    "UINT64": "uint64_data",
    "STRING": "string_data",
}  # every other type is stored in int32_data


def shown(name: object) -> str:
    """A name from the file as it may be printed: escaped, shortened."""
    text = repr(name)
    return text if len(text) <= 80 else text[:76] + "..." + text[-1]


class ValueChecker:
    """Checks types and tensors; every method returns or raises InputError.

    Args:
        file: the model's file; external data must lie in its folder.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.folder = os.path.realpath(file.parent)
        self.data_sizes: dict[str, int] = {}

    def fail(self, found: str, expected: str = "", fix: str = "") -> NoReturn:
        """Raise InputError about this file."""
        raise InputError(f"{self.file}: {found}", expected, fix or "export the model again, or repair the file")

    def value_type(self, value: onnx.ValueInfoProto, *, typed: bool = False, ranked: bool = False) -> None:
        """``typed``: must have a type; ``ranked``: and, if a tensor, a shape (whose sizes may be unknown)."""
        what = f"value {shown(value.name)}"
        if value.HasField("type") and value.type.WhichOneof("value") is not None:
            self.type(value.type, what)
        elif typed:
            self.fail(f"{what} has no type", "a type for every input and output of the graph")
        if ranked and value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape"):
            self.fail(f"{what} has no shape", "a shape for every input of the graph")

    def type(self, proto: onnx.TypeProto, what: str) -> None:
        kind = proto.WhichOneof("value")
        if kind == "sequence_type":
            self.type(proto.sequence_type.elem_type, what)
        elif kind == "optional_type":
            self.type(proto.optional_type.elem_type, what)
        elif kind != "tensor_type":
            self.fail(f"{what} is of type {kind}", "a tensor, sequence or optional")
        else:
            self.element_type(proto.tensor_type.elem_type, what)
            if len(proto.tensor_type.shape.dim) > MAX_RANK:
                self.fail(f"{what} has {len(proto.tensor_type.shape.dim)} dimensions", f"at most {MAX_RANK}")
            for dim in proto.tensor_type.shape.dim:
                if not 0 <= dim.dim_value <= MAX_ELEMENTS:
                    self.fail(f"{what} has a dimension of {dim.dim_value}", f"0 to {MAX_ELEMENTS}, or a name")

    def element_type(self, number: int, what: str) -> ir.DataType:
        if number not in _ELEMENT_TYPES:
            self.fail(f"{what} has element type {number}", "an element type of ONNX")
        return ir.DataType(number)

    def tensor(self, tensor: onnx.TensorProto, what: str) -> None:
        """The bytes present are those that dims and type ask for; external data lies inside the folder."""
        dtype = self.element_type(tensor.data_type, what)
        dims = list(tensor.dims)
        shape = f"{dtype.name} {dims[:8]}"
        if len(dims) > MAX_RANK or any(dim < 0 for dim in dims) or prod(max(dim, 1) for dim in dims) > MAX_ELEMENTS:
            self.fail(
                f"{what} has shape {shape}", f"at most {MAX_RANK} non-negative sizes, {MAX_ELEMENTS} elements in all"
            )
        if tensor.HasField("segment"):
            self.fail(f"{what} is stored in segments", "whole tensors")
        text = dtype == ir.DataType.STRING
        size = prod(dims)
        needed = 0 if text else (size * dtype.bitwidth + 7) // 8
        held = [name for name in _TYPED_FIELDS if len(getattr(tensor, name))]
        held += ["raw_data"] if tensor.HasField("raw_data") else []
        if tensor.data_location == TensorProto.EXTERNAL:
            if held or text:
                self.fail(f"{what} is external but also holds {', '.join(held) or 'text'}", "one place for its data")
            self.external(tensor, needed, what)
            return
        if len(held) > 1 or tensor.external_data:
            self.fail(f"{what} holds data in several places ({', '.join(held)})", "one place for its data")
        if held == ["raw_data"] and not text:
            if len(tensor.raw_data) != needed:
                self.fail(f"{what} holds {len(tensor.raw_data)} bytes", f"{needed} bytes for {shape}")
            return
        field = _TYPED_FIELD.get(dtype.name, "int32_data")
        count = (size * dtype.bitwidth + 7) // 8 if not text and dtype.bitwidth in (2, 4) else size
        count *= 2 if dtype.name.startswith("COMPLEX") else 1
        if held not in ([], [field]) or len(getattr(tensor, field)) != count:
            amount = ", ".join(f"{len(getattr(tensor, name))} entries in {name}" for name in held) or "no data"
            self.fail(f"{what} holds {amount}", f"{count} entries in {field} for {shape}")
        if not text and dtype.bitwidth == 6 and any(value & ~0x3F for value in tensor.int32_data):
            self.fail(f"{what} holds values of more than 6 bits", f"values of type {dtype.name}")

    # external data ------------------------------------------------------------------------------------------------

    def external(self, tensor: onnx.TensorProto, needed: int, what: str) -> None:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if len(entries) != len(tensor.external_data) or not entries.get("location"):
            self.fail(f"{what} is external but does not say where, or says it twice", "one location")
        numbers = {}
        for key in ("offset", "length"):
            text = entries.get(key, "0" if key == "offset" else str(needed))
            if not (text.isascii() and text.isdigit() and len(text) <= 19):
                self.fail(f"{what} has {key} {shown(text)}", "a number of bytes, 0 or more")
            numbers[key] = int(text)
        if numbers["length"] != needed:
            self.fail(f"{what} has {numbers['length']} external bytes", f"{needed} for {list(tensor.dims)[:8]}")
        location = entries["location"]
        if location not in self.data_sizes:
            self.data_sizes[location] = self.data_size(location, what)
        size, end = self.data_sizes[location], numbers["offset"] + needed
        if end > size:
            self.fail(
                f"{what} ends at byte {end} of {shown(location)}, which has {size} bytes",
                "a data file that holds every tensor",
                "the data file is truncated or belongs to another model: copy it again",
            )

    def data_size(self, location: str, what: str) -> int:
        """Size in bytes of a data file that is a regular file inside the model's folder."""
        pure = PurePosixPath(location)
        inside = "a data file inside the model's folder"
        if pure.is_absolute() or ".." in pure.parts or PureWindowsPath(location).anchor or "\0" in location:
            self.fail(f"{what} keeps its data in {shown(location)}", inside)
        path = os.path.realpath(f"{self.folder}/{location}")
        if os.path.commonpath([path, self.folder]) != self.folder:
            self.fail(
                f"{what} keeps its data in {shown(location)}, a link that leads out of the folder",
                inside,
                "copy the model with its data, following links (cp -rL)",
            )
        try:
            info = Path(path).stat()
        except OSError as error:
            self.fail(
                f"{what} keeps its data in {shown(location)}, which cannot be read ({error.strerror})",
                inside,
                "put the data file beside the model",
            )
        if not stat.S_ISREG(info.st_mode):
            self.fail(f"{what} keeps its data in {shown(location)}, which is not a file", inside)
        if info.st_nlink > 1:  # onnx-ir refuses to read these, later and less clearly
            self.fail(f"{what}: {shown(location)} has hard links elsewhere", inside, "copy the file (cp)")
        return info.st_size

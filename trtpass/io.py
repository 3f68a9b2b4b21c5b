"""Reading untrusted ONNX files, and writing models.

A model on disk is one protobuf (below 2 GiB) and at most one file of weights beside it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError, EncodeError  # type: ignore[import-untyped]

from trtpass.errors import InputError
from trtpass.staging import replacing, staged
from trtpass.untrusted import Checker

__all__ = ["load", "save", "save_shared", "staged", "strip_metadata", "tensors"]

MAX_PROTO = (1 << 31) - 1  # bytes: the limit of protobuf
INLINE = 1024  # bytes: smaller tensors stay in the protobuf
ALIGN = 4096  # bytes: a page, so that runtimes can map each tensor


def load(path: str | Path) -> ir.Model:
    """Read an untrusted ONNX file. External tensors stay on disk, memory-mapped when first used.

    Raises:
        InputError: whatever is wrong with the file; see ``trtpass.untrusted``.
    """
    file = Path(path)
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(_read(file))
    except DecodeError as error:
        raise InputError(
            f"{file} is not a protobuf, is truncated, or is nested too deeply",
            "an ONNX model",
            "export or copy the file again",
        ) from error
    Checker(proto, file).check()
    try:
        model = ir.serde.deserialize_model(proto)
    except Exception as error:  # any type: a fault that the checker does not know
        raise InputError(
            f"{file} cannot be read by onnx-ir ({type(error).__name__}: {str(error)[:200]})", "a valid ONNX model"
        ) from error
    for graph in _graphs(model):
        if "ai.onnx" in graph.opset_imports:
            graph.opset_imports[""] = graph.opset_imports.pop("ai.onnx")
        if isinstance(graph, ir.Graph):
            graph.name = graph.name or "graph"  # onnx's checker and ONNX Runtime disagree on whether it may be empty
        for node in graph:
            node.domain = "" if node.domain == "ai.onnx" else node.domain
    folder = file.parent.resolve()  # not empty: onnx-ir contains paths only below a base_dir
    for tensor in tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            tensor.base_dir = folder
    return model


def _read(file: Path) -> bytes:
    try:
        info = file.stat()
        if not stat.S_ISREG(info.st_mode):
            kind = "a directory" if stat.S_ISDIR(info.st_mode) else "not a regular file"
            raise InputError(f"{file} is {kind}", "an ONNX file", "give the path of the .onnx file itself")
        if info.st_size == 0:
            raise InputError(f"{file} is empty", "an ONNX file", "export or copy the file again")
        if info.st_size > MAX_PROTO:
            raise InputError(
                f"{file} has {info.st_size} bytes",
                f"at most {MAX_PROTO} bytes, the limit of protobuf",
                "save the model with external data",
            )
        with file.open("rb") as handle:
            return handle.read(info.st_size)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{file} cannot be read: {reason}", "an ONNX file", "check the path") from error


def _graphs(model: ir.Model) -> Iterator[ir.Graph | ir.Function]:
    """The main graph, the functions, and every subgraph of either, each once, in a stable order."""
    stack: list[ir.Graph | ir.Function] = [*reversed(model.functions.values()), model.graph]
    while stack:
        graph = stack.pop()
        yield graph
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.is_ref():
                    continue
                if attribute.type == ir.AttributeType.GRAPH:
                    stack.append(attribute.as_graph())
                elif attribute.type == ir.AttributeType.GRAPHS:
                    stack.extend(attribute.as_graphs())


def _initializers(model: ir.Model) -> list[ir.Value]:
    values = [value for graph in _graphs(model) if isinstance(graph, ir.Graph) for value in graph.initializers.values()]
    return [value for value in values if value.const_value is not None]


def _attr_tensors(model: ir.Model) -> Iterator[Any]:
    for graph in _graphs(model):
        for node in graph:
            for attribute in node.attributes.values():
                if not attribute.is_ref() and attribute.type == ir.AttributeType.TENSOR:
                    yield attribute.as_tensor()
                elif not attribute.is_ref() and attribute.type == ir.AttributeType.TENSORS:
                    yield from attribute.as_tensors()


def tensors(model: ir.Model) -> Iterator[Any]:
    """Every initializer and every tensor attribute, of subgraphs and functions too. Reads no weights."""
    for value in _initializers(model):
        yield value.const_value
    yield from _attr_tensors(model)


def strip_metadata(model: ir.Model) -> None:
    """Remove doc strings and metadata (exporters write stack traces with local paths there) in place.

    Metadata whose key starts with ``trtpass.`` stays.
    """
    for tensor in tensors(model):
        if isinstance(tensor, ir.serde.TensorProtoTensor):  # serialized from its protobuf as it is
            tensor.raw.ClearField("doc_string")
            tensor.raw.ClearField("metadata_props")
        else:
            tensor.doc_string = None
        tensor.metadata_props.clear()
    for owner in _documented(model):
        owner.doc_string = None
        for key in [key for key in owner.metadata_props if not key.startswith("trtpass.")]:
            del owner.metadata_props[key]


def _documented(model: ir.Model) -> Iterator[Any]:
    yield model
    for graph in _graphs(model):
        yield graph
        yield from graph.inputs
        if isinstance(graph, ir.Graph):
            yield from graph.initializers.values()
        for node in graph:
            yield node
            yield from node.outputs


@dataclass
class _Blob:
    """One stored tensor and where it begins in the file of weights, in bytes."""

    tensor: Any
    offset: int = 0


def save(model: ir.Model, path: str | Path, *, weights: str = "weights.bin") -> None:
    """Write a model and its weights; the same model gives the same bytes. The model itself is not changed.

    Initializers above 1 KiB go to ``weights`` beside the model, in the order of their names, each on a page of its own.
    Each file is written under a temporary name and renamed; to replace several files as one, use ``staged``.

    Raises:
        InputError: the disk is full or not writable, the protobuf would pass 2 GiB, or ``weights`` is a file that the
            model still reads its weights from.
    """
    target = Path(path)
    save_shared({target.name: model}, target.parent, weights=weights)


def save_shared(models: Mapping[str, ir.Model], folder: str | Path, *, weights: str = "weights.bin") -> None:
    """Write several models over one file of weights; see ``save``.

    Args:
        models: file name -> model. A tensor that several initializers share, and initializers of one name with equal
            type, shape and content, are stored once.
        folder: an existing folder.
    """
    folder = Path(folder)
    for name in (*models, weights):
        if Path(name).name != name or name in ("", ".", ".."):
            raise InputError(f"the output name {name!r}", "a file name without a folder")
    if weights in models:
        raise InputError(f"'{weights}' names a model and the weights", "two names")
    placed: list[tuple[ir.Value, _Blob]] = []
    blobs: dict[str, list[_Blob]] = {}
    by_tensor: dict[int, _Blob] = {}
    for model in models.values():
        _check_inline_size(model)
        for value in sorted(_initializers(model), key=lambda value: value.name or ""):
            tensor = value.const_value
            if tensor is None or tensor.dtype == ir.DataType.STRING or tensor.nbytes <= INLINE:
                continue
            named = blobs.setdefault(value.name or "", [])
            blob = by_tensor.get(id(tensor)) or next((one for one in named if _same(one.tensor, tensor)), None)
            if blob is None:
                blob = _Blob(tensor)
                named.append(blob)
            by_tensor[id(tensor)] = blob
            placed.append((value, blob))
    end = 0
    ordered = [blob for name in sorted(blobs) for blob in blobs[name]]
    for blob in ordered:
        blob.offset = (end + ALIGN - 1) // ALIGN * ALIGN
        end = blob.offset + blob.tensor.nbytes
    if ordered:
        for model in models.values():
            _refuse_own_weights(model, folder / weights)
        with replacing(folder / weights, end) as handle:
            for blob in ordered:
                handle.write(b"\0" * (blob.offset - handle.tell()))
                if isinstance(blob.tensor, ir.ExternalTensor):
                    blob.tensor.tofile(handle)  # copied in the kernel, never through memory
                else:
                    handle.write(blob.tensor.tobytes())
                if handle.tell() != blob.offset + blob.tensor.nbytes:
                    raise ValueError(f"tensor {blob.tensor.name!r} wrote other than its {blob.tensor.nbytes} bytes")
    saved = {id(value): value.const_value for model in models.values() for value in _initializers(model)}
    values = [value for model in models.values() for value in _initializers(model)]
    try:
        for value, blob in placed:
            tensor = blob.tensor
            value.const_value = ir.ExternalTensor(
                weights, blob.offset, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=value.name or ""
            )
        large = {id(value) for value, _ in placed}
        for value in values:
            if isinstance(value.const_value, ir.ExternalTensor) and id(value) not in large:
                value.const_value = _in_memory(value.const_value)
        for name, model in models.items():
            data = _serialize(model, folder / name)
            with replacing(folder / name, len(data)) as handle:
                handle.write(data)
    finally:
        for value in values:
            value.const_value = saved[id(value)]


def _same(one: Any, other: Any) -> bool:
    """Equal type, shape and content; two views of one stretch of a file are not read."""
    if one is other:
        return True
    if (one.dtype, one.nbytes, tuple(one.shape)) != (other.dtype, other.nbytes, tuple(other.shape)):
        return False
    if isinstance(one, ir.ExternalTensor) and isinstance(other, ir.ExternalTensor):
        places = [(os.path.realpath(tensor.path), tensor.offset or 0) for tensor in (one, other)]
        if places[0] == places[1]:
            return True
    views = [np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8) for tensor in (one, other)]
    return bool(views[0].data == views[1].data)  # bytes, so NaNs are equal; a mapped tensor is paged in, not copied


def _in_memory(tensor: ir.ExternalTensor) -> ir.Tensor:
    return ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, shape=tensor.shape, name=tensor.name)


def _refuse_own_weights(model: ir.Model, target: Path) -> None:
    if not target.exists():
        return
    for tensor in tensors(model):
        if isinstance(tensor, ir.ExternalTensor) and os.path.realpath(tensor.path) == os.path.realpath(target):
            raise InputError(
                f"the model still reads its weights from {target}", "another file to write to", "save to another folder"
            )


def _check_inline_size(model: ir.Model) -> None:
    total = sum(tensor.nbytes for tensor in _attr_tensors(model))
    if total > MAX_PROTO:
        raise InputError(
            f"the constants inside the graph have {total} bytes",
            f"at most {MAX_PROTO} bytes, the limit of protobuf",
            "turn large Constant nodes into initializers",
        )


def _serialize(model: ir.Model, path: Path) -> bytes:
    try:
        data: bytes = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    except (EncodeError, ValueError) as error:
        raise InputError(f"{path} cannot be written as a protobuf: {error}", "a model below 2 GiB") from error
    if len(data) > MAX_PROTO:
        raise InputError(f"{path} would have {len(data)} bytes", f"at most {MAX_PROTO}, the limit of protobuf")
    return data

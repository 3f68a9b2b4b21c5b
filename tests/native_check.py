"""What a native kernel's outputs must be, and ways to run one through ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
import pytest
from native_driver import Array, turned
from one_op import model_of

from trtpass import native, native_build
from trtpass.errors import InputError
from trtpass.op import DOMAIN, Case, Op

GUARD = 64  # elements before and after every output
OPERATORS = [pytest.param(op, id=op.name) for op in native.operators().values()]


def cases(slow: bool = True) -> list[Any]:
    """Every case of every operator that has a kernel."""
    return [
        pytest.param(op, case, id=f"{op.name}-{case.name}")
        for op in native.operators().values()
        for case in (op.case_list() if op.case_list else ())
        if slow or not case.slow
    ]


def library() -> native.Library:
    """The library, built if it is missing or old; skips where nothing can build it."""
    if isinstance(native.find(), str):
        native_build.build(tools())
    return native.need()


def tools() -> native_build.Toolchain:
    """What builds kernels; skips where there is nothing."""
    found = native_build.toolchain()
    if isinstance(found, str):
        pytest.skip(found)
    return found


def isas() -> list[str]:
    """Instruction sets of the library that this machine has."""
    found = []
    for name in library().isas:
        try:
            native.force_isa(name)
        except InputError:
            continue
        found.append(name)
    native.force_isa(None)
    return found


def layouts(op: Op) -> list[str]:
    """Domains that have the operator."""
    return [DOMAIN, native.SWAPPED] if any(len(port.axes) == 4 for port in op.inputs) else [DOMAIN]


def floating(op: Op, inputs: Sequence[Array]) -> str:
    """The floating type of a call, under which its tolerance is kept."""
    pairs = list(zip(op.inputs, inputs, strict=True))
    return str(next((x for port, x in pairs if port.floating), np.zeros(0, np.float32)).dtype)


def check(
    op: Op, inputs: Sequence[Array], actual: Sequence[Array], expected: Sequence[Array], unreal: bool = False
) -> None:
    """Integers are equal, floats within the tolerance, rows that are wholly 0 in the reference exactly 0.

    ``unreal``: only what is finite in the reference is compared, and no zeros: torch gives 0 for a row of scores -inf.
    """
    dtype = floating(op, inputs)
    for port, found, wanted in zip(op.outputs, actual, expected, strict=True):
        assert found.dtype == wanted.dtype and found.shape == wanted.shape, f"{port.name}: {found.dtype} {found.shape}"
        if wanted.dtype.kind == "i":
            np.testing.assert_array_equal(found, wanted, err_msg=port.name)
            continue
        empty = np.all(wanted == 0, axis=-1)
        if unreal:
            promised = np.isfinite(wanted) & ~empty[..., None]
            found, wanted = found[promised], wanted[promised]
        else:
            assert np.all(found[empty] == 0), f"{port.name}: a row is not 0 that is 0 in the reference"
        limits = {"rtol": op.tolerance.rtol[dtype], "atol": op.tolerance.atol[dtype]}
        np.testing.assert_allclose(found.astype("f8"), wanted.astype("f8"), **limits, err_msg=port.name)


def same_bits(left: Sequence[Array], right: Sequence[Array]) -> bool:
    return [x.tobytes() for x in left] == [x.tobytes() for x in right]


def made(case: Case) -> list[Array]:
    return list(case.make(0))


def session(
    op: Op,
    inputs: Sequence[Array],
    attrs: Mapping[str, Any],
    domain: str = DOMAIN,
    threads: int = 1,
    registered: bool = True,
    profile: str = "",
) -> onnxruntime.InferenceSession:
    """One node. In domain ``trtpass`` it has its body, too; in the other one only the library has the operator."""
    model = model_of(op, "dynamic", inputs, attrs)
    if domain == native.SWAPPED:
        del model.functions[:]
        model.graph.node[0].domain = model.opset_import[1].domain = domain
        for value in [*model.graph.input, *model.graph.output]:
            dims = value.type.tensor_type.shape.dim
            if len(dims) == 4:
                dims[1].dim_param, dims[2].dim_param = dims[2].dim_param, dims[1].dim_param
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors of the kernels come as exceptions
    if registered:
        options.register_custom_ops_library(str(library().path))
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def bound(
    made: onnxruntime.InferenceSession, op: Op, inputs: Sequence[Array], attrs: Mapping[str, Any], swapped: bool = False
) -> list[Array]:
    """One run into poisoned buffers of the caller: NaN or -1, in the outputs and around them, where it has to stay."""
    binding = made.io_binding()
    laid = [turned(x) if swapped else np.ascontiguousarray(x) for x in inputs]
    for port, x in zip(op.inputs, laid, strict=True):
        binding.bind_input(port.name, "cpu", 0, x.dtype.type, x.shape, x.ctypes.data)
    shapes = op.output_shapes([x.shape for x in inputs], attrs)
    buffers, outputs = [], []
    for port in op.outputs:
        shape = shapes[port.name]
        if swapped and len(shape) == 4:
            shape = (shape[0], shape[2], shape[1], shape[3])
        dtype = np.dtype(floating(op, inputs) if port.floating else port.dtypes[0])
        size = int(np.prod(shape))
        buffer = np.frombuffer(b"\xff" * ((size + 2 * GUARD) * dtype.itemsize), dtype).copy()
        buffers.append(buffer)
        outputs.append(buffer[GUARD : GUARD + size].reshape(shape))
        binding.bind_output(port.name, "cpu", 0, dtype.type, shape, outputs[-1].ctypes.data)
    made.run_with_iobinding(binding)
    for port, buffer in zip(op.outputs, buffers, strict=True):
        around = np.concatenate([buffer[:GUARD], buffer[-GUARD:]])
        assert around.tobytes() == b"\xff" * around.nbytes, f"{port.name}: written outside"
    return [turned(x) if swapped else x.copy() for x in outputs]

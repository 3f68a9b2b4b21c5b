"""Every kernel with every case of its operator, and how one runs among guards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from one_op import in_torch

from plugins import all_ops
from trtpass.kernels import launch
from trtpass.op import Case, Kernel, Op

GUARD = 4096  # elements before and after every tensor; a multiple of 16 bytes


def kernels() -> list[Any]:
    found = []
    for op in all_ops().values():
        for kernel in op.kernel_list() if op.kernel_list else ():
            found.append(pytest.param(op, kernel, id=f"{op.name}-{kernel.function.__name__}"))
    return found


def kernel_cases() -> list[Any]:
    found = []
    for parameters in kernels():
        op, kernel = parameters.values
        for case in op.case_list() if op.case_list else ():
            found.append(pytest.param(op, kernel, case, id=f"{parameters.id}-{case.name}"))
    return found


def guarded(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor within a poisoned buffer, and the buffer: NaN, or the most negative integer."""
    poison = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
    size = int(np.prod(shape))
    buffer = torch.full((size + 2 * GUARD,), poison, dtype=dtype, device=device)
    return buffer[GUARD : GUARD + size].view(shape), buffer


def run(op: Op, kernel: Kernel, case: Case, device: str) -> list[np.ndarray]:
    """One launch on poisoned outputs: each whole buffer, guards included."""
    inputs = []
    for array in case.make(0):
        tensor, _ = guarded(array.shape, torch.from_numpy(array).dtype, device)
        inputs.append(tensor.copy_(torch.from_numpy(array)))
    expected = in_torch(op, case.make(0), case.attrs)
    outputs = [guarded(x.shape, torch.from_numpy(x).dtype, device) for x in expected]
    launch(op, kernel, inputs, [tensor for tensor, _ in outputs], case.attrs)
    return [buffer.cpu().numpy() for _, buffer in outputs]


def check(op: Op, case: Case, buffers: list[np.ndarray]) -> None:
    """Outputs equal the reference: integers exactly, floats within the tolerance, zeros exactly; guards are whole."""
    inputs = case.make(0)
    dtype = next(str(x.dtype) for x in inputs if x.dtype.kind == "f")
    for port, buffer, expected in zip(op.outputs, buffers, in_torch(op, inputs, case.attrs), strict=True):
        guards = np.concatenate([buffer[:GUARD], buffer[-GUARD:]])
        assert np.all(np.isnan(guards) if guards.dtype.kind == "f" else guards == np.iinfo(guards.dtype).min), port.name
        actual = buffer[GUARD:-GUARD].reshape(expected.shape)
        if expected.dtype.kind == "i":
            np.testing.assert_array_equal(actual, expected, err_msg=port.name)
        else:
            assert np.all(actual[expected == 0] == 0), f"{port.name}: not 0 where the reference is"
            limits = {"rtol": op.tolerance.rtol[dtype], "atol": op.tolerance.atol[dtype]}
            np.testing.assert_allclose(actual.astype("f8"), expected.astype("f8"), **limits, err_msg=port.name)

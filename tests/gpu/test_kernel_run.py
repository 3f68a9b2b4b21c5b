"""Every kernel equals its reference on the GPU of this machine, on every case of its operator."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="kernels are written in Triton")
import torch
from kernel_cases import check, kernel_cases, run

from trtpass.kernels import supports
from trtpass.op import Case, Kernel, Op

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True, scope="module")
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA GPU")


@pytest.mark.parametrize(("op", "kernel", "case"), kernel_cases())
def test_kernel_equals_reference(op: Op, kernel: Kernel, case: Case) -> None:
    major, minor = torch.cuda.get_device_capability()
    inputs = case.make(0)
    floating = next(str(x.dtype) for x in inputs if x.dtype.kind == "f")
    reason = supports(op, kernel, op.bind([x.shape for x in inputs]), case.attrs, floating, major * 10 + minor)
    if reason is not True:
        pytest.skip(str(reason))
    check(op, case, run(op, kernel, case, "cuda"))

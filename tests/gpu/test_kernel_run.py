"""Every kernel, with every tactic, equals its reference on the GPU of this machine, on every case of its operator."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="kernels are written in Triton")
import torch
from kernel_cases import Trial, check, run, trials

from trtpass.ptx import supports

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True, scope="module")
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA GPU")


@pytest.mark.parametrize("trial", trials(), ids=lambda trial: trial.name)
def test_kernel_equals_reference(trial: Trial) -> None:
    major, minor = torch.cuda.get_device_capability()
    dims = trial.op.bind([tuple(x.shape) for x in trial.make()])
    cc = major * 10 + minor
    reason = supports(trial.op, trial.kernel, dims, trial.attrs, trial.floating, cc, trial.tactic)
    if reason is not True:
        pytest.skip(str(reason))
    check(trial, run(trial, "cuda"))

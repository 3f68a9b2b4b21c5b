"""A plan built for the GPU of this machine computes what ONNX Runtime computes from the same float16 graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from tests import tiny
from trtpass import doctor, io, passes, rtx
from trtpass.passes.cache import insert_cache
from trtpass.trt.runner import execute

pytestmark = [pytest.mark.gpu, pytest.mark.tensorrt]
CAPACITY = 256


@pytest.fixture(autouse=True, scope="module")
def _gpu() -> None:
    run = next(f for f in doctor.examine() if f.name == "target tensorrt-rtx: run")
    if run.status != "ok":
        pytest.skip(run.means)
    if not torch.cuda.is_available():
        pytest.skip("torch is built without CUDA, and it holds the device buffers")


@pytest.mark.parametrize(
    ("phase", "method"), [("prefill", ""), ("decode", ""), ("prefill", "token-sparse:min_tokens=0,window=8")]
)
def test_plan_equals_onnxruntime(phase: str, method: str, tmp_path: Path) -> None:
    source = tiny.decoder()
    if method:
        passes.parse(method + ",coverage=0,layers=all")(source)  # keeps every token: no chaotic selection to compare
    model = rtx.lower(insert_cache(source, phase, capacity=CAPACITY, logits="all"), ["CURRENT"])
    io.save(model, tmp_path / "graph.onnx")
    tokens = 96 if phase == "prefill" else 3
    rng = np.random.default_rng(0)
    feeds: dict[str, np.ndarray] = {}
    profile = {}
    for value in model.graph.inputs:
        shape = [2 if i == 0 else d if isinstance(d, int) else tokens for i, d in enumerate(value.shape or [])]
        profile[str(value.name)] = ([1, *shape[1:]], shape, shape)
        if value.dtype == ir.DataType.FLOAT16:
            feeds[str(value.name)] = rng.standard_normal(shape).astype(np.float16)
    feeds["input_ids"] = rng.integers(0, 64, (2, tokens))
    lengths = np.array([tokens, tokens - 2], np.int32)
    integers = {"lengths": lengths, "past_lengths": np.array([17, 201], np.int32)}
    feeds |= {name: array for name, array in integers.items() if name in profile}
    rtx.build_plan(tmp_path / "graph.onnx", tmp_path / "graph.plan", compute_capabilities=["CURRENT"], profile=profile)
    session = ort.InferenceSession(tmp_path / "graph.onnx", providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    expected = dict(zip(names, (np.asarray(v) for v in session.run(names, feeds)), strict=True))
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in feeds.items()}
    made = execute(tmp_path / "graph.plan", tensors, "tensorrt_rtx")
    got = {name: tensor.numpy() for name, tensor in made.items()}
    for row, length in enumerate(lengths):
        ours, theirs = (d["logits"][row, :length].astype(np.float32) for d in (got, expected))
        # float16 on both sides, in another order of summation: the bound of the float16 conversion itself
        np.testing.assert_allclose(ours, theirs, atol=0.03 * float(np.abs(theirs).max()), rtol=0)
    for name in names[1:]:
        np.testing.assert_allclose(
            got[name].astype(np.float32), expected[name].astype(np.float32), atol=0.05, rtol=0.02
        )

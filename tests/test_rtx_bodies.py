"""Every operator's static body builds in TensorRT-RTX: the one real TensorRT compiler that runs without a GPU."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from one_op import model_of

from plugins import all_ops
from trtpass import rtx
from trtpass.op import Case, Op

pytestmark = pytest.mark.tensorrt
TOKENS = 130  # the most of a case: a body is a small graph at any length


@pytest.fixture(autouse=True)
def _package() -> None:
    if not rtx.available():
        pytest.skip(f"tensorrt-rtx is not installed: {rtx.INSTALL}")


def largest(op: Op, dtype: str) -> Case | None:
    """The largest case of an operator with floating inputs of a type, up to ``TOKENS``; TensorRT wants D = Dv."""
    found = []
    for case in op.case_list() if op.case_list else ():
        inputs = case.make(0)
        floats = {str(x.dtype) for x in inputs if x.dtype.kind == "f"} or {"float32"}
        dims = op.bind([x.shape for x in inputs])
        fits = dims["S"] <= TOKENS and dims.get("D") == dims.get("Dv", dims.get("D"))
        if floats == {dtype} and fits and all(x.size for x in inputs):
            found.append((sum(x.size for x in inputs), case.name, case))
    return max(found)[2] if found else None


def _calls() -> list[object]:
    return [
        pytest.param(op, case, id=f"{op.name}-{dtype}")
        for op in all_ops().values()
        for dtype in ("float16", "float32")
        if (case := largest(op, dtype)) is not None
    ]


@pytest.mark.parametrize(("op", "case"), _calls())
def test_static_body_builds(op: Op, case: Case, tmp_path: Path) -> None:
    inputs = case.make(0)
    model = model_of(op, "static", inputs, case.attrs, symbolic=False)
    onnx.save(model, tmp_path / "body.onnx")
    report = rtx.build_plan(
        tmp_path / "body.onnx", tmp_path / "body.plan", compute_capabilities=["SM86", "SM120"], profile={}
    )
    assert report.bytes > 0 and set(report.inputs) == {port.name for port in op.inputs}

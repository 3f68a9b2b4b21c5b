"""Transposes that move no data: the graph computes the same, and swaps only go where everything that reads agrees."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from trtpass.bench import layer
from trtpass.passes.lower import lower
from trtpass.passes.transposes import swap_in_branches, swap_indices

HEADER = '<ir_version: 10, opset_import: ["" : 24]>\n'


def parse(text: str) -> ir.Model:
    model = ir.from_proto(onnx.parser.parse_model(HEADER + text))
    return ir.passes.common.ShapeInferencePass()(model).model


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    onnx.checker.check_model(ir.to_proto(model))
    data = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, feeds)


def count(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.all_nodes())


GATHER = "(float[rows,4] x, int32[b,h,s] i) => ({outputs}) {{ g = Gather(x, i) y = Transpose<perm={perm}>(g) {more} }}"


def gather(outputs: str = "float[b,s,h,4] y", perm: str = "[0,2,1,3]", more: str = "") -> ir.Model:
    return parse("gather " + GATHER.format(outputs=outputs, perm=perm, more=more))


FEEDS = {
    "x": np.random.default_rng(0).standard_normal((10, 4), np.float32),
    "i": np.random.default_rng(1).integers(0, 10, (2, 3, 5)).astype(np.int32),
}


def test_rows_are_gathered_in_the_other_order() -> None:
    model = gather()
    before = run(model, FEEDS)
    assert swap_indices(model) == 1
    assert [v.name for v in model.graph.outputs] == ["y"]
    transpose = next(node for node in model.graph if node.op_type == "Transpose")
    assert transpose.inputs[0].name == "i"
    np.testing.assert_array_equal(run(model, FEEDS)[0], before[0])


@pytest.mark.parametrize(
    "model",
    [
        gather(outputs="float[s,h,b,4] y", perm="[2,1,0,3]"),
        gather(outputs="float[b,s,h,4] y, float[b,h,s,4] z", more="z = Neg(g)"),
        gather(outputs="float[b,s,h,4] y, float[b,h,s,4] g"),
    ],
    ids=["another permutation", "rows read elsewhere", "rows are an output"],
)
def test_other_rows_stay(model: ir.Model) -> None:
    before = run(model, FEEDS)
    assert swap_indices(model) == 0
    for new, old in zip(run(model, FEEDS), before, strict=True):
        np.testing.assert_array_equal(new, old)


def branches(more: str = "", outputs: str = "") -> ir.Model:
    return parse(f"""branches (float[2,3,5,4] x, bool c) => (float[2,5,3,4] y{outputs}) {{
        o = If (c) <then_branch = a () => (p) {{ p = Neg(x) }}, else_branch = b () => (q) {{ q = Abs(x) }}>
        y = Transpose<perm=[0,2,1,3]>(o)
        {more}
    }}""")


@pytest.mark.parametrize("condition", [True, False])
def test_branches_swap_themselves(condition: bool) -> None:
    model = branches()
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 3, 5, 4), np.float32), "c": np.array(condition)}
    before = run(model, feeds)
    assert swap_in_branches(model) == 1
    assert [node.op_type for node in model.graph] == ["If"]
    assert [v.name for v in model.graph.outputs] == ["y"]
    np.testing.assert_array_equal(run(model, feeds)[0], before[0])


def test_branches_stay_where_another_reader_does_not_swap() -> None:
    assert swap_in_branches(branches("z = Neg(o)", ", float[2,3,5,4] z")) == 0


@pytest.mark.parametrize("select", ["head", "group"])
def test_a_sparse_layer_moves_only_its_inputs(select: str) -> None:
    """q, k and v are swapped once on the way in, and k once for the scores; all other transposes are of indices."""
    lowered = lower(layer.sparse(layer.Heads(), select), "cpu", kernels=False).model
    moved = [node for node in lowered.graph if node.op_type == "Transpose"]
    sources = [str(node.inputs[0].name) for node in moved if len(node.attributes["perm"].as_ints()) == 4]
    assert {"k_split", "q_split", "v_split"} < set(sources) and len(sources) == 4
    inside = [node for node in lowered.graph.all_nodes() if node.op_type == "Transpose" and node not in moved]
    swapped = [node for node in inside if len(node.attributes["perm"].as_ints()) == 4]
    assert len(swapped) <= 1  # k of the branch that keeps everything, whose scale comes between
    assert count(lowered)["GroupQueryAttention"] == 2

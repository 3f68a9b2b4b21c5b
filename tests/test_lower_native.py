"""Lowering with native kernels: where they fit, in which layout, what is said where they do not, and the way back."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import tiny
from test_lower import ATOL, attention, count, prefill_feeds, valid_part

from plugins import all_ops
from trtpass import native
from trtpass.bench import layer
from trtpass.passes import parse
from trtpass.passes.cache import insert_cache
from trtpass.passes.lower import Lowered, inline_bodies, lower
from trtpass.passes.native import interleave

METHOD = "token-sparse:coverage=0.3,window=4,min_tokens=8,layers=1"
HALF_ATOL = 2e-2  # as in test_lower: fp16 has 11 bits and logits reach 4; two layers round differently


pytestmark = pytest.mark.usefixtures("library")


def session(model: ir.Model, kernels: bool) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if kernels:
        native.register(options)
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def sparse(**options: Any) -> ir.Model:
    model = tiny.decoder(**options)
    parse(METHOD)(model)
    return insert_cache(model, "prefill")


def nodes(model: ir.Model) -> Counter[str]:
    return Counter(f"{n.domain}::{n.op_type}" for n in model.graph.all_nodes())


def decisions(lowered: Lowered) -> dict[str, tuple[str, str]]:
    return {d.node: (d.decision, d.reason) for d in lowered.decisions}


@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True}, {"kv_heads": 4}, {"kv_heads": 1}, {"head_dim": 12}, {"dtype": np.float16}]
)
def test_kernels_bodies_and_portable_agree(options: dict[str, Any]) -> None:
    model = sparse(**options)
    feeds = prefill_feeds(
        options.get("kv_heads", 2), options.get("head_dim", 16), dtype=options.get("dtype", np.float32)
    )
    lowered = lower(model, "cpu").model
    expected = session(lower(model, "portable").model, kernels=False).run(None, feeds)
    for kernels in (True, False):  # one file: the kernels where they are registered, else its bodies
        got = session(lowered, kernels).run(None, feeds)
        atol = HALF_ATOL if "dtype" in options else ATOL
        for mine, theirs in zip(valid_part(got, feeds["lengths"]), valid_part(expected, feeds["lengths"]), strict=True):
            np.testing.assert_allclose(mine.astype("f4"), theirs.astype("f4"), atol=atol, rtol=0)


def test_every_operator_and_dense_attention_become_native() -> None:
    lowered = lower(sparse(), "cpu")
    found = nodes(lowered.model)
    for name in ("ColumnMass", "TokenSparseAttention", "CausalAttention"):
        assert found[f"{native.SWAPPED}::{name}"] == 1, name
    for name in ("CoverageBudget", "SelectTokens"):
        assert found[f"trtpass::{name}"] == 1, name
    assert found["::Attention"] == found["com.microsoft::GroupQueryAttention"] == found["::Loop"] == 0
    said = decisions(lowered)
    assert said["layer1.token_sparse.ColumnMass"] == ("native kernel", "ColumnMass in float32")
    assert sum(d == ("native kernel", "CausalAttention in float32: fresh keys") for d in said.values()) == 1


def test_the_only_transposes_left_are_those_of_the_cache() -> None:
    lowered = lower(sparse(qk_norm=True), "cpu").model
    moved = [n for n in lowered.graph.all_nodes() if n.op_type == "Transpose"]
    assert len(moved) == 4  # keys and values of two layers
    assert {user.op_type for n in moved for user in n.outputs[0].consumers()} == {"TensorScatter"}


@pytest.mark.parametrize("select", ["head", "group"])
def test_a_layer_of_the_benchmark_moves_only_its_cache(select: str) -> None:
    lowered = lower(layer.sparse(layer.Heads(), select), "cpu").model
    moved = [n for n in lowered.graph.all_nodes() if n.op_type == "Transpose"]
    assert {str(n.inputs[0].name) for n in moved} == {"k_split", "v_split"}


def test_decode_stays_with_the_contrib_operator() -> None:
    lowered = lower(insert_cache(tiny.decoder(), "decode"), "cpu").model
    assert count(lowered, "GroupQueryAttention") == 2 and not lowered.functions


def test_the_kernel_runs_and_not_the_body() -> None:
    """Only the kernel refuses a count that is too large."""
    lowered = lower(layer.sparse(layer.Heads(heads=2, kv_heads=1, width=8), "head", scoring=False), "cpu").model
    tokens = 5
    feeds = {
        **{name: np.ones((1, tokens, 8 * n), np.float32) for name, n in (("q_flat", 2), ("k_flat", 1), ("v_flat", 1))},
        **{f"past_{role}": np.zeros((1, 1, tokens, 8), np.float32) for role in ("key", "value")},
        "index": np.full((1, 2, tokens), tokens, np.int32),
        "count": np.full((1, 2), tokens + 1, np.int32),
    }
    with pytest.raises(Exception, match=r"TokenSparseAttention\.count holds 6; expected 0 to C = 5"):
        session(lowered, kernels=True).run(None, feeds)


def test_portable_and_no_kernels_have_none() -> None:
    for target, kernels in (("portable", True), ("cpu", False)):
        lowered = lower(sparse(), target, kernels)
        assert {n.domain for n in lowered.model.graph.all_nodes()} <= {"", "com.microsoft"}
        assert not lowered.model.functions
        assert ("dynamic body", "no native kernels on this target") in decisions(lowered).values()


def test_a_type_that_does_not_fit_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    op = all_ops()["CausalAttention"]
    assert native.fits(op, dict.fromkeys("qkv", "float32")) is True
    assert native.fits(op, dict.fromkeys("qkv", "float64")) == "its q is float64, not float32 or float16"
    assert native.fits(op, {"q": "float16", "k": "float32", "v": "float16"}) == "its inputs mix float16 and float32"
    assert (
        native.fits(op, {"q": None, "k": "float32", "v": "float32"})
        == "its q is of unknown type, not float32 or float16"
    )
    lowered = lower(attention("", ir.DataType.DOUBLE), "cpu")
    assert nodes(lowered.model)["::Attention"] == 1
    monkeypatch.setattr(native, "find", lambda: "there is no compiler")
    assert native.fits(op, dict.fromkeys("qkv", "float32")) == "there is no compiler"


def test_without_a_library_bodies_take_over_and_the_reason_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sparse()
    monkeypatch.setattr(native, "find", lambda: "there is no compiler")
    lowered = lower(model, "cpu")
    assert ("dynamic body", "there is no compiler") in decisions(lowered).values()
    assert not lowered.model.functions and count(lowered.model, "GroupQueryAttention") > 1


def test_one_node_of_an_operator_may_stay_while_another_does_not() -> None:
    model = tiny.decoder()
    parse(METHOD.replace("layers=1", "layers=all"))(model)
    masses = [n for n in model.graph if n.op_type == "ColumnMass"]
    verdicts: dict[ir.Node, bool | str] = dict.fromkeys((n for n in model.graph if n.domain == "trtpass"), "a reason")
    verdicts[masses[0]] = True
    said = inline_bodies(model, "dynamic", verdicts)
    assert nodes(model)["trtpass::ColumnMass"] == 1
    assert Counter(d.decision for d in said) == {"dynamic body": 7}
    assert list(model.functions) == [("trtpass", "ColumnMass", "")]


def one_node(edit: str) -> ir.Model:
    """CausalAttention on values that were transposed, whose output is read in several ways."""
    inputs = {n: ir.val(n, ir.DataType.FLOAT, ["b", "s", heads, 8]) for n, heads in (("q", 4), ("k", 2), ("v", 2))}
    swap = {"perm": [0, 2, 1, 3]}
    turned = [ir.node("Transpose", [x], swap, outputs=[ir.val(f"{n}t", ir.DataType.FLOAT)]) for n, x in inputs.items()]
    if edit == "plain q":
        inputs["q"].shape = ir.Shape(["b", 4, "s", 8])
        turned[0] = ir.node("Identity", [inputs["q"]], outputs=[ir.val("qt", ir.DataType.FLOAT)])
    node = ir.node(
        "CausalAttention", [t.outputs[0] for t in turned], {"scale": 0.0}, domain="trtpass", name="attend",
        outputs=[ir.val("raw", ir.DataType.FLOAT)],
    )  # fmt: skip
    back = ir.node("Transpose", node.outputs, swap, outputs=[ir.val("out", ir.DataType.FLOAT)])
    more = [ir.node("Neg", node.outputs, outputs=[ir.val("negative", ir.DataType.FLOAT)])] if edit == "reader" else []
    outputs = [back.outputs[0], *(n.outputs[0] for n in more), *(node.outputs if edit == "output" else [])]
    opsets = {"": 24, "trtpass": 1}
    graph = ir.Graph(list(inputs.values()), outputs, nodes=[*turned, node, back, *more], opset_imports=opsets, name="g")
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(
    ("edit", "domain", "transposes"),
    [("", native.SWAPPED, 0), ("reader", native.SWAPPED, 1), ("output", "trtpass", 4), ("plain q", "trtpass", 3)],
)
def test_a_layout_is_changed_only_where_it_saves(edit: str, domain: str, transposes: int) -> None:
    model = one_node(edit)
    rng = np.random.default_rng(0)
    shape = (2, 4, 7, 8) if edit == "plain q" else (2, 7, 4, 8)
    feeds = {"q": rng.standard_normal(shape, np.float32)}
    feeds |= {n: rng.standard_normal((2, 7, 2, 8), np.float32) for n in "kv"}
    before = session(lower(model, "portable").model, kernels=False).run(None, feeds)
    lowered = lower(model, "cpu").model
    [node] = [n for n in lowered.graph if n.op_type == "CausalAttention"]
    assert node.domain == domain and count(lowered, "Transpose") == transposes
    assert [v.name for v in lowered.graph.outputs] == [v.name for v in model.graph.outputs]
    for kernels in (True, False):
        for mine, theirs in zip(session(lowered, kernels).run(None, feeds), before, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=ATOL, rtol=0)


def test_nodes_without_four_axes_keep_their_layout() -> None:
    model = tiny.decoder()
    parse(METHOD)(model)
    chosen = [n for n in model.graph if n.op_type in ("CoverageBudget", "SelectTokens")]
    assert interleave(model, chosen) == 0


def test_dense_attention_is_native_where_types_had_to_be_inferred() -> None:
    """The layer of the benchmarks states the types of its inputs alone."""
    lowered = lower(layer.dense(layer.Heads()), "cpu").model
    assert nodes(lowered)[f"{native.SWAPPED}::CausalAttention"] == 1
    assert count(lowered, "GroupQueryAttention") == 0

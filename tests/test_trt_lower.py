"""The graph that TensorRT reads: plugin nodes as declared, bodies where no kernel applies, and the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest

pytest.importorskip("triton", reason="plugin nodes are those that Triton kernels serve")

import reference_nodes

from plugins import all_ops, kernel_ops
from tests import tiny
from trtpass import passes, rtx
from trtpass.errors import InputError
from trtpass.op import DOMAIN
from trtpass.passes.cache import insert_cache
from trtpass.trt import lower as trt

SPARSE = "token-sparse:layers=all,min_tokens=0,window=4"
TOKEN_SPARSE = ["WindowStatistics", "WindowMass", "MassShare", "ShareBudget", "SelectTokens", "TokenSparseAttention"]


def rewritten(options: str = "coverage=0.3") -> ir.Model:
    model = tiny.decoder()
    passes.parse(f"{SPARSE},{options}")(model)
    return model


def prefill(options: str = "coverage=0.3") -> ir.Model:
    return insert_cache(rewritten(options), "prefill", capacity=64, logits="all")


@pytest.mark.parametrize("dtype", list(trt.DTYPES))
def test_every_method_node_becomes_plugins_without_bodies(dtype: str) -> None:
    lowered = trt.lower(prefill(), 90, dtype)
    model = lowered.model
    assert [node.op_type for node in trt.plugin_nodes(model)] == TOKEN_SPARSE * 2
    assert not model.functions
    assert {d.decision for d in lowered.decisions} == {"TensorRT plugin", "TensorRT plugins"}
    assert any("WindowStatistics + WindowMass" in d.reason for d in lowered.decisions)
    assert trt.faults(model) == []
    onnx.checker.check_model(ir.to_proto(model))
    for node in trt.plugin_nodes(model):
        assert node.attributes["aot"].as_int() == 1
        assert node.attributes["plugin_namespace"].as_string() == "trtpass"
        for port, value in zip(kernel_ops()[node.op_type].outputs, node.outputs, strict=True):
            expected = trt.DTYPES[dtype] if port.floating else ir.DataType.from_numpy(np.dtype(port.dtypes[0]))
            assert value.dtype == expected, (node.op_type, port.name)


@pytest.mark.parametrize("options", ["coverage=0", "coverage=0.3,pool=3", "coverage=0.3,select=group,mode=paper"])
def test_the_graph_with_plugins_computes_what_the_graph_with_bodies_does(options: str) -> None:
    """Both in float16: each plugin by its torch reference, against static bodies of standard operators."""
    source = prefill(options)
    feeds = {
        "input_ids": np.random.default_rng(1).integers(0, 64, (2, 24)),
        "lengths": np.array([24, 17], np.int32),
        **{
            str(v.name): np.zeros([2, *(int(d) for d in list(v.shape or [])[1:])], np.float16)  # type: ignore[arg-type]
            for v in source.graph.inputs
            if str(v.name).startswith("past.")
        },
    }
    plugins = reference_nodes.run(trt.lower(source, 90).model, feeds)
    bodies = reference_nodes.run(rtx.lower(source), feeds)
    assert plugins.keys() == bodies.keys()
    for row, length in enumerate(feeds["lengths"]):
        ours, theirs = (d["logits"][row, :length].astype(np.float32) for d in (plugins, bodies))
        np.testing.assert_allclose(ours, theirs, atol=0.03 * float(np.abs(theirs).max()), rtol=0)


def test_select_counts_less_than_everything() -> None:
    """The comparison above prunes: without that it would compare dense attention with itself."""
    model = trt.lower(prefill(), 90).model
    select = next(node for node in trt.plugin_nodes(model) if node.op_type == "SelectTokens")
    count = select.outputs[1]
    model.graph.outputs.append(count)
    count.name = "count"
    feeds = {"input_ids": np.random.default_rng(1).integers(0, 64, (2, 24)), "lengths": np.array([24, 17], np.int32)}
    for value in model.graph.inputs:
        if str(value.name).startswith("past."):
            feeds[str(value.name)] = np.zeros([2, *(int(d) for d in list(value.shape or [])[1:])], np.float16)  # type: ignore[arg-type]
    made = reference_nodes.run(model, feeds)["count"]
    assert (made < np.array([[24], [17]])).any()


def test_decode_has_no_plugins_and_masks_of_its_own() -> None:
    model = trt.lower(insert_cache(tiny.decoder(), "decode", capacity=64), 90).model
    assert trt.plugin_nodes(model) == []
    attentions = [node for node in model.graph if node.op_type == "Attention"]
    assert attentions and all(len(node.inputs) == 4 for node in attentions)
    assert any(node.op_type == "TensorScatter" for node in model.graph)  # written in place: `present` is `past`


def test_a_kernel_that_does_not_apply_leaves_a_body_and_its_reason() -> None:
    lowered = trt.lower(prefill(), 75)
    assert trt.plugin_nodes(lowered.model) == []
    assert {d.decision for d in lowered.decisions} == {"static body"}
    assert all("compute capability 75 is below 80" in d.reason for d in lowered.decisions)


def test_one_step_that_does_not_apply_leaves_the_whole_operator_a_body() -> None:
    lowered = trt.lower(prefill("coverage=0.3,pool=201"), 90)
    words = {d.reason for d in lowered.decisions if d.decision == "static body"}
    assert len(words) == 1 and "pool" in words.pop()
    assert not {"WindowStatistics", "WindowMass"} & {node.op_type for node in trt.plugin_nodes(lowered.model)}
    assert "SelectTokens" in {node.op_type for node in trt.plugin_nodes(lowered.model)}


def test_without_kernels_everything_is_a_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """The invariant: delete every kernel, or Triton, and all models still build."""
    from trtpass.trt import plugins

    def gone(op: object) -> None:
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(plugins, "ways", gone)
    lowered = trt.lower(prefill(), 90)
    assert not trt.plugin_nodes(lowered.model)
    assert {d.decision for d in lowered.decisions} == {"static body"}
    assert all("needs the module triton" in d.reason for d in lowered.decisions)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda node, model: node.attributes.pop("aot"), "has attributes"),
        (lambda node, model: node.attributes.add(ir.AttrInt64("other", 1)), "has attributes"),
        (lambda node, model: node.resize_inputs(1), "has 1 inputs"),
        (lambda node, model: setattr(node, "op_type", "Unknown"), "has no kernel"),
        (lambda node, model: setattr(node.outputs[0], "type", ir.TensorType(ir.DataType.DOUBLE)), "of type DOUBLE"),
        (lambda node, model: model.metadata_props.update({trt.CC_KEY: "75"}), "no kernel that applies"),
    ],
)
def test_a_node_that_is_not_as_declared_is_a_fault(change: Callable[[ir.Node, ir.Model], None], words: str) -> None:
    model = trt.lower(prefill(), 90).model
    node = next(n for n in trt.plugin_nodes(model) if n.op_type == "TokenSparseAttention")
    assert trt.faults(model) == []
    change(node, model)
    assert any(words in fault for fault in trt.faults(model)), trt.faults(model)


def test_a_body_beside_a_plugin_is_a_fault() -> None:
    from plugins._library import function

    model = trt.lower(prefill(), 90).model
    body = function(all_ops()["SelectTokens"], "static")
    model.functions[body.identifier()] = body
    assert any("has a body, which the parser takes before the plugin" in fault for fault in trt.faults(model))


def test_requests_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="dtype 'float32' for TensorRT"):
        trt.lower(prefill(), 90, "float32")
    with pytest.raises(InputError, match="symbolic capacity"):
        trt.lower(insert_cache(tiny.decoder(), "decode"), 90)
    model = prefill()
    before = [(node.op_type, len(node.attributes)) for node in model.graph]
    trt.lower(model, 90)
    assert [(node.op_type, len(node.attributes)) for node in model.graph] == before  # a copy was lowered
    assert {node.domain for node in model.graph} >= {DOMAIN}

"""What is found in a graph, and the reason for whatever is not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import tiny
from families import Exported
from proofs import raised
from rich.console import Console

from trtpass.anchors import find
from trtpass.inspect import inspect, render
from trtpass.ir import is_op


def attention(model: ir.Model) -> ir.Node:
    return next(n for n in model.graph if is_op(n, "Attention"))


def retype(value: ir.Value, shape: list[int | str | None]) -> None:
    value.shape = ir.Shape(shape)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_everything_is_found_in_a_canonical_decoder(qk_norm: bool) -> None:
    model = tiny.decoder(layers=3, heads=8, kv_heads=2, head_dim=16, qk_norm=qk_norm)
    anchors = find(model)
    assert anchors.missing == () and [b.layer for b in anchors.blocks] == [0, 1, 2]
    for block in anchors.blocks:
        assert (block.heads, block.kv_heads, block.group) == (8, 2, 4)
        assert (block.head_dim, block.v_head_dim, block.scale) == (16, 16, 0.25)
        assert block.causal and block.why_not_causal == ""
        assert block.rope_q is not None and block.rope_k is not None and block.rope_q is not block.rope_k
        assert block.qkv_input is not None and is_op(block.qkv_input.producer(), "RMSNormalization")
        assert block.o_proj is not None and block.o_proj.inputs[1].name == f"{block.layer}.o"
        assert block.residual_in is not None and block.residual_out is not None and block.why_no_residual == ""
        assert is_op(block.residual_out.producer(), "Add")
    first, second = anchors.blocks[:2]
    assert is_op(first.residual_in.producer(), "Gather")  # the embedding starts the residual stream
    assert second.residual_in is not first.residual_out  # the MLP adds to it between
    assert anchors.input_ids is model.graph.inputs[0] and anchors.logits is model.graph.outputs[0]
    assert anchors.positions is not None and anchors.positions.name == "positions"
    assert anchors.token_axes["input_ids"] == 1 and anchors.token_axes[first.q.name] == 2
    assert anchors.token_axes[first.residual_in.name] == 1


@pytest.mark.parametrize("family", ["llama", "qwen3", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_everything_is_found_in_raised_exports(tiny_export: Callable[[str], Exported], family: str) -> None:
    anchors = find(raised(tiny_export(family)))
    assert anchors.missing == () and len(anchors.blocks) == 2
    for block in anchors.blocks:
        assert (block.heads, block.kv_heads, block.head_dim, block.causal) == (6, 2, 16, True)
        assert block.rope_q is not None and block.qkv_input is not None and block.residual_in is not None


def no_token_input(model: ir.Model) -> None:
    model.graph.inputs[0].dtype = ir.DataType.FLOAT


def no_logits(model: ir.Model) -> None:
    model.graph.outputs[:] = [attention(model).outputs[0]]


def headless(model: ir.Model) -> None:
    retype(attention(model).inputs[0], ["batch", None, "sequence", 16])


def flat(model: ir.Model) -> None:
    retype(attention(model).inputs[1], ["batch", "sequence", 32])


def uneven(model: ir.Model) -> None:
    retype(attention(model).inputs[0], ["batch", 5, "sequence", 16])


def other_values(model: ir.Model) -> None:
    retype(attention(model).inputs[2], ["batch", 4, "sequence", 16])


def no_rope(model: ir.Model) -> None:
    for node in [n for n in model.graph if is_op(n, "RotaryEmbedding")]:
        node.outputs[0].replace_all_uses_with(node.inputs[0])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (no_token_input, "no token input"),
        (no_logits, "no logits"),
        (headless, "no fixed head count"),
        (flat, "expected 4-D"),
        (uneven, "5 query heads cannot be grouped over 2 key and 2 value heads"),
        (other_values, "4 query heads cannot be grouped over 2 key and 4 value heads"),
        (no_rope, "positions unknown"),
    ],
)
def test_what_is_missing_is_said(damage: Callable[[ir.Model], None], reason: str) -> None:
    model = tiny.decoder()
    damage(model)
    assert any(reason in sentence for sentence in find(model).missing), find(model).missing


def mask(model: ir.Model) -> None:
    node = attention(model)
    given = ir.val("bias", ir.DataType.FLOAT, ["sequence", "sequence"])
    model.graph.inputs.append(given)
    node.resize_inputs(4)
    node.replace_input_with(3, given)


def softcap(model: ir.Model) -> None:
    attention(model).attributes["softcap"] = ir.AttrFloat32("softcap", 30.0)


def bidirectional(model: ir.Model) -> None:
    attention(model).attributes["is_causal"] = ir.AttrInt64("is_causal", 0)


def cached(model: ir.Model) -> None:
    node = attention(model)
    given = [ir.val(f"past.{x}", ir.DataType.FLOAT, ["batch", 2, "past", 16]) for x in "kv"]
    model.graph.inputs.extend(given)
    node.resize_inputs(6)
    node.replace_input_with(4, given[0])
    node.replace_input_with(5, given[1])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (mask, "mask 'bias' was not proved causal"),
        (softcap, "soft-capped"),
        (bidirectional, "bidirectional"),
        (cached, "already reads a KV cache"),
    ],
)
def test_why_a_block_is_not_causal(damage: Callable[[ir.Model], None], reason: str) -> None:
    model = tiny.decoder()
    damage(model)
    first, second = find(model).blocks
    assert not first.causal and reason in first.why_not_causal
    assert second.causal


def test_cross_attention_has_no_common_input() -> None:
    model = tiny.decoder()
    node = next(n for n in model.graph if is_op(n, "MatMul") and n.inputs[1].name == "0.k")
    node.replace_input_with(0, next(n for n in model.graph if is_op(n, "Gather")).outputs[0])
    block = find(model).blocks[0]
    assert block.qkv_input is None and "different tensors" in block.why_no_qkv_input


def test_a_second_consumer_of_attention_hides_the_residual() -> None:
    model = tiny.decoder()
    out = attention(model).outputs[0]
    probe = ir.node("Relu", [out], outputs=[ir.val("probe", ir.DataType.FLOAT, out.shape)])
    model.graph.insert_after(attention(model), probe)
    model.graph.outputs.append(probe.outputs[0])
    block = find(model).blocks[0]
    assert block.residual_in is None and "2 consumers" in block.why_no_residual


def test_two_sources_of_positions_are_not_one() -> None:
    model = tiny.decoder()
    rope = next(n for n in model.graph if is_op(n, "RotaryEmbedding"))
    other = ir.val("positions_2", ir.DataType.INT64, ["batch", "sequence"])
    model.graph.inputs.append(other)
    rope.resize_inputs(4)
    rope.replace_input_with(3, other)
    anchors = find(model)
    assert anchors.positions is None and any("2 position tensors" in why for why in anchors.missing)


def test_unrecognised_attention_is_counted() -> None:
    x = ir.val("x", ir.DataType.FLOAT, ["n"])
    node = ir.node("Softmax", [x], outputs=[ir.val("y", ir.DataType.FLOAT, ["n"])])
    model = ir.Model(ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 24}, name="g"), ir_version=10)
    assert any("1 Softmax nodes" in why for why in find(model).missing)


def printed(model: ir.Model) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(render(inspect(model), "tiny"))
    return console.export_text()


def test_inspect_tells_what_was_found() -> None:
    found = inspect(tiny.decoder())
    assert found.methods["token-sparse"] == "" and found.missing == () and found.opset == 24
    assert [b["kv_heads"] for b in found.blocks] == [2, 2] and all(b["rope"] for b in found.blocks)
    shown = printed(tiny.decoder())
    for part in ("token-sparse: applies", "positions", "logits", "KV heads", " 4 ", " 2 ", "yes"):
        assert part in shown


def test_inspect_tells_why_a_method_does_not_apply() -> None:
    found = inspect(tiny.decoder(causal=False))
    assert "bidirectional" in found.methods["token-sparse"]
    assert all("bidirectional" in b["why_not_causal"] for b in found.blocks)
    assert "does not apply" in printed(tiny.decoder(causal=False))


def test_a_mask_that_is_proved_during_inspection_is_reported_as_raised() -> None:
    model = tiny.decoder(causal=False)
    given = next(n for n in model.graph if is_op(n, "Range")).outputs[0]
    axes = [ir.val(f"axes{k}", const_value=ir.tensor(np.array([k]), name=f"axes{k}")) for k in (0, 1)]
    for value in axes:
        value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([1])
        model.graph.register_initializer(value)
    key, query = (ir.node("Unsqueeze", [given, axis]) for axis in axes)
    seen = ir.node("LessOrEqual", [key.outputs[0], query.outputs[0]])
    model.graph.insert_after(given.producer(), [key, query, seen])
    for node in [n for n in model.graph if is_op(n, "Attention")]:
        node.resize_inputs(4)
        node.replace_input_with(3, seen.outputs[0])
    found = inspect(model)
    assert found.raised["causal"] == 2 and found.near_misses == () and all(b["causal"] for b in found.blocks)

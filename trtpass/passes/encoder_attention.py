"""Attention of all tokens to all tokens to ``EncoderAttention``, where its native kernel is there.

ONNX Runtime's Attention wants `[B, H, S, D]` and a mask for every pair; the kernel reads what projections write,
`[B, S, H, D]`, and a bias `[B, S]` of the keys: four Transposes and the spelt-out mask of a shorter stream disappear.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from plugins import all_ops
from trtpass import native
from trtpass.ir import const_ints, constant, dims, float_attr, int_attr, is_op, make_node
from trtpass.op import DOMAIN
from trtpass.passes.contrib import graph_of
from trtpass.passes.native import Choice, keep_body
from trtpass.passes.transposes import is_swap, take_place

F32, I64 = ir.DataType.FLOAT, ir.DataType.INT64
_AXES = [1, 2]  # of a bias [B, S] in a mask [B, 1, 1, S]


def attention_to_encoder(model: ir.Model) -> list[Choice]:
    """Replace what can be replaced, in place, where types and shapes are known; says so for each that was."""
    op = all_ops()["EncoderAttention"]
    nothing: list[tuple[list[Any], ir.Value]] = []  # zeros [B, S] of the main graph, with their shape
    choices: list[Choice] = []
    for node in [n for n in model.graph.all_nodes() if is_op(n, "Attention")]:
        bias = _bias(node)
        types = {port.name: _name(value) for port, value in zip(op.inputs, node.inputs[:3], strict=False)}
        if isinstance(bias, str) or native.fits(op, {**types, "bias": "float32"}) is not True:
            continue  # lowering to the contrib operator says what becomes of it
        bias = bias or _zeros(node, model.graph, nothing)
        old = node.outputs[0]
        made = make_node(
            op.name, [*node.inputs[:3], bias], [(f"{old.name}.native", old.dtype, dims(old))],
            {"scale": float_attr(node, "scale", 0.0)}, domain=DOMAIN, name=str(node.name),
        )  # fmt: skip
        made.metadata_props.update(node.metadata_props)
        ir.convenience.replace_nodes_and_values(graph_of(node), node, [node], [made], [old], [made.outputs[0]])
        keep_body(model, made, op)
        choices.append((str(node.name), "native kernel", f"EncoderAttention in {types['q']}: all tokens see all"))
    if choices:
        _means_of_swapped(model)
    return choices


def _name(value: ir.Value | None) -> str | None:
    return None if value is None or value.dtype is None else str(value.dtype.numpy())


def _bias(node: ir.Node) -> ir.Value | str | None:
    """The bias `[B, S]` of the keys, None without one, or the reason in words why this node is not such attention."""
    inputs = [*node.inputs, *[None] * (7 - len(node.inputs))]
    (q, k, v, mask), cache = inputs[:4], inputs[4:]
    if int_attr(node, "is_causal", 0) or any(value is not None for value in cache):
        return "it is causal or reads a cache"
    if float_attr(node, "softcap", 0.0) or any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        return "its logits are soft-capped, or more than its first output is used"
    shapes = [dims(value) for value in (q, k, v)]
    if any(shape is None or len(shape) != 4 for shape in shapes):
        return f"the ranks of q, k and v are not all 4 ({shapes})"
    lengths = [shape[2] for shape in shapes if shape is not None]
    if lengths[0] is None or lengths[0] != lengths[1] or lengths[0] != lengths[2]:
        return f"q, k and v have {lengths} tokens: not known to be the same"
    if mask is None:
        return None
    spelt = mask.producer()
    column = spelt.inputs[0].producer() if is_op(spelt, "Expand") and spelt.inputs[0] is not None else None
    if not is_op(column, "Unsqueeze") or const_ints(column.inputs[1]) != _AXES or column.inputs[0] is None:
        return f"its mask '{mask.name}' is not one bias for each key"
    bias = column.inputs[0]
    here, batch = dims(bias), (dims(q) or [None])[0]
    if bias.dtype != F32 or here is None or here != [batch, lengths[0]]:
        return f"its bias '{bias.name}' is {bias.dtype} {here}, not float32 {[batch, lengths[0]]}"
    return bias


def _zeros(node: ir.Node, main: ir.Graph, made: list[tuple[list[Any], ir.Value]]) -> ir.Value:
    """No bias `[B, S]`, one for all nodes of the main graph whose shape is the same."""
    shape = [(dims(node.inputs[0]) or [])[axis] for axis in (0, 2)]
    graph = graph_of(node)
    for known, value in made:
        if graph is main and known == shape and None not in shape:
            return value
    name, q = f"{node.name}.bias", node.inputs[:1]
    swap = None if q[0] is None else q[0].producer()
    at = 2  # the axis of the tokens
    if is_swap(swap) and swap is not None:
        q, at = swap.inputs[:1], 1  # so that the Transpose can go
    batch = make_node("Shape", q, [(f"{name}.batch", I64, [1])], {"start": 0, "end": 1})
    tokens = make_node("Shape", q, [(f"{name}.tokens", I64, [1])], {"start": at, "end": at + 1})
    both = make_node("Concat", [batch.outputs[0], tokens.outputs[0]], [(f"{name}.shape", I64, [2])], {"axis": 0})
    zero = constant(main, "encoder_attention.zero", np.array(0, np.float32))
    zeros = make_node("Expand", [zero, both.outputs[0]], [(name, F32, shape)])
    graph.insert_before(node, [batch, tokens, both, zeros])
    if graph is main:
        made.append((shape, zeros.outputs[0]))
    return zeros.outputs[0]


def _means_of_swapped(model: ir.Model) -> None:
    """A mean over the heads of swapped keys is one over axis 2 of the keys as they were: ToMe's metric."""
    for node in [n for n in model.graph.all_nodes() if is_op(n, "ReduceMean")]:
        swap = None if node.inputs[0] is None else node.inputs[0].producer()
        if not is_swap(swap) or swap is None or len(node.inputs) < 2 or const_ints(node.inputs[1]) != [1]:
            continue
        if int_attr(node, "keepdims", 1):
            continue
        axis = constant(model.graph, "encoder_attention.heads", np.array([2], np.int64))
        old = node.outputs[0]
        mean = make_node("ReduceMean", [swap.inputs[0], axis], [(f"{old.name}.heads", old.dtype, dims(old))],
                         {"keepdims": 0}, name=str(node.name))  # fmt: skip
        graph_of(node).insert_before(node, mean)
        take_place(old, mean.outputs[0])
        graph_of(node).remove(node, safe=True)

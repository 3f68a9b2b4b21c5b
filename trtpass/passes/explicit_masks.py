"""Attention over a static cache for TensorRT: the number of valid keys becomes an explicit boolean mask.

TensorRT's ONNX parser ignores ``nonpad_kv_seqlen`` of Attention without a word and takes ``is_causal`` as aligned to
the top left, so a decode graph would attend to the wrong keys. The mask says the same as the standard does:

* causal: query t of T sees key j iff ``j <= nonpad[b] - T + t`` (bottom right; nonpad = past + T in a decode graph);
* not causal: every query sees key j iff ``j < nonpad[b]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from trtpass.anchors import Anchors
from trtpass.errors import InputError
from trtpass.ir import constant, dims, int_attr, is_op, make_node, tidy
from trtpass.passes import Pass, PassResult

NONPAD = 6  # index of Attention's input nonpad_kv_seqlen


def explicit_masks(model: ir.Model) -> int:
    """Replace ``nonpad_kv_seqlen`` by a mask bool ``[B, 1, T, capacity]``, one for all layers, in place.

    Returns:
        How many Attention nodes were changed. Those without nonpad_kv_seqlen stay as they are.

    Raises:
        InputError: a symbolic capacity, or a mask beside nonpad_kv_seqlen.
    """
    masks: dict[tuple[ir.Value, bool, int, object], ir.Value] = {}
    changed = 0
    for node in list(model.graph):
        nonpad = node.inputs[NONPAD] if is_op(node, "Attention") and len(node.inputs) > NONPAD else None
        if nonpad is None:
            continue
        q, k = node.inputs[0], node.inputs[1]
        shapes = dims(q), dims(k)
        if q is None or shapes[0] is None or shapes[1] is None or len(shapes[0]) != 4 or len(shapes[1]) != 4:
            raise InputError(
                f"Attention '{node.name}' has q {shapes[0]} and k {shapes[1]}", "4-D q and k of known rank"
            )
        capacity, tokens = shapes[1][2], shapes[0][2]
        if not isinstance(capacity, int):
            raise InputError(
                f"the cache of Attention '{node.name}' has the symbolic capacity '{capacity}'",
                "a fixed number of slots: TensorRT needs the length of a static cache",
                "insert the cache with capacity=N",
            )
        if any(v is not None for v in node.inputs[3:NONPAD]):
            raise InputError(
                f"Attention '{node.name}' has a mask or a past beside nonpad_kv_seqlen", "nonpad_kv_seqlen alone"
            )
        causal = bool(int_attr(node, "is_causal", 0))
        key = (nonpad, causal, capacity, tokens if tokens is not None else node)
        if key not in masks:
            masks[key] = _mask(model.graph, node, q, nonpad, capacity, causal, f"mask.{len(masks)}")
        node.resize_inputs(4)
        node.replace_input_with(3, masks[key])
        node.attributes.pop("is_causal", None)
        changed += 1
    if changed:
        tidy(model)
    return changed


def _mask(
    graph: ir.Graph, before: ir.Node, q: ir.Value, nonpad: ir.Value, capacity: int, causal: bool, name: str
) -> ir.Value:
    """The mask bool ``[B, 1, T, capacity]``, inserted before a node."""
    int32, int64, boolean = ir.DataType.INT32, ir.DataType.INT64, ir.DataType.BOOL
    keys = constant(graph, f"mask.keys.{capacity}", np.arange(capacity, dtype=np.int32).reshape(1, 1, 1, capacity))
    row = constant(graph, "mask.row", np.array([-1, 1, 1, 1], np.int64))
    batch = (dims(nonpad) or [None])[0]
    rows = make_node("Reshape", [nonpad, row], [(f"{name}.rows", int64, [batch, 1, 1, 1])])
    valid = make_node("Cast", rows.outputs, [(f"{name}.valid", int32, [batch, 1, 1, 1])], {"to": int(int32)})
    tokens = (dims(q) or [None] * 4)[2]
    size = make_node("Shape", [q], [(f"{name}.size", int64, [1])], {"start": 2, "end": 3})
    nodes = [rows, valid, size]
    if causal:
        column = constant(graph, "mask.column", np.array([1, 1, -1, 1], np.int64))
        zero, one = (constant(graph, f"mask.int{i}", np.array(i, np.int32)) for i in (0, 1))
        flat = make_node("Squeeze", size.outputs, [(f"{name}.flat", int64, [])])
        count = make_node("Cast", flat.outputs, [(f"{name}.count", int32, [])], {"to": int(int32)})
        ranged = make_node("Range", [zero, count.outputs[0], one], [(f"{name}.range", int32, [tokens])])
        query = make_node("Reshape", [ranged.outputs[0], column], [(f"{name}.query", int32, [1, 1, tokens, 1])])
        past = make_node("Sub", [valid.outputs[0], count.outputs[0]], [(f"{name}.past", int32, [batch, 1, 1, 1])])
        last = make_node("Add", [past.outputs[0], query.outputs[0]], [(f"{name}.last", int32, [batch, 1, tokens, 1])])
        visible = make_node("LessOrEqual", [keys, last.outputs[0]], [(name, boolean, [batch, 1, tokens, capacity])])
        nodes += [flat, count, ranged, query, past, last, visible]
    else:
        ones = constant(graph, "mask.ones", np.ones(1, np.int64))
        lone = make_node("Less", [keys, valid.outputs[0]], [(f"{name}.lone", boolean, [batch, 1, 1, capacity])])
        shape = make_node("Concat", [ones, ones, size.outputs[0], ones], [(f"{name}.shape", int64, [4])], {"axis": 0})
        visible = make_node(
            "Expand", [lone.outputs[0], shape.outputs[0]], [(name, boolean, [batch, 1, tokens, capacity])]
        )
        nodes += [lone, shape, visible]
    graph.insert_before(before, nodes)
    return visible.outputs[0]


class ExplicitMasks(Pass):
    """``explicit_masks`` as a step of a pipeline."""

    name = "explicit-masks"
    summary = "valid lengths of a static cache as an explicit mask, for TensorRT"
    source = "ONNX Attention-24; TensorRT's parser"
    method = False

    @dataclass(frozen=True)
    class NoOptions:
        """None."""

    Options: ClassVar[type] = NoOptions

    def requires(self, model: ir.Model, anchors: Anchors) -> None:
        """Nothing: a graph without a cache stays as it is."""

    def call(self, model: ir.Model, anchors: Anchors) -> PassResult:
        changed = explicit_masks(model)
        misses = () if changed else ("no Attention has nonpad_kv_seqlen",)
        return PassResult(self.name, modified=changed > 0, near_misses=misses)

"""Raise rotary position embeddings (arXiv 2104.09864) of the rotate-half kind, and give positions a batch axis.

``x * cos + concat(-x[D/2:], x[:D/2]) * sin`` with ``cos = cos(concat(f, f)) * c`` becomes
``RotaryEmbedding(x [B, N, S, D], cos [B, S, D/2], sin [B, S, D/2])``, where ``f [B, S, D/2]`` are the angles.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from trtpass.ir import const_ints, const_scalar, constant, dims, int_attr, is_op, make_node


class _NotRotary(Exception):
    pass


def raise_rotary(graph: ir.Graph) -> tuple[int, list[str]]:
    """Replace each rotate-half embedding by RotaryEmbedding; afterwards one ``[B, S]`` value holds all positions."""
    applied, near = 0, []
    halves: dict[int, ir.Value] = {}
    for node in list(graph):
        if is_op(node, "RotaryEmbedding"):
            if reason := _widen(graph, node):
                near.append(f"RotaryEmbedding '{node.name}': {reason}")
            continue
        if not is_op(node, "Concat") or (x := _rotated(node)) is None:
            continue
        try:
            _rewrite(graph, node, x, halves)
            applied += 1
        except _NotRotary as reason:
            near.append(f"rotary embedding at '{node.name}': {reason}")
    return applied, near


def _widen(graph: ir.Graph, rope: ir.Node) -> str:
    """Give cos and sin ``[1, S, D/2]`` of a ready RotaryEmbedding the batch size that its definition asks for."""
    if len(rope.inputs) < 3 or (len(rope.inputs) > 3 and rope.inputs[3] is not None):
        return ""
    for cache in rope.inputs[1:3]:
        trig = None if cache is None else cache.producer()
        while is_op(trig, "Mul", "Cast") and trig.inputs[0] is not None:
            trig = trig.inputs[0].producer()
        if cache is None or not is_op(trig, "Cos", "Sin") or trig.inputs[0] is None:
            if (shape := dims(cache)) is not None and shape[0] == 1:
                return f"'{cache.name if cache else None}' has batch size 1 and is not made by Cos or Sin"
            continue
        angles = dims(trig.inputs[0])
        if angles is None or len(angles) != 3 or angles[0] != 1:
            continue
        try:
            batch, sequence = _give_batch(graph, trig.inputs[0])
        except _NotRotary as reason:
            return str(reason)
        for value in (*trig.outputs, cache):
            value.shape = ir.Shape([batch, sequence, angles[2]])
            value.type = value.type or (None if rope.inputs[0] is None else rope.inputs[0].type)
    return ""


def _rotated(concat: ir.Node) -> ir.Value | None:
    """x of ``concat(-second half of x, first half of x)``; None if the node is something else."""
    if len(concat.inputs) != 2 or any(v is None for v in concat.inputs):
        return None
    negative = concat.inputs[0].producer()  # type: ignore[union-attr]
    first = concat.inputs[1].producer()  # type: ignore[union-attr]
    second = negative.inputs[0].producer() if is_op(negative, "Neg") and negative.inputs[0] is not None else None
    if first is None or second is None or first.inputs[0] is not second.inputs[0]:
        return None
    x = first.inputs[0]
    shape = dims(x)
    if shape is None or not isinstance(shape[-1], int) or int_attr(concat, "axis", -1) not in (-1, len(shape) - 1):
        return None
    half = shape[-1] // 2
    if is_op(first, "Slice") and is_op(second, "Slice"):
        ok = _slice_of(first, len(shape)) == (0, half) and _slice_of(second, len(shape), shape[-1]) == (half, shape[-1])
    else:  # Split(x) -> (first, second), one node
        ok = is_op(first, "Split") and first is second and list(first.outputs) == [concat.inputs[1], negative.inputs[0]]  # type: ignore[union-attr]
    return x if ok else None


def _slice_of(node: ir.Node, rank: int, size: int | None = None) -> tuple[int, int] | None:
    parts = [const_ints(v) for v in node.inputs[1:]]
    if len(parts) < 3 or any(p is None or len(p) != 1 for p in parts) or parts[2] not in ([-1], [rank - 1]):
        return None
    if len(parts) > 3 and parts[3] != [1]:
        return None
    start, end = parts[0][0], parts[1][0]  # type: ignore[index]
    return start, min(end, size) if size is not None else end


def _rewrite(graph: ir.Graph, concat: ir.Node, x: ir.Value, halves: dict[int, ir.Value]) -> None:
    by_sin = _only(concat.outputs[0], "Mul")
    add = None if by_sin is None else _only(by_sin.outputs[0], "Add")
    if by_sin is None or add is None:
        raise _NotRotary("the rotated half is not multiplied by sin and added")
    by_cos = next((v.producer() for v in add.inputs if v is not None and v is not by_sin.outputs[0]), None)
    if not is_op(by_cos, "Mul") or not any(v is x for v in by_cos.inputs):
        raise _NotRotary("x is not multiplied by cos")
    sin = next(v for v in by_sin.inputs if v is not concat.outputs[0])
    cos = next(v for v in by_cos.inputs if v is not x)
    shape = dims(x)
    if shape is None or len(shape) != 4 or not isinstance(shape[1], int):
        raise _NotRotary(f"x has shape {shape}, expected [B, heads, S, D]")
    caches = [_half(graph, value, kind, halves) for value, kind in ((cos, "Cos"), (sin, "Sin"))]
    out = add.outputs[0]
    rope = make_node("RotaryEmbedding", [x, *caches], [(f"{out.name}_rope", out.dtype, out.shape)], {"interleaved": 0})
    ir.convenience.replace_nodes_and_values(graph, add, [add], [rope], [out], [rope.outputs[0]])


def _only(value: ir.Value, op_type: str) -> ir.Node | None:
    consumers = list(value.consumers())
    return consumers[0] if len(consumers) == 1 and is_op(consumers[0], op_type) else None


def _half(graph: ir.Graph, value: ir.Value | None, kind: str, halves: dict[int, ir.Value]) -> ir.Value:
    """``kind(f) * c`` of shape ``[B, S, D/2]`` for a value that is ``Unsqueeze(kind(concat(f, f)) * c, 1)``."""
    if value is None:
        raise _NotRotary("an absent input")
    if id(value) in halves:
        return halves[id(value)]
    key, scale, dtype = id(value), 1.0, value.dtype
    node = value.producer()
    if not is_op(node, "Unsqueeze") or const_ints(node.inputs[1]) not in ([1], [-3]):
        raise _NotRotary(f"{kind.lower()} '{value.name}' is not broadcast over heads by Unsqueeze on axis 1")
    node = node.inputs[0].producer()  # type: ignore[union-attr]
    while is_op(node, "Mul", "Cast"):
        if node.op_type == "Mul":
            factor = const_scalar(node.inputs[1])
            if factor is None:
                raise _NotRotary(f"{kind.lower()} is scaled by something that is not a constant")
            scale *= float(factor)
        node = node.inputs[0].producer()  # type: ignore[union-attr]
    if (ready := _doubled(node)) is not None and scale == 1.0 and ready.dtype == dtype:
        halves[key] = ready  # put together from several kinds of positions (Qwen2-VL), each with a Cos of its own
        return ready
    if not is_op(node, kind):
        raise _NotRotary(f"no {kind} above '{value.name}'")
    doubled = node.inputs[0].producer()  # type: ignore[union-attr]
    if not is_op(doubled, "Concat") or len(doubled.inputs) != 2 or doubled.inputs[0] is not doubled.inputs[1]:
        raise _NotRotary("the angles are not two equal halves")
    angles = doubled.inputs[0]
    if angles is None or (shape := dims(angles)) is None or len(shape) != 3:
        raise _NotRotary("the angles are not known to be [B, S, D/2]")
    batch, sequence = _give_batch(graph, angles)
    half = [batch, sequence, shape[2]]
    made = make_node(kind, [angles], [(f"{value.name}_half", ir.DataType.FLOAT, half)])
    new, last = [made], made.outputs[0]
    if scale != 1.0:
        factor_value = constant(graph, f"rotary_scale_{scale!r}", np.array(scale, np.float32))
        new.append(make_node("Mul", [last, factor_value], [(f"{value.name}_scaled", ir.DataType.FLOAT, half)]))
        last = new[-1].outputs[0]
    if dtype not in (None, ir.DataType.FLOAT):
        new.append(make_node("Cast", [last], [(f"{value.name}_cast", dtype, half)], {"to": int(dtype)}))
        last = new[-1].outputs[0]
    graph.insert_after(node, new)
    halves[key] = last
    return last


def _doubled(node: ir.Node | None) -> ir.Value | None:
    """c ``[B, S, D/2]`` of ``concat(c, c)`` on the last axis."""
    if not is_op(node, "Concat") or len(node.inputs) != 2 or node.inputs[0] is not node.inputs[1]:
        return None
    shape = dims(node.inputs[0])
    last = int_attr(node, "axis", 0) in (-1, 2)
    return node.inputs[0] if shape is not None and len(shape) == 3 and shape[0] != 1 and last else None


def _give_batch(graph: ir.Graph, angles: ir.Value) -> tuple[Any, Any]:
    """Give the positions above ``angles`` a batch axis, ``[1, S]`` to ``[B, S]``, so that each row can have an offset.

    Returns the sizes (B, S). Between positions and angles only operators that broadcast may stand.
    """
    tokens = next(
        (v for v in graph.inputs if v.dtype == ir.DataType.INT64 and v.shape is not None and len(v.shape) == 2), None
    )
    if tokens is None:
        raise _NotRotary("no [batch, sequence] token input to take the batch size from")
    batch, sequence = dims(tokens)  # type: ignore[misc]
    path, positions = _path_to_positions(angles)
    shape = dims(positions)
    if shape is not None and shape[0] == batch:
        return batch, sequence
    if shape is None or shape[0] != 1:
        raise _NotRotary(f"positions '{positions.name}' have shape {shape}, expected [1, S] or [B, S]")
    size = make_node("Shape", [tokens], [("position_ids_shape", ir.DataType.INT64, [2])])
    spread = make_node("Expand", [positions, size.outputs[0]], [("position_ids", positions.dtype, [batch, sequence])])
    first = next(n for n in graph if n in path)
    graph.insert_before(first, [size, spread])
    for node in path:
        for i, value in enumerate(node.inputs):
            if value is positions:
                node.replace_input_with(i, spread.outputs[0])
        for out in node.outputs:
            if out.shape is not None and len(out.shape) >= 2 and out.shape[0] == 1:
                out.shape = ir.Shape([batch, *list(out.shape)[1:]])
    return batch, sequence


def _path_to_positions(angles: ir.Value) -> tuple[list[ir.Node], ir.Value]:
    """Nodes from the angles up to the integer positions, and the positions."""
    path: list[ir.Node] = []
    value = angles
    for _ in range(16):
        if value.dtype in (ir.DataType.INT64, ir.DataType.INT32) and value.shape is not None and len(value.shape) == 2:
            return path, value
        node = value.producer()
        if not is_op(node, "Mul", "MatMul", "Cast", "Unsqueeze", "Transpose"):
            raise _NotRotary(f"{'no node' if node is None else node.op_type} between positions and angles")
        path.append(node)
        varying = [
            v
            for v in node.inputs[: 2 if node.op_type in ("Mul", "MatMul") else 1]
            if v is not None and v.const_value is None
        ]
        if len(varying) != 1:
            raise _NotRotary(f"{node.op_type} '{node.name}' has {len(varying)} varying inputs")
        value = varying[0]
    raise _NotRotary("no integer positions within 16 nodes above the angles")

"""Raise decomposed norms over the last axis: RMS norm (arXiv 1910.07467) and layer norm (arXiv 1607.06450).

RMS norm is ``x * rsqrt(mean(x^2) + eps) * w``; layer norm is the same of ``x - mean(x)``, with an optional bias.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trtpass.ir import const_ints, const_scalar, constant, dims, int_attr, is_op, make_node


def raise_layer_norm(graph: ir.Graph) -> tuple[int, list[str]]:
    """Replace each decomposed layer norm over the last axis by LayerNormalization (statistics in float32)."""
    applied, near = 0, []
    for node in list(graph):
        centred = _squared(node.inputs[0]) if is_op(node, "ReduceMean") else None
        if centred is None or (x := _centred(centred)) is None:
            continue
        reason = _rewrite(graph, node, centred, x)
        if reason:
            near.append(f"layer norm at '{node.name}': {reason}")
        else:
            applied += 1
    return applied, near


def raise_rms_norm(graph: ir.Graph) -> tuple[int, list[str]]:
    """Replace each decomposed RMS norm over the last axis by RMSNormalization (statistics in float32)."""
    applied, near = 0, []
    for node in list(graph):
        x = _squared(node.inputs[0]) if is_op(node, "ReduceMean") else None
        if x is not None and _centred(x) is None:
            reason = _rewrite(graph, node, x)
            if reason:
                near.append(f"RMS norm at '{node.name}': {reason}")
            else:
                applied += 1
    return applied, near


def _squared(value: ir.Value | None) -> ir.Value | None:
    """x of ``x * x`` or ``x ** 2``."""
    node = None if value is None else value.producer()
    if is_op(node, "Mul") and node.inputs[0] is node.inputs[1]:
        return node.inputs[0]
    if is_op(node, "Pow") and const_scalar(node.inputs[1]) == 2:
        return node.inputs[0]
    return None


def _only(value: ir.Value, *op_types: str) -> ir.Node | None:
    consumers = list(value.consumers())
    return consumers[0] if len(consumers) == 1 and is_op(consumers[0], *op_types) else None


def _centred(value: ir.Value) -> ir.Value | None:
    """x of ``x - mean(x)`` over the last axis, where the mean is a ReduceMean that keeps the axis."""
    node = value.producer()
    if not is_op(node, "Sub") or node.inputs[0] is None or node.inputs[1] is None:
        return None
    mean = node.inputs[1].producer()
    return node.inputs[0] if is_op(mean, "ReduceMean") and mean.inputs[0] is node.inputs[0] else None


def _not_last_axis(mean: ir.Node) -> str:
    rank = None if (shape := dims(mean.inputs[0])) is None else len(shape)
    axes = const_ints(mean.inputs[1]) if len(mean.inputs) > 1 else None
    if axes not in ([-1], [rank - 1] if rank else [-1]) or int_attr(mean, "keepdims", 1) != 1:
        return f"the mean is over axes {axes}, not the last one"
    return ""


def _rewrite(graph: ir.Graph, mean: ir.Node, x: ir.Value, centred_from: ir.Value | None = None) -> str:
    """Replace one norm. ``x`` is what is squared; for a layer norm that is ``centred_from`` less its mean."""
    if reason := _not_last_axis(mean):
        return reason
    add = _only(mean.outputs[0], "Add")
    epsilon = None if add is None else next((e for v in add.inputs if (e := const_scalar(v)) is not None), None)
    if add is None or epsilon is None:
        return "no constant epsilon is added to the mean"
    scaled = _normalised(add.outputs[0], x, centred_from)
    if isinstance(scaled, str):
        return scaled
    value = scaled.outputs[0]
    source = x if centred_from is None else centred_from
    if centred_from is not None:
        for node in (v.producer() for v in (*scaled.inputs, x) if v is not None):
            inner = node.inputs[1].producer() if is_op(node, "Sub") and node.inputs[1] is not None else None
            if inner is not None and (reason := _not_last_axis(inner)):
                return reason
    cast = _only(value, "Cast")
    upcast = source.producer()
    if cast is not None and is_op(upcast, "Cast") and upcast.inputs[0] is not None:
        value, source = cast.outputs[0], upcast.inputs[0]  # half precision: cast up before the statistics, down after
    weigh = _only(value, "Mul")
    weight = None if weigh is None else next((v for v in weigh.inputs if v is not value), None)
    if not _is_row(weight):
        weigh = weight = None
    if weigh is None and centred_from is None:
        return "no 1-D constant weight after the normalisation"
    last = weigh if weigh is not None else value.producer()
    shift = _only(last.outputs[0], "Add") if centred_from is not None and last is not None else None
    bias = None if shift is None or last is None else next((v for v in shift.inputs if v is not last.outputs[0]), None)
    if not _is_row(bias):
        shift = bias = None
    last = shift if shift is not None else last
    if last is None:
        return "nothing computes the normalised tensor"
    if weight is None:  # a layer norm without weights
        shape = dims(source)
        if shape is None or not isinstance(shape[-1], int) or source.dtype != ir.DataType.FLOAT:
            return "no weight, and a last axis of unknown size or another type than float32"
        weight = constant(graph, f"ones_{shape[-1]}", np.ones(shape[-1], np.float32))
    out = last.outputs[0]
    kind, suffix = ("RMSNormalization", "rms") if centred_from is None else ("LayerNormalization", "layer_norm")
    norm = make_node(
        kind,
        [source, weight] + ([bias] if bias is not None else []),
        [(f"{out.name}_{suffix}", out.dtype, out.shape)],
        {"axis": -1, "epsilon": float(epsilon), "stash_type": 1},
    )
    ir.convenience.replace_nodes_and_values(graph, last, [last], [norm], [out], [norm.outputs[0]])
    return ""


def _normalised(variance: ir.Value, x: ir.Value, centred_from: ir.Value | None) -> ir.Node | str:
    """The node that gives ``x / sqrt(variance)``, as Div, or as Mul by Reciprocal, by 1/sqrt or by a power of -0.5."""
    power = _only(variance, "Pow")
    root = _only(variance, "Sqrt")
    if root is None and not (power is not None and const_scalar(power.inputs[1]) == -0.5):
        return "no square root after epsilon"
    inverse = _only(root.outputs[0], "Reciprocal", "Div") if root is not None else power

    def is_x(value: ir.Value | None) -> bool:
        return value is x or (centred_from is not None and value is not None and _centred(value) is centred_from)

    if is_op(inverse, "Reciprocal", "Pow") or (is_op(inverse, "Div") and const_scalar(inverse.inputs[0]) == 1):
        scaled = _only(inverse.outputs[0], "Mul")
    else:
        scaled = inverse if inverse is not None and is_x(inverse.inputs[0]) else None
    if scaled is None or not any(is_x(v) for v in scaled.inputs):
        return "x is not multiplied by the inverse root mean square"
    return scaled


def _is_row(value: ir.Value | None) -> bool:
    """A constant ``[E]``."""
    return value is not None and value.const_value is not None and value.shape is not None and len(value.shape) == 1

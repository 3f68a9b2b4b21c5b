"""Raise decomposed RMS normalisation: ``x * rsqrt(mean(x^2) + eps) * w`` (arXiv 1910.07467)."""

from __future__ import annotations

import onnx_ir as ir

from trtpass.ir import const_ints, const_scalar, int_attr, is_op, make_node


def raise_rms_norm(graph: ir.Graph) -> tuple[int, list[str]]:
    """Replace each decomposed RMS norm over the last axis by RMSNormalization (statistics in float32)."""
    applied, near = 0, []
    for node in list(graph):
        if is_op(node, "ReduceMean") and (x := _squared(node.inputs[0])) is not None:
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


def _rewrite(graph: ir.Graph, mean: ir.Node, x: ir.Value) -> str:
    rank = None if x.shape is None else len(x.shape)
    axes = const_ints(mean.inputs[1]) if len(mean.inputs) > 1 else None
    if axes not in ([-1], [rank - 1] if rank else [-1]) or int_attr(mean, "keepdims", 1) != 1:
        return f"the mean is over axes {axes}, not the last one"
    add = _only(mean.outputs[0], "Add")
    epsilon = None if add is None else next((e for v in add.inputs if (e := const_scalar(v)) is not None), None)
    if add is None or epsilon is None:
        return "no constant epsilon is added to the mean"
    root = _only(add.outputs[0], "Sqrt")
    if root is None:
        return "no square root after epsilon"
    inverse = _only(root.outputs[0], "Reciprocal", "Div")
    if is_op(inverse, "Reciprocal"):
        scaled = _only(inverse.outputs[0], "Mul")
    else:
        scaled = inverse if inverse is not None and inverse.inputs[0] is x else None
    if scaled is None or not any(v is x for v in scaled.inputs):
        return "x is not multiplied by the inverse root mean square"
    value = scaled.outputs[0]
    source: ir.Value | None = x
    cast = _only(value, "Cast")
    upcast = x.producer()
    if cast is not None and is_op(upcast, "Cast"):  # half precision: x is cast up before the statistics and down after
        value, source = cast.outputs[0], upcast.inputs[0]
    weigh = _only(value, "Mul")
    weight = None if weigh is None else next((v for v in weigh.inputs if v is not value), None)
    if weigh is None or weight is None or weight.const_value is None or weight.shape is None or len(weight.shape) != 1:
        return "no 1-D constant weight after the normalisation"
    out = weigh.outputs[0]
    norm = make_node(
        "RMSNormalization",
        [source, weight],
        [(f"{out.name}_rms", out.dtype, out.shape)],
        {"axis": -1, "epsilon": float(epsilon), "stash_type": 1},
    )
    ir.convenience.replace_nodes_and_values(graph, weigh, [weigh], [norm], [out], [norm.outputs[0]])
    return ""

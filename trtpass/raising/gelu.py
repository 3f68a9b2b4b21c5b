"""Raise decomposed GELU (arXiv 1606.08415): ``x/2 * (1 + erf(x/sqrt(2)))``, and its approximation by tanh."""

from __future__ import annotations

import math

import onnx_ir as ir

from trtpass.ir import const_scalar, is_op, make_node


def raise_gelu(graph: ir.Graph) -> tuple[int, list[str]]:
    """Replace each decomposed GELU by Gelu; the factors may stand in any order. ``x * sigmoid(1.702 x)`` stays."""
    applied = 0
    for node in list(graph):
        x = _argument(node.inputs[0]) if is_op(node, "Erf") else _cubic(node.inputs[0]) if is_op(node, "Tanh") else None
        if x is None or (last := _product(node, x)) is None:
            continue
        out = last.outputs[0]
        attributes = {"approximate": "none" if is_op(node, "Erf") else "tanh"}
        gelu = make_node("Gelu", [x], [(f"{out.name}_gelu", out.dtype, out.shape)], attributes)
        ir.convenience.replace_nodes_and_values(graph, last, [last], [gelu], [out], [gelu.outputs[0]])
        applied += 1
    return applied, []


def _scaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """The tensor, and the constant that it is multiplied by (1 where there is none)."""
    node = None if value is None else value.producer()
    if is_op(node, "Mul", "Div"):
        factor = const_scalar(node.inputs[1])
        if factor:
            return node.inputs[0], float(factor) if node.op_type == "Mul" else 1.0 / float(factor)
        if node.op_type == "Mul" and (factor := const_scalar(node.inputs[0])):
            return node.inputs[1], float(factor)
    return value, 1.0


def _close(number: float, wanted: float) -> bool:
    return abs(number - wanted) < 1e-3 * abs(wanted)  # half precision rounds constants


def _argument(value: ir.Value | None) -> ir.Value | None:
    x, factor = _scaled(value)
    return x if _close(factor, math.sqrt(0.5)) else None


def _cubic(value: ir.Value | None) -> ir.Value | None:
    """x of ``sqrt(2/pi) * (x + 0.044715 * x^3)``."""
    inner, factor = _scaled(value)
    add = None if inner is None else inner.producer()
    if not is_op(add, "Add") or not _close(factor, math.sqrt(2 / math.pi)):
        return None
    for x, other in (tuple(add.inputs), tuple(add.inputs)[::-1]):
        cube, third = _scaled(other)
        if x is None or cube is None or not _close(third, 0.044715):
            continue
        node = cube.producer()
        if is_op(node, "Pow") and node.inputs[0] is x and const_scalar(node.inputs[1]) == 3:
            return x
        if is_op(node, "Mul") and any(v is x for v in node.inputs):
            square = next((v for v in node.inputs if v is not x), None)
            inner_node = None if square is None else square.producer()
            if is_op(inner_node, "Mul") and all(v is x for v in inner_node.inputs):
                return x
    return None


def _product(node: ir.Node, x: ir.Value) -> ir.Node | None:
    """The last Mul of ``x * (1 + f) * 0.5`` in any order, ``f`` the output of ``node``; None if it is not that."""
    add = _only(node.outputs[0])
    if not is_op(add, "Add") or not any(const_scalar(v) == 1 for v in add.inputs):
        return None
    last, half, seen = add, 1.0, False
    for _ in range(2):
        step = _only(last.outputs[0])
        if not is_op(step, "Mul"):
            return None
        side = next((v for v in step.inputs if v is not last.outputs[0]), None)
        factor = const_scalar(side)
        base, inner = _scaled(side)
        if factor is not None:
            half *= float(factor)
        elif side is x:
            seen = True
        elif base is x:
            seen, half = True, half * inner
        else:
            return None
        last = step
        if seen and half == 0.5:
            return last
    return None


def _only(value: ir.Value) -> ir.Node | None:
    consumers = list(value.consumers())
    return consumers[0] if len(consumers) == 1 else None

"""Follow the token axis of a stream through a graph: what may lie on a shorter stream, and where it ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from trtpass.errors import AnchorError
from trtpass.ir import const_ints, dims, int_attr

_UNARY = (
    "Cast",
    "Identity",
    "Neg",
    "Abs",
    "Erf",
    "Exp",
    "Log",
    "Sqrt",
    "Reciprocal",
    "Sigmoid",
    "Tanh",
    "Relu",
    "Gelu",
    "Softplus",
    "Elu",
    "LeakyRelu",
    "HardSigmoid",
    "Clip",
    "Swish",
    "Mish",
    "Softsign",
    "Sin",
    "Cos",
    "CastLike",
)
_BINARY = ("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Where", "Equal", "Greater", "Less")


@dataclass(frozen=True)
class End:
    """Where a stream stops being one row a token: the node, and what it does, in words."""

    node: ir.Node
    words: str


@dataclass(frozen=True)
class Course:
    """Values that carry the stream's tokens, with the axis of each, and where the stream ends."""

    axes: dict[int, int]  # id(value) -> axis
    values: dict[int, ir.Value]
    ends: tuple[End, ...]


def follow(
    graph: ir.Graph,
    start: ir.Value,
    axis: int,
    until: ir.Value | None = None,
    also: Mapping[ir.Value, int] | None = None,
) -> Course:
    """Follow the tokens on ``axis`` of ``start`` in a sorted graph, not beyond ``until``; ``also``: other values that
    have a row for each of them, with its axis."""
    every = {start: axis, **(also or {})}
    axes, values = {id(value): at for value, at in every.items()}, {id(value): value for value in every}
    ends: list[End] = []
    for node in graph:
        if node.domain not in ("", "ai.onnx"):
            if any(v is not None and id(v) in axes and v is not until for v in node.inputs):
                ends.append(End(node, f"it is an operator of domain '{node.domain}'"))
            continue
        carried = [
            (i, axes[id(v)]) for i, v in enumerate(node.inputs) if v is not None and id(v) in axes and v is not until
        ]
        if not carried or node.op_type == "Shape":
            continue
        out = _through(node, carried)
        if isinstance(out, str):
            ends.append(End(node, out))
            continue
        for value, where in zip(node.outputs, out, strict=True):
            if where is not None:
                axes[id(value)], values[id(value)] = where, value
    return Course(axes, values, tuple(ends))


def _rank(value: ir.Value | None) -> int | None:
    shape = dims(value)
    return None if shape is None else len(shape)


def _through(node: ir.Node, carried: list[tuple[int, int]]) -> list[int | None] | str:
    """Axis of the tokens in each output, or why they cannot be followed."""
    first, axis = carried[0]
    kind = node.op_type
    if kind in _UNARY:
        return [axis]
    if kind in _BINARY:
        return _broadcast(node, carried)
    if kind in ("LayerNormalization", "RMSNormalization", "Softmax"):
        rank, over = _rank(node.inputs[0]), int_attr(node, "axis", -1)
        over = over if rank is None or over >= 0 else over + rank
        return [axis] + [None] * (len(node.outputs) - 1) if over > axis else "it normalises over tokens"
    if kind == "MatMul":
        other = node.inputs[1 - first]
        rank = _rank(node.inputs[first])
        if len(carried) > 1 or first != 0 or rank is None or axis >= rank - 1:
            return "it multiplies tokens with each other"
        return [axis] if _rank(other) == 2 or (_rank(other) or 9) <= rank else "the other factor is wider"
    if kind == "Transpose":
        perm = node.attributes.get("perm")
        return [list(perm.value).index(axis)] if perm is not None else "a Transpose without perm"
    if kind == "Reshape":
        return _reshaped(node, axis) if first == 0 else "its shape depends on tokens"
    if kind == "Unsqueeze":
        rank, at = _rank(node.inputs[0]), const_ints(node.inputs[1])
        if rank is None or at is None:
            return "the axes of Unsqueeze are not known"
        new = sorted(a + rank + len(at) if a < 0 else a for a in at)
        for a in new:
            axis += a <= axis
        return [axis]
    if kind in ("Split", "Slice", "Gather", "ReduceMean", "ReduceMax", "ReduceSum", "Squeeze", "Concat"):
        if kind == "Concat" and (len(carried) < len(node.inputs) or any(a != axis for _, a in carried)):
            return "tokens are joined with something else"
        return _along(node, axis)
    if kind == "Attention":
        if any(i > 2 for i, _ in carried):
            return "its mask or cache depends on tokens"
        return (
            [2] if {i for i, _ in carried} == {0, 1, 2} and all(a == 2 for _, a in carried) else "it is cross attention"
        )
    if kind == "RotaryEmbedding":
        return [axis] if first == 0 and len(carried) == 1 else "rotations of another length"
    return f"{kind} is not known to act on each token alone"


def _broadcast(node: ir.Node, carried: list[tuple[int, int]]) -> list[int | None] | str:
    ranks = [_rank(v) for v in node.inputs]
    if any(r is None for r in ranks):
        return "an operand of unknown rank"
    rank = max(r for r in ranks if r is not None)
    places = {axis + rank - ranks[i] for i, axis in carried}  # type: ignore[operator]
    if len(places) != 1:
        return "tokens on two axes meet"
    (place,) = places
    for i, value in enumerate(node.inputs):
        if any(i == j for j, _ in carried):
            continue
        own = place - (rank - ranks[i])  # type: ignore[operator]
        size = 1 if own < 0 else (dims(value) or [])[own]
        if size != 1:
            return f"it meets '{value.name if value else ''}', which has {size} rows of its own"
    return [place]


def _reshaped(node: ir.Node, axis: int) -> list[int | None] | str:
    """Leading axes copied by 0 keep their place; a token axis that is merged or spelt out ends the stream."""
    target = const_ints(node.inputs[1])
    if target is None:
        before, after = dims(node.inputs[0]), dims(node.outputs[0])
        return f"a Reshape from {before} to {after} whose target is computed"
    if len(target) > axis and all(t == 0 for t in target[1 : axis + 1]) and target[0] in (0, -1):
        return [axis]
    return f"a Reshape to {target} spells out or merges the token axis"


def _along(node: ir.Node, axis: int) -> list[int | None] | str:
    rank = _rank(node.inputs[0])
    if rank is None:
        return "its input has no known rank"
    if node.op_type in ("Split", "Concat"):
        given: list[int] | None = [int_attr(node, "axis", 0)]
    elif node.op_type == "Gather":
        given = [int_attr(node, "axis", 0)]
        if node.inputs[1] is not None and _rank(node.inputs[1]) not in (0, 1):
            return "a Gather with a table of indices"
    else:
        given = const_ints(node.inputs[3 if node.op_type == "Slice" else 1]) if len(node.inputs) > 1 else None
    if given is None:
        return "its axes are not known"
    over = {a + rank if a < 0 else a for a in given}
    if axis in over:
        return f"{node.op_type} along the token axis"
    gone = node.op_type == "Squeeze" or (node.op_type == "Gather" and _rank(node.inputs[1]) == 0)
    if node.op_type.startswith("Reduce"):
        gone = int_attr(node, "keepdims", 1) == 0
    shift = sum(a < axis for a in over) if gone else 0
    return [axis - shift] * len(node.outputs)


def need_through(course: Course, target: ir.Value, name: str) -> None:
    """Raise unless the stream reaches ``target`` and ends nowhere before it.

    Raises:
        AnchorError: where it stopped, and why.
    """
    if course.ends or id(target) not in course.axes:
        stop = course.ends[0] if course.ends else None
        raise AnchorError(
            f"pass '{name}': the tokens cannot be followed to '{target.name}'"
            + (f"; they stopped at {stop.node.op_type} '{stop.node.name}': {stop.words}" if stop else ""),
            "a stream on which every node works on each token alone, but attention",
            "choose later layers, or restore=none where the head does not need all tokens",
        )


def resize(course: Course, size: Any) -> None:
    """Give every carrier the new number of tokens in its shape, in place."""
    for key, value in course.values.items():
        shape = dims(value)
        if shape is not None:
            shape[course.axes[key]] = size
            value.shape = ir.Shape(shape)

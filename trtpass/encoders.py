"""What surrounds the token stream of an encoder: where it begins and ends, its special tokens, its grid, its head.

Everything is found by structure, from the residual streams of ``trtpass.anchors``; what was not found is said in words.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from trtpass.anchors import Anchors, AttentionBlock
from trtpass.ir import const_ints, dims, int_attr, is_op

Head = Literal["grid", "cls", "tokens", "pool"]
_ROWWISE = ("LayerNormalization", "RMSNormalization", "Cast", "Identity", "Dropout", "Gelu", "Relu", "Sigmoid", "Tanh")
_ALL_ROWS: tuple[Head, ...] = ("grid", "tokens", "pool", "cls")  # the head that needs the most decides
_LONGEST = 64  # nodes that a search goes through


@dataclass(frozen=True)
class Encoder:
    """An encoder around its residual stream ``[B, S, E]``.

    Args:
        stream_in: the stream before the first block; None where it was not found, see ``why``.
        stream_out: the stream after the last block, before any final norm; None where it was not found, see ``why``.
        tokens: S, None where only the run tells.
        cls: special tokens in front (class token, registers), 0 if none.
        grid: rows and columns of the other tokens, row by row; None with the reason in ``why_no_grid``.
        head: what reads the end of the stream. ``cls``: the first token alone. ``pool``: a mean, sum or maximum over
            the tokens. ``grid``: the tokens as an image. ``tokens``: all of them in their order, or something unknown.
        why: what was found at the end of the stream, in words, or where the search stopped.
    """

    stream_in: ir.Value | None
    stream_out: ir.Value | None
    tokens: int | None
    cls: int
    grid: tuple[int, int] | None
    why_no_grid: str
    head: Head
    why: str


def streams(anchors: Anchors) -> tuple[Anchors, ...]:
    """The anchors of each token stream, in graph order: blocks that follow each other on one residual stream.

    A multimodal graph has one for its vision tower and one for its language model.
    """
    runs: list[list[AttentionBlock]] = []
    for block in anchors.blocks:
        if runs and block.residual_in is not None and runs[-1][-1].mlp_out is block.residual_in:
            runs[-1].append(block)
        else:
            runs.append([block])
    return tuple(dataclasses.replace(anchors, blocks=tuple(run)) for run in runs)


def describe(model: ir.Model, anchors: Anchors) -> Encoder:
    """Describe the encoder that the blocks of ``anchors`` form; with several streams, ask for one of ``streams``."""
    why = _broken(anchors)
    first = anchors.blocks[0].residual_in if anchors.blocks else None
    last = anchors.blocks[-1].mlp_out if anchors.blocks and not why else None
    shape = dims(first)
    tokens = shape[1] if shape is not None and len(shape) == 3 and isinstance(shape[1], int) else None
    cls = 0 if first is None else _special(first)
    grid, why_no_grid = (None, "no stream") if first is None else _patches(first, cls)
    if last is None:
        return Encoder(first, None, tokens, cls, grid, why_no_grid, "tokens", why)
    head, words, seen = _head(last, cls)
    if grid is None and seen is not None:
        grid, why_no_grid = seen, ""
    if grid is not None and tokens is not None and grid[0] * grid[1] != tokens - cls:
        why_no_grid = f"{grid[0]} x {grid[1]} places, but {tokens} tokens with {cls} in front"
        grid = None
    return Encoder(first, last, tokens, cls, grid, "" if grid else why_no_grid, head, words)


def _broken(anchors: Anchors) -> str:
    """Where the stream from block to block ends before the last block, or ""."""
    if not anchors.blocks:
        return "; ".join(anchors.missing) or "no attention block"
    for block, after in zip(anchors.blocks, [*anchors.blocks[1:], None], strict=True):
        if block.mlp_out is None:
            return f"the stream ends in block {block.layer}: {block.why_no_mlp}"
        if after is not None and after.residual_in is not block.mlp_out:
            name = None if after.residual_in is None else after.residual_in.name
            return f"block {after.layer} reads '{name}', not '{block.mlp_out.name}' of block {block.layer}"
    return ""


def _varies(value: ir.Value | None) -> bool:
    """Whether a value depends on the contents of a graph input, and not just on sizes."""
    frontier, seen = [value], set[ir.Value]()
    while frontier:
        now = frontier.pop()
        if now is None or now in seen or now.const_value is not None:
            continue
        seen.add(now)
        node = now.producer()
        if node is None or len(seen) > 4 * _LONGEST:
            return True
        if not is_op(node, "Shape", "Constant"):
            frontier.extend(node.inputs)
    return False


def above(value: ir.Value) -> ir.Value | None:
    """The varying input of a node that changes rows, adds positions or changes the layout; None elsewhere."""
    node = value.producer()
    if is_op(node, *_ROWWISE, "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze"):
        return node.inputs[0]
    if is_op(node, "Add", "Mul", "MatMul"):
        sides = [v for v in node.inputs if _varies(v)]
        return sides[0] if len(sides) == 1 else None
    return None


def _special(value: ir.Value, known: dict[ir.Value, int] | None = None) -> int:
    """How many special tokens stand in front: parts of a Concat along the tokens that come from constants."""
    known = {} if known is None else known
    if value not in known:
        known[value] = 0  # while its inputs are searched: a graph has no cycle, and a search no end but this
        known[value] = _count_special(value, known) if len(known) < _LONGEST else 0
    return known[value]


def _count_special(value: ir.Value, known: dict[ir.Value, int]) -> int:
    node = value.producer()
    if node is None or is_op(node, "Transpose", "Reshape", "Flatten"):
        return 0
    if not is_op(node, "Concat") or int_attr(node, "axis", 0) not in (1, -2):
        up = above(value)
        return 0 if up is None else _special(up, known)
    count = 0
    for part in node.inputs:
        if part is None:
            return count
        cut = sliced(part.producer())
        inner = 0 if cut is None else _special(cut[2], known)
        size = None if (shape := dims(part)) is None or len(shape) != 3 else shape[1]
        if not _varies(part) and isinstance(size, int):
            count += size
        elif cut is not None and cut[0] == 0 < cut[1] <= inner:
            count += cut[1]  # the class token, cut off to put registers behind it
        else:
            return count + (0 if cut is None else max(0, inner - cut[0]))
    return count


def sliced(node: ir.Node | None) -> tuple[int, int, ir.Value] | None:
    """(start, end, x) of a Slice along the tokens of x ``[B, S, E]``."""
    if not is_op(node, "Slice") or len(node.inputs) < 4 or node.inputs[0] is None:
        return None
    starts, ends, axes = (const_ints(v) for v in node.inputs[1:4])
    steps = const_ints(node.inputs[4]) if len(node.inputs) > 4 else [1]
    if axes not in ([1], [-2]) or steps != [1] or not starts or not ends:
        return None
    return starts[0], ends[0], node.inputs[0]


def _patches(value: ir.Value, cls: int) -> tuple[tuple[int, int] | None, str]:
    """Rows and columns of the convolution that made the tokens, or why they are not known."""
    for _ in range(_LONGEST):
        node = value.producer()
        if is_op(node, "Conv"):
            shape = dims(node.outputs[0])
            if shape is None or len(shape) != 4:
                what = "over one axis" if shape is not None and len(shape) == 3 else f"to {_sizes(shape)}"
                return None, f"the tokens come from a convolution {what} ('{node.name}'): no rows and columns"
            if not (isinstance(shape[2], int) and isinstance(shape[3], int)):
                return None, f"rows and columns of '{node.name}' are only known at run time: {_sizes(shape)}"
            return (shape[2], shape[3]), ""
        if is_op(node, "Concat") and cls:
            part = next((v for v in reversed(node.inputs) if _varies(v)), None)
            cut = None if part is None else sliced(part.producer())
            up = cut[2] if cut is not None else part
        elif is_op(node, "Transpose") and not _keeps_order(node):
            return None, f"'{node.name}' swaps rows and columns"
        else:
            up = above(value)
        if up is None:
            name = f"the input '{value.name}'" if node is None else f"{node.op_type} '{node.name}'"
            return None, f"no convolution above the token stream: the search stopped at {name}"
        value = up
    return None, f"no convolution within {_LONGEST} nodes above the token stream"


def _sizes(shape: list[object] | None) -> str:
    return "an unknown shape" if shape is None else f"[{', '.join(map(str, shape))}]"


def _keeps_order(node: ir.Node) -> bool:
    """Whether a Transpose leaves rows before columns, as from ``[B, E, h, w]`` to ``[B, h, w, E]``."""
    perm = list(node.attributes["perm"].value) if "perm" in node.attributes else []
    return len(perm) != 4 or perm.index(2) < perm.index(3)


def _head(last: ir.Value, cls: int) -> tuple[Head, str, tuple[int, int] | None]:
    """What reads the end of the stream: kind, words, and the grid if the head makes one."""
    found: list[tuple[Head, str, tuple[int, int] | None]] = []
    frontier, seen = [last], set[ir.Value]()
    while frontier:
        value = frontier.pop()
        if value in seen:
            continue
        seen.add(value)
        if value.is_graph_output():
            found.append(("tokens", f"the graph output '{value.name}' has all tokens", None))
        for node in value.consumers():
            step = _step(node, value, cls)
            if isinstance(step, ir.Value):
                frontier.append(step)
            elif step is not None:
                found.append(step)
        if len(seen) > _LONGEST:
            found.append(("tokens", f"no end of the head within {_LONGEST} nodes after '{last.name}'", None))
            break
    if not found:
        return "tokens", f"nothing reads '{last.name}'", None
    return min(found, key=lambda item: _ALL_ROWS.index(item[0]))


def _step(
    node: ir.Node, value: ir.Value, cls: int
) -> ir.Value | tuple[Head, str, tuple[int, int] | None] | None:  # fmt: skip
    """What one consumer of the rows does: the value that has the rows on, the head, or None (sizes only)."""
    at = f"{node.op_type} '{node.name}'"
    if is_op(node, "Shape"):
        return None
    shape, out = dims(value), dims(node.outputs[0])
    layout = shape is not None and out is not None
    if is_op(node, "Gather") and node.inputs[0] is value and int_attr(node, "axis", 0) in (1, -2):
        index = const_ints(node.inputs[1])
        if index == [0]:
            return "cls", f"{at} takes token 0", None
        return "tokens", f"{at} takes tokens {index if index is not None else 'by index'}", None
    if is_op(node, "Slice") and (cut := sliced(node)) is not None:
        if (cut[0], cut[1]) == (0, 1):
            return "cls", f"{at} takes token 0", None
        if cut[0] == cls and cut[1] >= 2**31 - 1:
            return node.outputs[0]
        return "tokens", f"{at} takes tokens {cut[0]} to {cut[1]}", None
    if is_op(node, "ReduceMean", "ReduceSum", "ReduceMax", "AveragePool", "GlobalAveragePool"):
        return "pool", f"{at} is taken over the tokens", None
    if is_op(node, "Reshape") and layout and len(out or []) == 4:
        return _as_grid(node, at, out or [])
    if is_op(node, "Transpose", "Reshape", "Flatten") and layout and len(out or []) == 3:
        return node.outputs[0]
    if is_op(node, *_ROWWISE, "MatMul", "Add", "Mul") and all(v is value or not _varies(v) for v in node.inputs):
        return node.outputs[0]
    return "tokens", f"{at} reads all tokens; the search stopped there", None


def _as_grid(node: ir.Node, at: str, out: list[object]) -> tuple[Head, str, tuple[int, int] | None]:
    """``[B, E, S]`` to ``[B, E, h, w]``, or ``[B, S, E]`` to ``[B, h, w, E]``."""
    before = node.inputs[0].producer() if node.inputs[0] is not None else None
    places = out[2:4] if is_op(before, "Transpose") else out[1:3]
    rows, columns = places
    grid = (rows, columns) if isinstance(rows, int) and isinstance(columns, int) else None
    return "grid", f"{at} makes an image of the tokens, {rows} x {columns}", grid

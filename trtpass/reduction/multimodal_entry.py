"""Before a decoder's first layer: image tokens that another one stands for leave the stream.

Image features were merged where they are made, in the vision tower or behind the projector. The decoder then carries
one token for each group, at the place of one of its members; that is as if only these had been in the prompt, at their
positions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from trtpass.encoders import above, sliced
from trtpass.errors import AnchorError
from trtpass.ir import dims, is_op
from trtpass.multimodal import Multimodal
from trtpass.reduction.decoder_stream import insert_after, open_rows, protect, rotate, rows_of, unmarked
from trtpass.reduction.emit import I32, Emitter
from trtpass.reduction.stream import Stream, gathered, last_axis
from trtpass.reduction.walk import follow, need_through, resize

BOOL = ir.DataType.BOOL
_LONGEST = 64  # nodes that a search goes through


def enter(
    model: ir.Model, found: Multimodal, rep: ir.Value, lengths: ir.Value, hidden: ir.Value, name: str, kept: int | None
) -> tuple[Stream, dict[str, ir.Value]]:
    """The decoder's stream without the image tokens that another one stands for, and values by role.

    Args:
        rep: int32 `[B, N]`, the number among its row's image tokens of the one that stands for each.
        lengths: int32 `[B]`, tokens of each row.
        hidden: below lm_head, where the stream ends.
        kept: image tokens that stay in every row; None where the data says it.

    Raises:
        AnchorError: the decoder's stream cannot be followed.
    """
    graph, x, tokens = model.graph, found.embeds, found.tokens
    emit = Emitter(model, f"{name.replace('-', '_')}.entry")
    users = [(node, place) for node, place in x.uses() if not is_op(node, "Shape")]
    stream = open_rows(emit, x, lengths)
    shape = [stream.batch, stream.length]
    stream.protected = unmarked(emit, found.visual)
    image = emit.node("Cast", [found.visual], "image", I32, shape, to=int(I32))
    number = emit.node("CumSum", [image, emit.scalar(1, np.int64)], "number", I32, shape, exclusive=1)
    number = emit.node("Min", [number, emit.scalar(tokens - 1, np.int32)], "number_in_range", I32, shape)
    heir = gathered(emit, rep, number, "heir_number", stream.length)  # [B, S]: of each image token
    own = emit.node("Equal", [heir, number], "own", BOOL, shape)
    text = emit.node("Not", [found.visual], "text", BOOL, shape)
    keep = emit.node("Cast", [emit.node("Or", [text, own], "stays", BOOL, shape)], "keep", I32, shape, to=int(I32))
    every = {"permille": 1000, "rounding": 999, "drop": 0 if kept is None else tokens - kept}
    length: Any = ir.SymbolicDim(f"{emit.label}.tokens")
    sizes = {"B": stream.batch, "S": stream.length, "C": stream.length if kept is None else length, "M": None}
    index, count, _, slot = emit.op(
        "IndexTokens", [keep, lengths], ["places", "stay", "rest", "slot"], sizes, fixed=0, **every
    )
    if kept is None:
        (index,) = emit.op("TrimIndex", [index, count], ["index"], {"B": stream.batch, "C": length})
    # Where the image tokens are, and so where the heir of each token is: padding and text are their own.
    only = {"fixed": tokens, "permille": 0, "rounding": 999, "drop": 0}
    at, *_ = emit.op(
        "IndexTokens", [image, lengths], ["at", "images", "others", "image_slot"], {**sizes, "C": tokens}, **only
    )
    place = emit.node(
        "Where", [found.visual, gathered(emit, at, heir, "heir_at", stream.length), stream.owner], "heir", I32, shape
    )
    last = emit.node("Sub", [last_axis(emit, lengths, "end"), emit.scalar(1, np.int32)], "last_at", I32, [shape[0], 1])
    place = emit.node("Min", [place, last], "heir_in_row", I32, shape)
    stream.owner = gathered(emit, slot, place, "slots", stream.length)
    stream.tokens = rows_of(emit, x, index, "tokens", length)
    stream.protected = protect(emit, stream, index, length)
    stream.length, stream.lengths = length, count
    insert_after(graph, x, emit.take())
    for node, number_of_input in users:
        node.replace_input_with(number_of_input, stream.tokens)
    course = follow(graph, stream.tokens, 1, hidden)
    need_through(course, hidden, name)
    resize(course, length)
    rotate(graph, emit, course, index, stream.batch, length)
    return stream, {"tokens": stream.tokens, "owner": stream.owner, "index": index, "count": count}


def one_by_one(found: Multimodal, out: ir.Value, cls: int) -> str:
    """Why row n of the features does not come from token ``cls + n`` of the tower's stream ``out`` alone, or ""."""
    value, cut, flat = found.features, cls == 0, False
    for _ in range(_LONGEST):
        if value is out:
            tokens = (dims(out) or [None, None])[1]
            same = cut and tokens == found.tokens + cls
            return "" if same else f"the tower has {tokens} tokens, {cls} of them in front, the prompt {found.tokens}"
        node, up = value.producer(), None
        part = sliced(node)
        if part is not None and not cut and part[0] == cls and part[1] >= found.tokens + cls:
            up, cut = part[2], True
        elif is_op(node, "Reshape") and not flat and _flattens(node, found.tokens):
            up, flat = node.inputs[0], True
        elif is_op(node, "Gemm"):
            up = node.inputs[0]
        elif not is_op(node, "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze"):
            up = above(value)
        if up is None:
            what = "a graph input" if node is None else f"{node.op_type} '{node.name}'"
            return f"{what} between tower and features does not work on each token alone"
        value = up
    return f"no tower within {_LONGEST} nodes above the features"


def _flattens(node: ir.Node, tokens: int) -> bool:
    before, after = dims(node.inputs[0]), dims(node.outputs[0])
    if before is None or after is None or len(before) != 3 or len(after) != 2:
        return False
    return before[1] == tokens and before[2] == after[1]


def hidden_below(head: ir.Node) -> ir.Value:
    """What lm_head reads `[B, S, E]`.

    Raises:
        AnchorError: nothing.
    """
    if head.inputs[0] is None:
        raise AnchorError("lm_head reads nothing")
    return head.inputs[0]

"""What travels with a shortened stream: which original tokens each of its tokens stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from trtpass.errors import AnchorError
from trtpass.ir import dims
from trtpass.reduction.emit import F32, I32, I64, Emitter

HIDDEN = -1e30  # as a logit: no weight in float32


@dataclass
class Stream:
    """A token stream and its companions.

    Args:
        tokens: `[B, S, E]`.
        batch: B, an int or a symbol.
        length: S, an int or a symbol.
        original: N, its length before any token went.
        owner: int32 `[B, N]`, place of each original token in the stream, -1 where it has none.
        place: int32 `[B, S]`, original index of each token, -1 for a fused one.
        size: float32 `[B, S]`, original tokens in each.
        protected: int32 `[B, S]`, 1 for tokens that are never touched.
        lengths: int32 `[B]`, S for each row.
    """

    tokens: ir.Value
    batch: Any
    length: Any
    original: Any
    owner: ir.Value
    place: ir.Value
    size: ir.Value
    protected: ir.Value
    lengths: ir.Value


def open_stream(emit: Emitter, tokens: ir.Value, cls: int) -> Stream:
    """The stream before its first site: every token its own."""
    shape = dims(tokens)
    if shape is None or len(shape) != 3:
        raise AnchorError(f"the token stream '{tokens.name}' has shape {shape}", "[batch, tokens, width]")
    batch, length = shape[0], shape[1]
    both = emit.node("Shape", [tokens], "shape", I64, [2], start=0, end=2)
    rows = emit.node("Shape", [tokens], "batch", I64, [1], start=0, end=1)
    count = emit.node("Squeeze", [emit.node("Shape", [tokens], "length", I64, [1], start=1, end=2)], "count", I64, [])
    wide = emit.node("Range", [emit.scalar(0, np.int64), count, emit.scalar(1, np.int64)], "range64", I64, [length])
    index = emit.node("Cast", [wide], "range", I32, [length], to=int(I32))
    place = emit.node("Expand", [index, both], "place", I32, [batch, length])
    leading = emit.node("Less", [wide, emit.scalar(cls, np.int64)], "leading", ir.DataType.BOOL, [length])
    leading32 = emit.node("Cast", [leading], "leading32", I32, [length], to=int(I32))
    return Stream(
        tokens=tokens,
        batch=batch,
        length=length,
        original=length,
        owner=place,
        place=place,
        size=emit.node("Expand", [emit.scalar(1.0), both], "size", F32, [batch, length]),
        protected=emit.node("Expand", [leading32, both], "protected", I32, [batch, length]),
        lengths=emit.node(
            "Expand", [emit.node("Cast", [count], "count32", I32, [], to=int(I32)), rows], "lengths", I32, [batch]
        ),
    )


def gathered(emit: Emitter, value: ir.Value, index: ir.Value, role: str, size: Any) -> ir.Value:
    """``value[b, index[b, c]]`` of `[B, S]` and `[B, C]`; every index is in range."""
    shape = dims(value) or [None, None]
    return emit.node("GatherElements", [value, index], role, value.dtype, [shape[0], size], axis=1)


def last_axis(emit: Emitter, value: ir.Value, role: str) -> ir.Value:
    """`[B, S]` as `[B, S, 1]`."""
    return emit.node("Unsqueeze", [value, emit.ints(-1)], role, value.dtype, [*(dims(value) or [None, None]), 1])


def repeated(emit: Emitter, rest: ir.Value, target: ir.Value, members: Any) -> ir.Value:
    """``rest`` `[B, M]` with each entry K times, as long as ``target`` `[B, M K]`; ``members`` is K where known."""
    batch, dropped = dims(rest) or [None, None]
    entries = (dims(target) or [None, None])[1]
    total = emit.node("Shape", [target], "entries", I64, [1], start=1, end=2)
    most = emit.node("Shape", [rest], "dropped", I64, [1], start=1, end=2)
    divisor = emit.node("Max", [most, emit.ints(1)], "dropped_or_one", I64, [1])
    each = emit.node("Div", [total, divisor], "members", I64, [1])
    shape = emit.node("Concat", [emit.ints(1, 1), each], "member_shape", I64, [3], axis=0)
    column = last_axis(emit, rest, "rest_column")
    wide = emit.node("Expand", [column, shape], "rest_wide", I32, [batch, dropped, members])
    return emit.node("Reshape", [wide, emit.ints(0, -1)], "rest_members", I32, [batch, entries])


def key_bias(emit: Emitter, stream: Stream, sizes: bool, pads: bool) -> ir.Value:
    """A mask float32 `[B, 1, S, S]` on keys: log(size), for attention that counts each key as often as its size, and a
    large negative number behind a row's ``lengths``, where rows of a batch have different numbers of tokens.

    Spelt out for every query: ONNX Runtime's Attention does not broadcast a mask over queries.
    """
    batch, length = stream.batch, stream.length
    if sizes:
        bias = emit.node("Log", [stream.size], "log_size", F32, [batch, length])
    else:
        bias = emit.node("Sub", [stream.size, stream.size], "no_bias", F32, [batch, length])
    if pads:
        count = emit.node("Unsqueeze", [stream.lengths, emit.ints(1)], "lengths_column", I32, [batch, 1])
        zero = emit.node("Sub", [stream.place, stream.place], "zero_place", I32, [batch, length])
        step = emit.node("Add", [zero, emit.scalar(1, np.int32)], "one_place", I32, [batch, length])
        order = emit.node("CumSum", [step, emit.scalar(1, np.int64)], "order", I32, [batch, length], exclusive=1)
        real = emit.node("Less", [order, count], "real", ir.DataType.BOOL, [batch, length])
        bias = emit.node("Where", [real, bias, emit.scalar(HIDDEN)], "padded_bias", F32, [batch, length])
    keys = emit.node("Unsqueeze", [bias, emit.ints(1, 2)], "key_bias", F32, [batch, 1, 1, length])
    tokens = emit.node("Shape", [stream.tokens], "bias_tokens", I64, [1], start=1, end=2)
    shape = emit.node("Concat", [emit.ints(1, 1), tokens, emit.ints(1)], "bias_shape", I64, [4], axis=0)
    return emit.node("Expand", [keys, shape], "bias", F32, [batch, 1, length, length])

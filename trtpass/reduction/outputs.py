"""The end of a shortened stream: rows for the head, and what each token stands for as graph outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from trtpass.ir import dims, make_node
from trtpass.reduction.emit import F32, I32, I64, Emitter
from trtpass.reduction.stream import Stream

# Graph outputs of a stream that is not restored.
OWNER, SIZE, POSITION, RANGE = "token_owner", "token_size", "token_position", "token_range"


def restored(emit: Emitter, stream: Stream, out: ir.Value, cls: int, columns: int) -> ir.Value:
    """Give the users of ``out`` `[B, C, E]` the rows of all N original tokens: merged ones get the row that they
    joined, dropped ones that of their nearest neighbour on the grid."""
    width = (dims(out) or [None] * 3)[2]
    users = list(out.uses())
    (rows,) = emit.op(
        "RestoreTokens",
        [out, stream.owner],
        ["restored"],
        {"B": stream.batch, "C": stream.length, "E": width, "S": stream.original},
        fixed=cls,
        width=columns,
    )
    _after(emit, out)
    for node, place in users:
        node.replace_input_with(place, rows)
    if out.is_graph_output():
        emit.graph.outputs[list(emit.graph.outputs).index(out)] = rows
        rows.name, out.name = out.name, f"{out.name}.short"
    return rows


def add_outputs(emit: Emitter, stream: Stream, out: ir.Value, all_tokens: bool) -> None:
    """Where the head reads the short stream, what its tokens stand for: ``token_owner`` int32 `[B, N]`, and of each
    token its size, the mean position of the original tokens that it owns, and their first and last position:
    ``token_size`` and ``token_position`` float32 `[B, C]`, ``token_range`` int32 `[B, C, 2]`. A token that owns none,
    such as a fused one, has mean position 0 and the range N to -1."""
    if all_tokens:
        return
    position, ends = _positions(emit, stream)
    _after(emit, out)
    for value, name in ((stream.owner, OWNER), (stream.size, SIZE), (position, POSITION), (ends, RANGE)):
        node = make_node("Identity", [value], [(name, value.dtype, value.shape)])
        emit.graph.append(node)
        emit.graph.outputs.append(node.outputs[0])


def _positions(emit: Emitter, stream: Stream) -> tuple[ir.Value, ir.Value]:
    """Mean position `[B, C]` and first and last `[B, C, 2]` of the original tokens that each token owns."""
    batch, length, count = stream.batch, stream.length, stream.original
    pairs, each = [batch, length, count], [batch, length]
    one, first = emit.scalar(1, np.int64), emit.scalar(0, np.int64)

    def numbers(of: ir.Value, role: str, size: Any) -> tuple[ir.Value, ir.Value]:
        shape = emit.node("Shape", [of], f"{role}_shape", I64, [1], start=1, end=2)
        total = emit.node("Squeeze", [shape], f"{role}_count", I64, [])
        wide = emit.node("Range", [first, total, one], f"{role}_range64", I64, [size])
        total32 = emit.node("Cast", [total], f"{role}_count32", I32, [], to=int(I32))
        return emit.node("Cast", [wide], f"{role}_range", I32, [size], to=int(I32)), total32

    slot, _ = numbers(stream.tokens, "slots", length)
    place, total = numbers(stream.owner, "places", count)
    column = emit.node("Unsqueeze", [slot, emit.ints(1)], "slot_column", I32, [length, 1])
    row = emit.node("Unsqueeze", [stream.owner, emit.ints(1)], "owner_row", I32, [batch, 1, count])
    owns = emit.node("Equal", [row, column], "owns", ir.DataType.BOOL, pairs)
    low = emit.node("Where", [owns, place, total], "places_or_n", I32, pairs)
    high = emit.node("Where", [owns, place, emit.scalar(-1, np.int32)], "places_or_none", I32, pairs)
    least = emit.node("ReduceMin", [low, emit.ints(2)], "first_place", I32, [*each, 1], keepdims=1)
    most = emit.node("ReduceMax", [high, emit.ints(2)], "last_place", I32, [*each, 1], keepdims=1)
    ends = emit.node("Concat", [least, most], "ends", I32, [*each, 2], axis=2)
    member = emit.node("Cast", [owns], "owns_float", F32, pairs, to=int(F32))
    places = emit.node("Cast", [place], "places_float", F32, [count], to=int(F32))
    weighted = emit.node("Mul", [member, places], "owned", F32, pairs)
    summed = emit.node(
        "ReduceSum",
        [weighted, emit.ints(2)],
        "owned_sum",
        F32,
        each,
        keepdims=0,
    )
    number = emit.node("ReduceSum", [member, emit.ints(2)], "owned_count", F32, each, keepdims=0)
    safe = emit.node("Max", [number, emit.scalar(1.0)], "owned_or_one", F32, each)
    return emit.node("Div", [summed, safe], "mean_place", F32, each), ends


def _after(emit: Emitter, out: ir.Value) -> None:
    producer = out.producer()
    if producer is not None:
        emit.graph.insert_after(producer, emit.take())

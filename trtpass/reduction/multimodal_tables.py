"""Vision towers that rotate queries and keys by tables of all positions: a shorter stream takes its tokens' rows.

Such as Qwen2-VL's, whose cos and sin `[S, D]` are constants for an image of one size.
"""

from __future__ import annotations

import onnx_ir as ir

from trtpass.ir import dims, is_op
from trtpass.reduction.decoder_stream import insert_after
from trtpass.reduction.emit import Emitter
from trtpass.reduction.stream import Stream
from trtpass.reduction.walk import Course, follow

Tables = dict[ir.Value, ir.Value]  # rows that an earlier site took -> the table that they are from


def take_rows(emit: Emitter, stream: Stream, until: ir.Value | None, tables: Tables) -> Course:
    """Follow ``stream`` to ``until``; constants with a row for each original token give those of what is left.

    ``stream.place`` must be the original number of each token. What else stops the stream is left to the caller.
    """
    gathered: dict[ir.Value, ir.Value] = {}
    also: dict[ir.Value, int] = {}
    while True:
        course, moved = follow(emit.graph, stream.tokens, 1, until, also), False
        for end in course.ends:
            for number, value in enumerate(end.node.inputs):
                if value is None or id(value) in course.axes or not is_op(end.node, "Mul", "Add"):
                    continue
                table, other = tables.get(value, value), end.node.inputs[1 - number]
                if table not in gathered:
                    axis = course.axes.get(id(other)) if other is not None else None
                    made = None if axis is None else _rows(emit, stream, table, other, axis)
                    if made is None:
                        continue
                    gathered[table], tables[made], also[made] = made, table, axis or 0
                    insert_after(emit.graph, stream.place, emit.take())
                if value is not gathered[table]:
                    end.node.replace_input_with(number, gathered[table])
                    moved = True
        if not moved:
            return course


def _rows(emit: Emitter, stream: Stream, table: ir.Value, other: ir.Value | None, axis: int) -> ir.Value | None:
    """Rows `[B, 1, C, ...]` of a constant `[1, S, ...]` for a stream with tokens on ``axis``; None for other values."""
    shape, rank = dims(table), len(dims(other) or [])
    if table.const_value is None or shape is None or rank < len(shape):
        return None
    own = axis - (rank - len(shape))  # the axis of the table's tokens
    if own < 0 or shape[own] != stream.original or any(size != 1 for size in shape[:own]):
        return None
    left = shape[own + 1 :]
    if own:
        table = emit.node("Squeeze", [table, emit.ints(*range(own))], f"{table.name}_flat", table.dtype, shape[own:])
    rows = emit.node(
        "Gather", [table, stream.place], f"{table.name}_rows", table.dtype, [stream.batch, stream.length, *left], axis=0
    )
    if axis == 1:
        return rows
    wide = [stream.batch, *[1] * (axis - 1), stream.length, *left]
    return emit.node("Unsqueeze", [rows, emit.ints(*range(1, axis))], f"{table.name}_wide", table.dtype, wide)

"""A decoder's shorter stream from its first site to lm_head: owners, rotations, all rows again, what caches hold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from trtpass.errors import AnchorError
from trtpass.ir import dims, is_op
from trtpass.reduction.decoder import DROPPED
from trtpass.reduction.emit import F32, I32, Emitter
from trtpass.reduction.stream import Stream, last_axis, open_stream
from trtpass.reduction.walk import Course


def open_rows(emit: Emitter, x: ir.Value, lengths: ir.Value) -> Stream:
    """The stream x `[B, S, E]` before its first site. Padding takes the last valid token's row."""
    stream = open_stream(emit, x, 0)
    stream.lengths = lengths
    last = emit.node("Sub", [lengths, emit.scalar(1, np.int32)], "last", I32, [stream.batch])
    column = emit.node("Unsqueeze", [last, emit.ints(1)], "last_column", I32, [stream.batch, 1])
    stream.owner = emit.node("Min", [stream.place, column], "owner", I32, [stream.batch, stream.original])
    return stream


def insert_after(graph: ir.Graph, x: ir.Value, nodes: Sequence[ir.Node]) -> None:
    """Put nodes behind the one that makes ``x``.

    Raises:
        AnchorError: x is a graph input.
    """
    producer = x.producer()
    if producer is None:
        raise AnchorError(f"the stream '{x.name}' is a graph input")
    graph.insert_after(producer, nodes)


def rows_of(emit: Emitter, x: ir.Value, index: ir.Value, role: str, count: object) -> ir.Value:
    """``x[b, index[b, c]]`` `[B, C, E]` of x `[B, S, E]`, zeros where an index is out of range."""
    shape = dims(x) or [None] * 3
    batch = (dims(index) or [None])[0]
    (made,) = emit.op("GatherTokens", [x, index], [role], {"B": batch, "C": count, "E": shape[2]})
    return made


def rotate(graph: ir.Graph, emit: Emitter, course: Course, index: ir.Value, batch: object, count: object) -> None:
    """Nodes on ``course`` rotate by the original positions: the rows of cos and sin `[B, S, D/2]` that are kept."""
    gathered: dict[ir.Value, ir.Value] = {}
    for rope in graph:
        if not is_op(rope, "RotaryEmbedding") or rope.inputs[0] is None or id(rope.inputs[0]) not in course.axes:
            continue
        if len(rope.inputs) != 3:
            raise AnchorError(f"RotaryEmbedding '{rope.name}' has position_ids", "cos and sin [batch, tokens, D/2]")
        for number in (1, 2):
            table = rope.inputs[number]
            shape = dims(table)
            if table is None or shape is None or len(shape) != 3 or (shape[0] == 1 and batch != 1):
                raise AnchorError(
                    f"RotaryEmbedding '{rope.name}' reads '{table and table.name}' of shape {shape}",
                    "cos and sin [batch, tokens, D/2]",
                )
            if table not in gathered:
                role = f"{('cos', 'sin')[number - 1]}{len(gathered) // 2}"
                gathered[table] = rows_of(emit, table, index, role, count)
            rope.replace_input_with(number, gathered[table])
    made = emit.take()
    if made:
        insert_after(graph, index, made)


def unmarked(emit: Emitter, mask: ir.Value) -> ir.Value:
    """1 where ``mask`` bool `[B, S]` is not set, int32 `[B, S]`."""
    shape = dims(mask) or [None, None]
    return emit.node(
        "Cast", [emit.node("Not", [mask], "unmarked_bool", mask.dtype, shape)], "unmarked", I32, shape, to=int(I32)
    )


def protect(emit: Emitter, stream: Stream, index: ir.Value, count: object) -> ir.Value:
    """``protected`` of the tokens that stay, int32 `[B, C]`."""
    column = last_axis(emit, stream.protected, "protected_column")
    wide = emit.node("Cast", [column], "protected_float", F32, dims(column) or [], to=int(F32))
    flat = emit.node(
        "Squeeze",
        [rows_of(emit, wide, index, "protected_rows", count), emit.ints(-1)],
        "protected_row", F32, [stream.batch, count],
    )  # fmt: skip
    return emit.node("Cast", [flat], "protected_kept", I32, [stream.batch, count], to=int(I32))


def restore(emit: Emitter, stream: Stream, hidden: ir.Value) -> None:
    """All original rows below lm_head `[B, N, E]`; a plain gather, as every token has an owner or no row at all."""
    users = list(hidden.uses())
    rows = rows_of(emit, hidden, stream.owner, "restored", stream.original)
    insert_after(emit.graph, hidden, emit.take())
    for node, number in users:
        node.replace_input_with(number, rows)


def report(emit: Emitter, lengths: ir.Value, held: Sequence[ir.Value]) -> None:
    """The output ``dropped`` int32 `[layers, batch]`: lengths less what each layer holds."""
    batch = (dims(lengths) or [None])[0]
    rows: dict[ir.Value, ir.Value] = {}
    for number, value in enumerate(dict.fromkeys(held)):
        gone = emit.node("Sub", [lengths, value], f"dropped_{number}", I32, [batch])
        rows[value] = emit.node("Unsqueeze", [gone, emit.ints(0)], f"dropped_row_{number}", I32, [1, batch])
    whole = emit.node("Concat", [rows[value] for value in held], DROPPED, I32, [len(held), batch], axis=0)
    whole.name = DROPPED
    emit.graph.extend(emit.take())
    emit.graph.outputs.append(whole)

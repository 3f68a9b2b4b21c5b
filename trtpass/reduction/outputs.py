"""The end of a shortened stream: rows for the head, and what each token stands for as graph outputs."""

from __future__ import annotations

import onnx_ir as ir

from trtpass.ir import dims, make_node
from trtpass.reduction.emit import Emitter
from trtpass.reduction.stream import Stream

OWNER, SIZE = "token_owner", "token_size"  # graph outputs of a stream that is not restored


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
    """Where the head reads the short stream, what its tokens stand for: ``token_owner`` int32 `[B, N]` and
    ``token_size`` float32 `[B, C]`; sizes, mean positions and ranges of positions follow from the owners."""
    if all_tokens:
        return
    for value, name in ((stream.owner, OWNER), (stream.size, SIZE)):
        node = make_node("Identity", [value], [(name, value.dtype, value.shape)])
        emit.graph.append(node)
        emit.graph.outputs.append(node.outputs[0])


def _after(emit: Emitter, out: ir.Value) -> None:
    producer = out.producer()
    if producer is not None:
        emit.graph.insert_after(producer, emit.take())

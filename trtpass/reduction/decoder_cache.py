"""Caches of a decoder whose later layers hold fewer tokens: where a layer writes, and how many slots it has."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trtpass.ir import add_input, constant, make_node
from trtpass.reduction.decoder import DROPPED, Shortened

BATCH, CAPACITY = "batch", "capacity"  # names of sizes in graphs with a cache


def held_tokens(
    graph: ir.Graph, head: ir.Node, past: ir.Value, shortened: Shortened | None, order: list[ir.Value]
) -> list[ir.Value]:
    """Tokens that the cache of each layer holds, int64 `[batch]`: ``past`` less row i of the input ``dropped``, which
    is added to ``order``. Layers between two sites share one value; empty where no layer holds fewer."""
    if shortened is None:
        return []
    given = add_input(graph, DROPPED, ir.DataType.INT32, [shortened.layers, BATCH])
    order.append(given)
    held, starts = [past] * shortened.layers, {c.layer for c in shortened.cuts if c.layer < shortened.layers}
    for start in sorted(starts):
        row = constant(graph, f"cache.layer{start}", np.array(start, np.int64))
        gone = make_node("Gather", [given, row], [(f"cache.dropped{start}", ir.DataType.INT32, [BATCH])], {"axis": 0})
        wide = make_node("Cast", gone.outputs, [(f"cache.dropped64_{start}", ir.DataType.INT64, [BATCH])],
                         {"to": int(ir.DataType.INT64)})  # fmt: skip
        left = make_node("Sub", [past, wide.outputs[0]], [(f"cache.write{start}", ir.DataType.INT64, [BATCH])])
        graph.insert_before(head, [gone, wide, left])
        held[start:] = [left.outputs[0]] * (shortened.layers - start)
    return held


def slots(shortened: Shortened | None, capacity: int | None, layer: int) -> int | str:
    """Slots of a row in a layer, a size or its name. A fixed size leaves out what the shortest allowed prompt drops."""
    if shortened is None:
        return CAPACITY if capacity is None else capacity
    start = max((cut.layer for cut in shortened.cuts if cut.layer <= layer), default=0)
    if capacity is None:
        return CAPACITY if start == 0 else f"{CAPACITY}{start}"
    return capacity - shortened.spared([shortened.least])[layer]

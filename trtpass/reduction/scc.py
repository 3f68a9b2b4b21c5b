"""Semantic connected components (LLaVA-Scissor, arXiv 2506.21862) of a token stream, as nodes of a graph.

How many tokens come out depends on the data. Shapes give a capacity; ``TrimIndex`` cuts it to what the batch needs
where the target allows lengths that depend on data, and later attention does not see the padding of shorter rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from trtpass.errors import InputError
from trtpass.ir import dims
from trtpass.reduction.emit import F32, I32, I64, Emitter


@dataclass(frozen=True)
class Merged:
    """Representatives of a stream of n tokens.

    Args:
        tokens: `[B, C, E]`, right-padded.
        size: float32 `[B, C]`, tokens that each stands for, 0 for padding.
        count: int32 `[B]`.
        label: int32 `[B, n]`, representative of each token.
        length: C.
        chosen: what another side may choose instead: ``label``, before what has no room joins others.
    """

    tokens: ir.Value
    size: ir.Value
    count: ir.Value
    label: ir.Value
    length: Any
    chosen: ir.Value


@dataclass(frozen=True)
class Connected:
    """How components are found.

    Args:
        tau: cosine above which two tokens are connected.
        group: tokens of a group in the first of two steps; 0 for one step.
        permille: capacity in thousandths of the tokens.
    """

    tau: float
    group: int
    permille: int


def connect(emit: Emitter, x: ir.Value, lengths: ir.Value, how: Connected) -> Merged:
    """The representatives of x `[B, n, E]`, all of whose tokens are valid; ``lengths`` int32 `[B]` is n."""
    shape = dims(x)
    if shape is None:
        raise InputError(f"the token stream '{x.name}' has no known rank", "[batch, tokens, width]")
    batch, count, width = shape
    if how.group:
        label, total = _by_group(emit, x, how, batch, count, width)
    else:
        label, total = _components(emit, x, lengths, how.tau, "label", batch, count, width)
    sizes = {"B": batch, "S": count, "E": width, "C": count}
    mean, held = emit.op("SegmentMean", [x, label], ["mean", "members"], sizes, max_segments_permille=1000)
    if how.group:
        again, total = _components(emit, mean, total, how.tau, "label2", batch, count, width)
        mean, held = emit.op("SegmentMean", [mean, again], ["mean2", "members2"], sizes, max_segments_permille=1000)
    found = label
    length = ir.SymbolicDim(f"{emit.label}.components")
    tokens, size, number = _cut(emit, mean, held, total, lengths, how, sizes, length)
    if not how.group and how.permille == 1000:
        return Merged(tokens, size, number, label, length, label)
    match, _ = emit.op(
        "BipartiteMatch", [x, tokens, number], ["match", "similarity"], {"B": batch, "S": count, "R": length}
    )
    ones = emit.node(
        "Expand", [emit.scalar(1.0), emit.node("Shape", [match], "all_shape", I64, [2])], "ones", F32, [batch, count]
    )
    if how.group:  # every original token joins; the representative itself counts as one more
        zero = emit.node("Sub", [size, size], "no_size", F32, [batch, length])
        base = emit.node("Add", [zero, emit.scalar(1.0)], "base_size", F32, [batch, length])
        target = match
    else:  # what lies beyond the capacity joins the most similar representative that is there
        column = emit.node("Unsqueeze", [number, emit.ints(1)], "count_column", I32, [batch, 1])
        inside = emit.node("Less", [label, column], "inside", ir.DataType.BOOL, [batch, count])
        nowhere = emit.node(
            "Sub",
            [emit.node("Sub", [label, label], "no_label", I32, [batch, count]), _one(emit)],
            "nowhere",
            I32,
            [batch, count],
        )
        target = emit.node("Where", [inside, nowhere, match], "joins", I32, [batch, count])
        label, base = emit.node("Where", [inside, label, match], "owner_label", I32, [batch, count]), size
    sizes = {"B": batch, "R": length, "E": width, "S": count}
    merged, weight = emit.op("MergeTokens", [tokens, base, x, ones, target], ["merged", "merged_size"], sizes)
    if how.group:
        label, weight = match, emit.node("Sub", [weight, base], "joined", F32, [batch, length])
    return Merged(merged, weight, number, label, length, match if how.group else found)


def _components(
    emit: Emitter, x: ir.Value, lengths: ir.Value, tau: float, role: str, batch: Any, count: Any, width: Any
) -> tuple[ir.Value, ir.Value]:
    label, total = emit.op(
        "ConnectedComponents",
        [x, lengths],
        [role, f"{role}_components"],
        {"B": batch, "S": count, "E": width},
        tau=float(tau),
    )
    return label, total


def _by_group(
    emit: Emitter, x: ir.Value, how: Connected, batch: Any, count: Any, width: Any
) -> tuple[ir.Value, ir.Value]:
    """Components inside each group of ``how.group`` tokens, numbered through a row: label `[B, n]`, number `[B]`."""
    if not isinstance(count, int):
        raise InputError(
            "groups of a stream whose number of tokens is not fixed",
            "a fixed number of tokens",
            "use scc without groups",
        )
    groups = -(-count // how.group)
    padded = groups * how.group
    if padded > count:
        rows = emit.node(
            "Pad", [x, emit.ints(0, 0, 0, 0, padded - count, 0)], "padded", x.dtype, [batch, padded, width]
        )
    else:
        rows = x
    parts = emit.node("Reshape", [rows, emit.ints(-1, how.group, width)], "groups", x.dtype, [None, how.group, width])
    per_row = np.array([min(how.group, count - g * how.group) for g in range(groups)], np.int32)
    lengths_of = emit.array("group_lengths", per_row)
    number = emit.node("Shape", [x], "group_batch", I64, [1], start=0, end=1)
    shape = emit.node("Concat", [number, emit.ints(1)], "group_shape", I64, [2], axis=0)
    tiled = emit.node(
        "Reshape",
        [
            emit.node(
                "Tile",
                [emit.node("Unsqueeze", [lengths_of, emit.ints(0)], "group_row", I32, [1, groups]), shape],
                "group_rows",
                I32,
                [batch, groups],
            ),
            emit.ints(-1),
        ],
        "group_valid",
        I32,
        [None],
    )
    label, parts_total = _components(emit, parts, tiled, how.tau, "group_label", None, how.group, width)
    by_row = emit.node("Reshape", [parts_total, emit.ints(-1, groups)], "group_components", I32, [batch, groups])
    before = emit.node(
        "CumSum", [by_row, emit.scalar(1, np.int64)], "components_before", I32, [batch, groups], exclusive=1
    )
    offset = emit.node("Unsqueeze", [before, emit.ints(2)], "offset", I32, [batch, groups, 1])
    split = emit.node(
        "Reshape", [label, emit.ints(-1, groups, how.group)], "label_by_group", I32, [batch, groups, how.group]
    )
    numbered = emit.node("Add", [split, offset], "numbered", I32, [batch, groups, how.group])
    flat = emit.node("Reshape", [numbered, emit.ints(-1, padded)], "numbers_padded", I32, [batch, padded])
    if padded > count:
        flat = emit.node("Slice", [flat, emit.ints(0), emit.ints(count), emit.ints(1)], "numbers", I32, [batch, count])
    total = emit.node("ReduceSum", [by_row, emit.ints(1)], "first_components", I32, [batch], keepdims=0)
    return flat, total


def _one(emit: Emitter) -> ir.Value:
    return emit.array("one", np.array(1, np.int32))


def _cut(
    emit: Emitter,
    mean: ir.Value,
    held: ir.Value,
    total: ir.Value,
    lengths: ir.Value,
    how: Connected,
    sizes: dict[str, Any],
    length: Any,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Representatives, members and number of those that there is room for."""
    batch, count = sizes["B"], sizes["S"]
    used = emit.node(
        "Cast",
        [
            emit.node(
                "Greater", [held, emit.array("none", np.array(0, np.int32))], "used", ir.DataType.BOOL, [batch, count]
            )
        ],
        "used32",
        I32,
        [batch, count],
        to=int(I32),
    )
    budget = {"fixed": 0, "permille": how.permille, "rounding": 999, "drop": 0}
    room = emit.op(
        "IndexTokens", [used, lengths], ["room", "number", "beyond", "slot"], {"B": batch, "S": count}, **budget
    )
    number = room[1]
    (index,) = emit.op("TrimIndex", [room[0], number], ["index"], {"B": batch, "C": length})
    (tokens,) = emit.op(
        "GatherTokens", [mean, index], ["tokens"], {"B": batch, "S": count, "E": sizes["E"], "C": length}
    )
    column = emit.node(
        "Unsqueeze",
        [emit.node("Cast", [held], "members_float", F32, [batch, count], to=int(F32)), emit.ints(-1)],
        "members_column",
        F32,
        [batch, count, 1],
    )
    (size,) = emit.op("GatherTokens", [column, index], ["size_column"], {"B": batch, "S": count, "E": 1, "C": length})
    flat = emit.node("Squeeze", [size, emit.ints(-1)], "size", F32, [batch, length])
    return tokens, flat, number

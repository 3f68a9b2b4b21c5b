"""Correlations and compressions: what becomes of the tokens that go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from trtpass.ir import dims
from trtpass.reduction.emit import F32, I32, I64
from trtpass.reduction.filters import Site
from trtpass.reduction.stream import Stream, gathered, last_axis, repeated


@dataclass(frozen=True)
class Split:
    """Kept and dropped tokens of a site: ``index [B, C]``, ``count [B]``, ``rest [B, M]``, ``slot [B, S]``, int32."""

    index: ir.Value
    count: ir.Value
    rest: ir.Value
    slot: ir.Value
    kept: Any  # C
    dropped: Any  # M


@dataclass(frozen=True)
class Join:
    """``target [B, T]``: place among the kept tokens that dropped token ``t // K`` joins; ``weight [B, T]``."""

    target: ir.Value
    weight: ir.Value
    members: int | None  # K, None where it depends on the number of tokens


def rows(site: Site, x: ir.Value, index: ir.Value, role: str, count: Any) -> ir.Value:
    """``x[b, index[b, c]]`` `[B, C, E]` of x `[B, S, E]`."""
    width = (dims(x) or [None] * 3)[2]
    (made,) = site.emit.op("GatherTokens", [x, index], [role], {**site.sizes(), "C": count, "E": width})
    return made


def _candidate(site: Site) -> ir.Value:
    """1 for tokens that others may join: odd ones for ToMe's filter, else all that are not protected."""

    def make() -> ir.Value:
        one = site.emit.scalar(1, np.int32)
        return site.emit.node(
            "Sub", [one, site.stream.protected], "candidate", I32, [site.stream.batch, site.stream.length]
        )

    return site.once("candidate", make)


def similar(site: Site, split: Split) -> Join:
    """ToMe: the candidate with the most similar key."""
    emit, stream = site.emit, site.stream
    metric = site.metric()
    mask = emit.node(
        "Cast",
        [_candidate(site)],
        "candidate_float",
        metric.dtype,
        [stream.batch, stream.length],
        to=int(metric.dtype or F32),
    )
    masked = emit.node(
        "Mul", [metric, last_axis(emit, mask, "candidate_column")], "candidate_keys", metric.dtype, dims(metric) or []
    )
    a = rows(site, metric, split.rest, "rest_keys", split.dropped)
    b = rows(site, masked, split.index, "kept_keys", split.kept)
    sizes = {**site.sizes(), "S": split.dropped, "R": split.kept}
    target, _ = emit.op("BipartiteMatch", [a, b, split.count], ["target", "similarity"], sizes)
    ones = emit.node("Shape", [split.rest], "rest_shape", I64, [2])
    return Join(target, emit.node("Expand", [emit.scalar(1.0), ones], "weight", F32, [stream.batch, split.dropped]), 1)


def attended(site: Site, split: Split) -> Join:
    """FiCoCo-V: the candidates to which it pays most attention, those at or above the quantile eps."""
    emit, stream = site.emit, site.stream
    affinity = rows(site, site.map(), split.rest, "affinity", split.dropped)
    eps = round(site.options.eps * 1000)
    known = isinstance(split.kept, int) and isinstance(split.dropped, int)
    members = split.kept - ((split.kept - 1) * eps + 999) // 1000 if known else None
    total = split.dropped * members if known and members is not None else None
    target, weight = emit.op(
        "FicocoCorrelate",
        [affinity, split.index, _candidate(site), split.count],
        ["target", "weight"],
        {"B": stream.batch, "M": split.dropped, "S": stream.length, "C": split.kept, "T": total},
        eps_permille=eps,
    )
    return Join(target, weight, members)


JOINS = {"tome": similar, "ficoco-v": attended}


def compress(site: Site, split: Split, join: Join | None) -> Stream:
    """The shorter stream, by the compression of the options."""
    emit, stream, kind = site.emit, site.stream, site.options.compress
    batch = stream.batch
    kept = rows(site, stream.tokens, split.index, "kept", split.kept)
    size = gathered(emit, stream.size, split.index, "kept_size", split.kept)
    place = gathered(emit, stream.place, split.index, "kept_place", split.kept)
    length, count = split.kept, split.count
    if join is None:
        negative = emit.node("Sub", [split.rest, split.rest], "rest_zero", I32, [batch, split.dropped])
        nowhere = emit.node(
            "Sub",
            [negative, emit.scalar(1, np.int32)],
            "nowhere",
            I32,
            [batch, split.dropped],
        )
        target = nowhere
        if kind == "fuse":
            kept, size, place, length, count = _fused(site, split, kept, size, place)
    else:
        target = join.target
        rest = split.rest
        if join.members != 1:
            rest = repeated(emit, rest, join.target, join.members)
        members = rows(site, stream.tokens, rest, "rest_rows", (dims(join.target) or [None, None])[1])
        member_size = gathered(emit, stream.size, rest, "rest_size", (dims(join.target) or [None, None])[1])
        kept, size = _merged(site, split, join, kept, size, members, member_size)
    (owner,) = emit.op(
        "TrackTokens",
        [stream.owner, split.slot, split.rest, target, split.count],
        ["owner"],
        {"B": batch, "N": stream.original},
    )
    after = emit.node("Shape", [place], "kept_length", I64, [1], start=1, end=2)
    protected = emit.node(
        "Slice", [stream.protected, emit.ints(0), after, emit.ints(1)], "protected", I32, [batch, length]
    )
    return Stream(kept, batch, length, stream.original, owner, place, size, protected, count)


def _fused(
    site: Site, split: Split, kept: ir.Value, size: ir.Value, place: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value, Any, ir.Value]:
    """EViT: one more token, last: the sum of the dropped ones weighted by their scores, which are not normalised."""
    emit, stream = site.emit, site.stream
    batch, width = stream.batch, (dims(stream.tokens) or [None] * 3)[2]
    length = split.kept + 1 if isinstance(split.kept, int) else ir.SymbolicDim(f"{emit.label}.tokens")
    by = site.shared.get("weight", stream.size)
    weight = gathered(emit, by, split.rest, "fuse_weight", split.dropped)
    row = emit.node("Unsqueeze", [weight, emit.ints(1)], "fuse_row", F32, [batch, 1, split.dropped])
    members = rows(site, stream.tokens, split.rest, "rest_rows", split.dropped)
    token = emit.node("MatMul", [row, members], "fused", stream.tokens.dtype, [batch, 1, width])
    joined = emit.node("Concat", [kept, token], "kept_and_fused", stream.tokens.dtype, [batch, length, width], axis=1)
    rest_size = gathered(emit, stream.size, split.rest, "rest_size", split.dropped)
    sum_size = emit.node("ReduceSum", [rest_size, emit.ints(1)], "fused_size", F32, [batch, 1], keepdims=1)
    sizes = emit.node("Concat", [size, sum_size], "sizes", F32, [batch, length], axis=1)
    first = emit.node("Slice", [place, emit.ints(0), emit.ints(1), emit.ints(1)], "a_place", I32, [batch, 1])
    one = emit.scalar(1, np.int32)
    none = emit.node(
        "Sub", [emit.node("Sub", [first, first], "no_place", I32, [batch, 1]), one], "fused_place", I32, [batch, 1]
    )
    places = emit.node("Concat", [place, none], "places", I32, [batch, length], axis=1)
    return joined, sizes, places, length, emit.node("Add", [split.count, one], "fused_count", I32, [batch])


def _merged(
    site: Site, split: Split, join: Join, kept: ir.Value, size: ir.Value, members: ir.Value, member_size: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Tokens and sizes after the dropped ones joined."""
    emit, stream = site.emit, site.stream
    batch, total = stream.batch, (dims(join.target) or [None, None])[1]
    width = (dims(stream.tokens) or [None] * 3)[2]
    share = emit.node("Mul", [join.weight, member_size], "member_share", F32, [batch, total])
    sizes = {"B": batch, "R": split.kept, "E": width, "S": total}
    if site.options.compress == "size":
        merged, merged_size = emit.op(
            "MergeTokens", [kept, size, members, share, join.target], ["merged", "merged_size"], sizes
        )
        return merged, merged_size
    ones = emit.node(
        "Expand",
        [emit.scalar(1.0), emit.node("Shape", [split.index], "kept_shape", I64, [2])],
        "ones",
        F32,
        [batch, split.kept],
    )
    merged, _ = emit.op("MergeTokens", [kept, ones, members, join.weight, join.target], ["merged", "weight_sum"], sizes)
    # Sizes add up with the same weights: a mean of ones by size, times its weight.
    column = last_axis(emit, ones, "ones_column")
    member_column = last_axis(
        emit,
        emit.node(
            "Expand",
            [emit.scalar(1.0), emit.node("Shape", [join.target], "target_shape", I64, [2])],
            "member_ones",
            F32,
            [batch, total],
        ),
        "member_ones_column",
    )
    _, merged_size = emit.op(
        "MergeTokens",
        [column, size, member_column, share, join.target],
        ["ones_merged", "merged_size"],
        {**sizes, "E": 1},
    )
    return merged, merged_size

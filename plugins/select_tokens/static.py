"""SelectTokens for TensorRT: rank by counting pairs, without a Loop.

An Attention that comes after a Loop that comes after an Attention gets no fused kernel from TensorRT-RTX 1.7, so a body
that loops costs every later layer its kernel. Counting S x S pairs is small beside attention over the same pairs.
"""

from __future__ import annotations

from onnxscript import script

from plugins._body import TRTPASS, Float32, Int32, op
from plugins.select_tokens.body import LARGEST


@script(TRTPASS, default_opset=op)
def SelectTokens(
    score: Float32, keep: Int32, lengths: Int32, window: int = 0, max_keep_permille: int = 1000
) -> tuple[Int32, Int32]:
    axis1 = op.Constant(value_ints=[1])
    axis2 = op.Constant(value_ints=[2])
    axis3 = op.Constant(value_ints=[3])
    zero = op.Cast(op.Constant(value_int=0), to=6)
    tokens = op.Shape(score, start=2, end=3)  # [1]: S
    thousand = op.Constant(value_ints=[1000])
    capacity = (tokens * max_keep_permille + op.Constant(value_ints=[999])) / thousand  # [1]: C
    position = op.Range(zero, op.Cast(op.Squeeze(tokens), to=6), op.Cast(op.Constant(value_int=1), to=6))  # [S] int32

    # Rows [B, 1]: how many are kept, how many of them are protected, and which tokens then compete (candidates).
    length = op.Unsqueeze(lengths, axis1)
    count = op.Max(op.Min(op.Unsqueeze(keep, axis1), length, op.Cast(capacity, to=6)), zero)
    protected_count = op.Min(length, op.Cast(op.Constant(value_int=window), to=6))
    scarce = count < protected_count  # not even the protected fit: they compete among themselves
    protected = op.And(position >= length - protected_count, position < length)  # [B, S]
    unprotected = position < length - protected_count
    candidate = op.Unsqueeze(op.Or(op.And(scarce, protected), op.And(op.Not(scarce), unprotected)), axis1)  # [B, 1, S]
    forced = op.Unsqueeze(op.And(op.Not(scarce), protected), axis1)
    need = op.Unsqueeze(op.Where(scarce, count, count - protected_count), axis1)  # [B, 1, 1]

    finite = op.Clip(op.Where(op.IsNaN(score), -LARGEST, score), -LARGEST, LARGEST)
    ranked = op.Where(candidate, finite, op.Constant(value_float=float("-inf")))  # [B, N, S]

    # Rank of each candidate: how many come before it, by score and then by position. The pairs `[B, N, S, S]` live
    # inside one sum: TensorRT fuses the comparisons into it and keeps none of them.
    rival = op.Unsqueeze(ranked, axis2)  # [B, N, 1, S]
    own = op.Unsqueeze(ranked, axis3)  # [B, N, S, 1]
    earlier = op.Unsqueeze(position, op.Constant(value_ints=[0])) < op.Unsqueeze(position, axis1)  # [S, S]
    ahead = op.Or(rival > own, op.And(rival == own, earlier))
    rank = op.ReduceSum(op.Cast(ahead, to=6), axis3, keepdims=0)  # [B, N, S]
    kept = op.Or(op.And(candidate, rank < need), forced)

    # Every token gets its own slot: kept ones 0 .. count - 1 in order, the others behind them. Then cut to C.
    slot = op.CumSum(op.Cast(kept, to=6), op.Constant(value_int=2), exclusive=1)
    counts = op.Unsqueeze(count, axis2)  # [B, 1, 1]
    order = op.Where(kept, slot, counts + (position - slot))
    updates = op.Expand(position, op.Shape(score))
    index = op.Slice(op.ScatterElements(slot, order, updates, axis=2), op.Constant(value_ints=[0]), capacity, axis2)
    filled = op.Range(zero, op.Cast(op.Squeeze(capacity), to=6), op.Cast(op.Constant(value_int=1), to=6)) < counts
    return op.Where(filled, index, op.Cast(tokens, to=6)), op.Expand(count, op.Shape(score, start=0, end=2))

"""SelectTokens in standard operators: bisect the threshold, take ties by position, number the kept tokens."""

from __future__ import annotations

from onnxscript import script

from plugins._body import TRTPASS, Float32, Int32, op

LARGEST = 1.7014117331926443e38  # half of the largest float32, so that the sum of two bounds is finite


@script(TRTPASS, default_opset=op)
def SelectTokens(
    score: Float32, keep: Int32, lengths: Int32, window: int = 0, max_keep_permille: int = 1000
) -> tuple[Int32, Int32]:
    axis1 = op.Constant(value_ints=[1])
    axis2 = op.Constant(value_ints=[2])
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
    need = op.Unsqueeze(op.Cast(op.Where(scarce, count, count - protected_count), to=1), axis1)  # [B, 1, 1] float32

    finite = op.Clip(op.Where(op.IsNaN(score), -LARGEST, score), -LARGEST, LARGEST)
    ranked = op.Where(candidate, finite, op.Constant(value_float=float("-inf")))  # [B, N, S]

    # Invariant: at least `need` candidates >= low, fewer >= high. Stops where exactly `need` are >= low, or where low
    # and high are adjacent floats; from any two finite floats that takes fewer than 300 rounds. A row that has stopped
    # repeats its last step without effect. Counts are float32: exact to 2^24, and summed five times as fast as int32.
    high = op.Max(op.ReduceMax(ranked, axis2), -LARGEST)  # [B, N, 1], finite also where nothing is a candidate
    low = op.ReduceMin(op.Where(candidate, finite, LARGEST), axis2)
    at_top = op.ReduceSum(op.Cast(ranked >= high, to=1), axis2)
    low = op.Where(at_top >= need, high, low)
    middle = (low + high) * 0.5
    for _ in range(300):
        reached = op.ReduceSum(op.Cast(ranked >= middle, to=1), axis2)
        high = op.Where(reached > need, high, middle)
        low = op.Where(reached >= need, middle, low)
        middle = (low + high) * 0.5
        settled = op.ReduceMax(op.Min(middle - low, high - middle), keepdims=0) <= 0.0
        if settled:
            break

    above = ranked > low
    tie = ranked == low
    wanted_ties = op.Cast(need - op.ReduceSum(op.Cast(above, to=1), axis2), to=6)
    tie_rank = op.CumSum(op.Cast(tie, to=6), op.Constant(value_int=2), exclusive=1)
    kept = op.Or(op.Or(above, op.And(tie, tie_rank < wanted_ties)), forced)  # [B, N, S]

    # Every token gets its own slot: kept ones 0 .. count - 1 in order, the others behind them. Then cut to C.
    slot = op.CumSum(op.Cast(kept, to=6), op.Constant(value_int=2), exclusive=1)
    counts = op.Unsqueeze(count, axis2)  # [B, 1, 1]
    order = op.Where(kept, slot, counts + (position - slot))
    updates = op.Expand(position, op.Shape(score))
    index = op.Slice(op.ScatterElements(slot, order, updates, axis=2), op.Constant(value_ints=[0]), capacity, axis2)
    filled = op.Range(zero, op.Cast(op.Squeeze(capacity), to=6), op.Cast(op.Constant(value_int=1), to=6)) < counts
    return op.Where(filled, index, op.Cast(tokens, to=6)), op.Expand(count, op.Shape(score, start=0, end=2))

"""CoverageBudget for TensorRT: the threshold by counting pairs, without a Loop (see SelectTokens' static body)."""

from __future__ import annotations

from onnxscript import script

from plugins._body import TRTPASS, Float32, Int32, op


@script(TRTPASS, default_opset=op)
def CoverageBudget(
    mass: Float32, lengths: Int32, coverage_ppm: int = 5000, window: int = 128, min_tokens: int = 1024, prefix: int = 1
) -> Int32:
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    million = op.Constant(value_int=1000000)
    last_axis = op.Constant(value_ints=[1])
    length = op.Unsqueeze(op.Cast(lengths, to=7), last_axis)  # [B, 1]
    key = op.Range(zero, op.Squeeze(op.Shape(mass, start=2, end=3)), one)  # [S]
    domain = key < length - prefix * window  # [B, S]

    voters = op.Cast(op.Squeeze(op.Shape(mass, start=1, end=2)) * window, to=1)
    clipped = op.Clip(op.Where(op.IsNaN(mass), 0.0, mass), 0.0, op.Cast(op.Constant(value_int=window), to=1))
    fixed = op.Cast(op.Round(clipped * (1073741824.0 / voters)), to=6)  # [B, H, S] int32
    share = op.Where(domain, op.Cast(op.ReduceSum(fixed, last_axis, keepdims=0), to=7), zero)  # [B, S]

    # target = ceil(coverage * total / 10^6), in two parts so that no product passes 2^63.
    total = op.ReduceSum(share, last_axis)  # [B, 1]
    whole = total / million
    rest = (total - whole * million) * coverage_ppm
    target = whole * coverage_ppm + (rest + (million - one)) / million

    # The value at which the target is reached: the largest one whose smaller columns hold less than the target. The
    # pairs `[B, S, S]` live inside one sum: TensorRT fuses the comparisons into it and keeps none of them.
    rival = op.Unsqueeze(share, last_axis)  # [B, 1, S]
    own = op.Unsqueeze(share, op.Constant(value_ints=[2]))  # [B, S, 1]
    smaller = op.ReduceSum(op.Where(rival < own, rival, zero), op.Constant(value_ints=[2]), keepdims=0)  # [B, S]
    high = op.ReduceMax(op.Where(smaller < target, share, zero), last_axis)  # [B, 1]

    below = op.And(share < high, domain)
    below_mass = op.ReduceSum(op.Where(below, share, zero), last_axis)
    below_count = op.ReduceSum(op.Cast(below, to=7), last_axis)
    value = op.Max(high, one)
    ties = (target - below_mass + (value - one)) / value  # ceil: how many columns of exactly this value are needed
    pruned = op.Where(target <= zero, zero, below_count + ties)  # [B, 1]

    inside = length - prefix * window - pruned  # columns of the domain that stay
    floor = op.Where(prefix == zero, one, op.Constant(value_int=min_tokens))
    kept = op.Min(op.Max(inside, floor) + prefix * window, length)
    dense = op.Or(length <= op.Constant(value_int=min_tokens) + window, pruned <= prefix * one)
    return op.Cast(op.Squeeze(op.Where(dense, length, kept), last_axis), to=6)

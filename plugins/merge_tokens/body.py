"""MergeTokens in standard operators: weighted sums by target, the weights themselves as one more column."""

from __future__ import annotations

from onnxscript import script

from plugins._body import TRTPASS, Float32, Floats, Int32, op
from plugins._rows import multiplied_sums, scattered_sums, segment_or_bin


@script(TRTPASS, default_opset=op)
def weighted(x: Floats, size: Float32) -> Float32:
    """`[B, S, E + 1]`: ``size * x`` and, last, ``size``."""
    weight = op.Unsqueeze(size, op.Constant(value_ints=[2]))
    return op.Concat(op.Cast(x, to=1) * weight, weight, axis=2)


@script(TRTPASS, default_opset=op)
def divided(total: Float32, base: Floats) -> tuple[Floats, Float32]:
    """Totals `[B, R, E + 1]` as means `[B, R, E]` and sizes `[B, R]`; size 0 has mean 0."""
    last = op.Constant(value_ints=[2])
    width = op.Shape(base, start=2, end=3)  # [1]: E
    size = op.Slice(total, width, width + op.Constant(value_ints=[1]), last)  # [B, R, 1]
    empty = size == 0.0
    mean = op.Slice(total, op.Constant(value_ints=[0]), width, last) / op.Where(empty, 1.0, size)
    return op.CastLike(op.Where(empty, 0.0, mean), base), op.Squeeze(size, last)


@script(TRTPASS, default_opset=op)
def scattered(base: Floats, base_size: Float32, x: Floats, size: Float32, target: Int32) -> tuple[Floats, Float32]:
    rows = op.Shape(base, start=1, end=2)  # [1]: R
    joined = scattered_sums(weighted(x, size), segment_or_bin(target, rows), rows)
    merged, merged_size = divided(weighted(base, base_size) + joined, base)
    return merged, merged_size


@script(TRTPASS, default_opset=op)
def multiplied(base: Floats, base_size: Float32, x: Floats, size: Float32, target: Int32) -> tuple[Floats, Float32]:
    rows = op.Shape(base, start=1, end=2)  # [1]: R
    joined = multiplied_sums(weighted(x, size), segment_or_bin(target, rows), rows)
    merged, merged_size = divided(weighted(base, base_size) + joined, base)
    return merged, merged_size

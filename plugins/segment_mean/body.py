"""SegmentMean in standard operators: sums by segment, with a column of ones that sums to the sizes."""

from __future__ import annotations

from onnxscript import script

from plugins._body import TRTPASS, Float32, Floats, Int32, Int64, op
from plugins._rows import multiplied_sums, scattered_sums, segment_or_bin


@script(TRTPASS, default_opset=op)
def capacity_of(x: Floats, max_segments_permille: int = 1000) -> Int64:
    """`[1]`: C."""
    tokens = op.Shape(x, start=1, end=2)
    return (tokens * max_segments_permille + op.Constant(value_ints=[999])) / op.Constant(value_ints=[1000])


@script(TRTPASS, default_opset=op)
def with_ones(x: Floats) -> Float32:
    """`[B, S, E + 1]` float32."""
    ones = op.Expand(1.0, op.Concat(op.Shape(x, start=0, end=2), op.Constant(value_ints=[1]), axis=0))
    return op.Concat(op.Cast(x, to=1), ones, axis=2)


@script(TRTPASS, default_opset=op)
def divided(total: Float32, x: Floats) -> tuple[Floats, Float32]:
    """Totals `[B, C, E + 1]` as means `[B, C, E]` and sizes `[B, C]`; an empty segment has total 0."""
    last = op.Constant(value_ints=[2])
    width = op.Shape(x, start=2, end=3)  # [1]: E
    size = op.Slice(total, width, width + op.Constant(value_ints=[1]), last)  # [B, C, 1]
    mean = op.Slice(total, op.Constant(value_ints=[0]), width, last) / op.Max(size, 1.0)
    return op.CastLike(mean, x), op.Squeeze(size, last)


@script(TRTPASS, default_opset=op)
def scattered(x: Floats, label: Int32, max_segments_permille: int = 1000) -> tuple[Floats, Int32]:
    capacity = capacity_of(x, max_segments_permille=max_segments_permille)
    mean, size = divided(scattered_sums(with_ones(x), segment_or_bin(label, capacity), capacity), x)
    return mean, op.Cast(size, to=6)


@script(TRTPASS, default_opset=op)
def multiplied(x: Floats, label: Int32, max_segments_permille: int = 1000) -> tuple[Floats, Int32]:
    capacity = capacity_of(x, max_segments_permille=max_segments_permille)
    mean, size = divided(multiplied_sums(with_ones(x), segment_or_bin(label, capacity), capacity), x)
    return mean, op.Cast(size, to=6)

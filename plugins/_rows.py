"""Steps that bodies of several operators share: unit vectors, and sums of rows by segment."""

from __future__ import annotations

from typing import Any

from onnxscript import BOOL, script

from plugins._body import TRTPASS, Float32, Floats, Int32, Int64, op

Bool: Any = BOOL[...]

LARGEST = 3.4028234663852886e38  # of float32
SMALLEST = 1.1754943508222875e-38  # normal number of float32


@script(TRTPASS, default_opset=op)
def unit_rows(x: Floats) -> tuple[Float32, Bool]:
    """``plugins._cosine.unit_rows``: `[B, S, E]` float32 with zeros for rows without a direction, and `[B, S]`.

    What is not finite is replaced before it is divided or multiplied: 0 * inf would be NaN in every product.
    """
    last = op.Constant(value_ints=[2])
    wide = op.Cast(x, to=1)
    square = op.ReduceSum(wide * wide, last)  # [B, S, 1]
    directed = op.And(square >= SMALLEST, square <= LARGEST)
    return op.Where(directed, wide, 0.0) / op.Sqrt(op.Where(directed, square, 1.0)), op.Squeeze(directed, last)


@script(TRTPASS, default_opset=op)
def segment_or_bin(label: Int32, capacity: Int64) -> Int32:
    """Labels `[B, S]` with C, the bin, in place of everything outside [0, C)."""
    bin_ = op.Cast(capacity, to=6)  # [1]
    zero = op.Cast(op.Constant(value_int=0), to=6)
    return op.Where(op.And(label >= zero, label < bin_), label, bin_)


@script(TRTPASS, default_opset=op)
def scattered_sums(values: Float32, segment: Int32, capacity: Int64) -> Float32:
    """Sums `[B, C, E]` of the rows of `[B, S, E]` with segment c, added in ascending order; segment C is dropped.

    ScatterElements, though an index is spelt out for each element: ONNX Runtime 1.31 adds the duplicates of a ScatterND
    from several threads at once and loses some.
    """
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    shape = op.Concat(op.Shape(values, start=0, end=1), capacity + one, op.Shape(values, start=2, end=3), axis=0)
    index = op.Expand(op.Unsqueeze(segment, op.Constant(value_ints=[2])), op.Shape(values))
    sums = op.ScatterElements(op.Expand(0.0, shape), index, values, axis=1, reduction="add")
    return op.Slice(sums, zero, capacity, one)


@script(TRTPASS, default_opset=op)
def multiplied_sums(values: Float32, segment: Int32, capacity: Int64) -> Float32:
    """As ``scattered_sums`` by a product with the members `[B, C, S]`: TensorRT-RTX has no scatter that adds.

    NaN and infinity must reach their own segment only, but 0 * inf is NaN: they are counted in products of their own.
    """
    slots = op.Range(op.Constant(value_int=0), op.Squeeze(capacity), op.Constant(value_int=1))
    slot = op.Unsqueeze(op.Cast(slots, to=6), op.Constant(value_ints=[1]))  # [C, 1]
    member = op.Cast(op.Unsqueeze(segment, op.Constant(value_ints=[1])) == slot, to=1)  # [B, C, S]
    up = op.Not(values <= LARGEST)  # +inf and NaN
    down = op.Not(values >= -LARGEST)  # -inf and NaN
    finite = op.Where(op.Or(up, down), 0.0, values)
    sums = op.MatMul(member, finite)
    ups = op.MatMul(member, op.Cast(up, to=1)) > 0.0
    downs = op.MatMul(member, op.Cast(down, to=1)) > 0.0
    infinity = op.Constant(value_float=float("inf"))
    one_sided = op.Where(ups, infinity, op.Where(downs, op.Neg(infinity), sums))
    return op.Where(op.And(ups, downs), op.Constant(value_float=float("nan")), one_sided)

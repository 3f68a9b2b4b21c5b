"""TrimIndex in standard operators: a comparison, and where lengths may depend on data a Slice."""

from __future__ import annotations

from onnxscript import script

from plugins._body import TRTPASS, Int32, op


@script(TRTPASS, default_opset=op)
def padded(index: Int32, count: Int32) -> Int32:
    zero = op.Cast(op.Constant(value_int=0), to=6)
    one = op.Cast(op.Constant(value_int=1), to=6)
    places = op.Cast(op.Squeeze(op.Shape(index, start=1, end=2)), to=6)
    inside = op.Range(zero, places, one) < op.Unsqueeze(count, op.Constant(value_ints=[1]))
    return op.Where(inside, index, places)


@script(TRTPASS, default_opset=op)
def cut(index: Int32, count: Int32) -> Int32:
    first = op.Constant(value_ints=[0])
    # A Max with 0: a batch of no rows has no largest count.
    longest = op.Max(op.Cast(op.ReduceMax(count, keepdims=1), to=7), first)
    return op.Slice(padded(index, count), first, longest, op.Constant(value_ints=[1]))

"""CompactSlots in standard operators: an exclusive running sum in int32 (in float16 it would stop at 2048)."""

from __future__ import annotations

from onnxscript import script

from plugins._body import TRTPASS, Int32, op


@script(TRTPASS, default_opset=op)
def CompactSlots(keep: Int32, held: Int32, lengths: Int32) -> tuple[Int32, Int32]:
    zero = op.Cast(op.Constant(value_int=0), to=6)
    one = op.Cast(op.Constant(value_int=1), to=6)
    last = op.Constant(value_ints=[2])
    tokens = op.Cast(op.Squeeze(op.Shape(keep, start=2, end=3)), to=6)
    token = op.Range(zero, tokens, one)  # [S]
    valid = token < op.Unsqueeze(lengths, op.Constant(value_ints=[1, 2]))  # [B, 1, S]
    kept = op.And(op.Not(keep == zero), valid)  # [B, Hkv, S]
    count = op.Cast(kept, to=6)
    before = op.CumSum(count, op.Constant(value_int=2), exclusive=1)
    start = op.Unsqueeze(held, last)  # [B, Hkv, 1]
    slot = op.Where(kept, start + before, op.Neg(one))
    return slot, held + op.ReduceSum(count, last, keepdims=0)

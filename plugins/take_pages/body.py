"""TakePages in standard operators: an exclusive running sum of pages over owners, and one gather from the list.

An owner needs its entry m where m page_size < kept: no division of ``kept`` that could pass 2^31, nothing to clip.
"""

from __future__ import annotations

from onnxscript import script

from plugins._body import TRTPASS, Int32, op


@script(TRTPASS, default_opset=op)
def TakePages(kept: Int32, free: Int32, slot: Int32, page_size: int = 64) -> Int32:
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    last = op.Constant(value_ints=[2])
    size = op.Cast(page_size, to=7)
    entries = (op.Squeeze(op.Shape(slot, start=2, end=3)) + size - one) / size  # M
    entry = op.Range(zero, entries, one)  # [M]
    start = op.Cast(entry * size, to=6)  # [M]: below S
    needed = start < op.Unsqueeze(kept, last)  # [B, Hkv, M]
    wanted = op.ReduceSum(op.Cast(needed, to=6), last, keepdims=0)  # [B, Hkv] pages
    before = op.CumSum(op.Reshape(wanted, op.Constant(value_ints=[-1])), zero, exclusive=1)  # [B Hkv]
    first = op.Unsqueeze(op.Reshape(before, op.Shape(kept), allowzero=1), last)  # [B, Hkv, 1]

    none = op.Cast(op.Constant(value_ints=[-1]), to=6)
    ended = op.Concat(free, none, axis=0)  # one more, none, for all that is not there
    end = op.Cast(op.Shape(free), to=6)  # [1]: F
    at = op.Where(needed, op.Min(first + op.Cast(entry, to=6), end), end)  # [B, Hkv, M]
    return op.Max(op.Gather(ended, at), none)

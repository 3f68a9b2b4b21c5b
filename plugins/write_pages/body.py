"""WritePages in standard operators: rows of the pool, one more for what goes nowhere, and a scatter of whole rows."""

from __future__ import annotations

from onnxscript import script

from plugins._body import TRTPASS, Floats, Int32, op


@script(TRTPASS, default_opset=op)
def WritePages(pages: Floats, new: Floats, slot: Int32, page_table: Int32) -> Floats:
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    minus = op.Constant(value_ints=[-1])
    page_size = op.Shape(pages, start=1, end=2)  # [1]: Z
    width = op.Shape(pages, start=2, end=3)  # [1]: D
    rows = op.Shape(pages, start=0, end=1) * page_size  # [1]: P Z
    entries = op.Shape(page_table, start=2, end=3)  # [1]: M
    owners = op.ReduceProd(op.Shape(page_table, start=0, end=2))  # [1]: B Hkv

    # One more entry for each owner, -1, for slots beyond the table: nothing is read outside it. [B Hkv (M + 1)]
    tail = op.Expand(op.Cast(minus, to=6), op.Concat(op.Shape(page_table, start=0, end=2), one, axis=0))
    table = op.Reshape(op.Concat(page_table, tail, axis=2), minus)
    wide = op.Reshape(op.Cast(slot, to=7), op.Concat(owners, minus, axis=0))  # [B Hkv, S] int64
    inside = op.And(wide >= zero, wide < entries * page_size)
    safe = op.Where(inside, wide, zero)
    owner = op.Unsqueeze(op.Range(op.Squeeze(zero), op.Squeeze(owners), op.Squeeze(one)), one)  # [B Hkv, 1]
    entry = op.Where(inside, safe / page_size, entries)
    page = op.Cast(op.Gather(table, owner * (entries + one) + entry), to=7)  # [B Hkv, S]
    at = page * page_size + op.Mod(safe, page_size)
    goes = op.And(page >= zero, at < rows)
    target = op.Where(goes, at, rows)  # the row behind the pool takes the rest

    flat = op.Reshape(pages, op.Concat(rows, width, axis=0), allowzero=1)
    bin_ = op.Expand(op.CastLike(0.0, pages), op.Concat(one, width, axis=0))
    update = op.Reshape(new, op.Concat(minus, width, axis=0))
    index = op.Reshape(target, op.Constant(value_ints=[-1, 1]))
    scattered = op.ScatterND(op.Concat(flat, bin_, axis=0), index, update)
    kept = op.Slice(scattered, zero, rows, zero)
    return op.Reshape(kept, op.Shape(pages), allowzero=1)

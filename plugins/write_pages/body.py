"""WritePages in standard operators: a scatter of whole rows, by page and row within it.

``dynamic`` scatters the rows that go somewhere, straight into the pool: ONNX Runtime's ScatterND copies nothing where
its input and output are bound to the same memory, so a decode step touches one row of each owner.

``static`` cannot leave rows out, so a row that goes nowhere repeats what the first one that goes somewhere writes: the
same values at the same place. If none does, the first row of the pool is written over itself. (A row behind the pool
that takes them would cost two more copies of the pool in each layer.)
"""

from __future__ import annotations

from typing import Any

from onnx.helper import make_tensor
from onnxscript import BOOL, script

from plugins._body import TRTPASS, Floats, Int32, Int64, op

Bool: Any = BOOL[...]


@script(TRTPASS, default_opset=op)
def places(pages: Floats, slot: Int32, page_table: Int32) -> tuple[Int64, Int64, Bool]:
    """Page and row within it of each token, and whether it goes there, all `[B Hkv, S]`; the row is in [0, Z)."""
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    minus = op.Constant(value_ints=[-1])
    page_size = op.Shape(pages, start=1, end=2)  # [1]: Z
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
    goes = op.And(page >= zero, page < op.Shape(pages, start=0, end=1))
    return page, op.Mod(safe, page_size), goes


@script(TRTPASS, default_opset=op)
def write_in_place(pages: Floats, new: Floats, slot: Int32, page_table: Int32) -> Floats:
    last = op.Constant(value_ints=[1])
    page, row, goes = places(pages, slot, page_table)
    flat = op.Constant(value_ints=[-1])
    token = op.Squeeze(op.NonZero(op.Reshape(goes, flat)), op.Constant(value_ints=[0]))  # [N] of those that go
    to_page = op.Unsqueeze(op.Gather(op.Reshape(page, flat), token), last)
    to_row = op.Unsqueeze(op.Gather(op.Reshape(row, flat), token), last)
    rows = op.Reshape(new, op.Concat(flat, op.Shape(pages, start=2, end=3), axis=0))  # [B Hkv S, D]
    return op.ScatterND(pages, op.Concat(to_page, to_row, axis=1), op.Gather(rows, token))


@script(TRTPASS, default_opset=op)
def write_all(pages: Floats, new: Floats, slot: Int32, page_table: Int32) -> Floats:
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    flat = op.Constant(value_ints=[-1])
    column = op.Constant(value_ints=[-1, 1])
    page, row, goes = places(pages, slot, page_table)
    index = op.Concat(op.Reshape(page, column), op.Reshape(row, column), axis=1)  # [N, 2], N = B Hkv S
    rows = op.Reshape(new, op.Concat(flat, op.Shape(pages, start=2, end=3), axis=0))  # [N, D]
    # Behind them the first row of the pool, where it has one, and its place.
    axes = op.Constant(value_ints=[0, 1])
    start, end = op.Constant(value_ints=[0, 0]), op.Constant(value_ints=[1, 1])
    head = op.Slice(pages, start, end, axes)  # [min(P, 1), 1, D]
    values = op.Concat(rows, op.Squeeze(head, one), axis=0)  # [N + 1, D]
    targets = op.Concat(index, op.Constant(value=make_tensor("origin", 7, [1, 2], [0, 0])), axis=0)  # [N + 1, 2]

    number = op.Cast(op.Shape(rows, start=0, end=1), to=6)  # [1]: N
    none = op.Cast(op.Constant(value_int=0), to=6)
    each = op.Range(none, op.Squeeze(number), op.Cast(op.Constant(value_int=1), to=6))  # [N]
    real = op.Reshape(goes, flat)
    first = op.ReduceMin(op.Concat(op.Where(real, each, number), number, axis=0), zero)  # [1]: N if none goes
    taken = op.Where(real, each, first)
    # Into a pool without pages nothing is written.
    taken = op.Slice(taken, zero, op.Shape(taken) * op.Min(op.Shape(pages, start=0, end=1), one), zero)
    return op.ScatterND(pages, op.Gather(targets, taken), op.Gather(values, taken))

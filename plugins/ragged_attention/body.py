"""RaggedAttention in standard operators: gather pages into a padded view, hide what is not held, attend with a mask.

Each owner (batch row, KV head) becomes a row of the batch with one KV head and its G query heads, so that every row
has its own keys. What is not held is replaced by 0 and not only masked: NaN times a probability of 0 is NaN.

Behind the slots comes one more, with a key and a value of 0, which only queries that see nothing else see: their output
is exactly 0, no softmax is empty, and a cache without any page needs no branch.
"""

from __future__ import annotations

from typing import Any

from onnxscript import BOOL, script

from plugins._body import TRTPASS, Floats, Int32, op

Bool: Any = BOOL[...]


@script(TRTPASS, default_opset=op)
def paged_view(pool: Floats, table: Int32, lengths: Int32) -> Floats:
    """The slots of each owner and one more `[B Hkv, 1, M Z + 1, D]`; 0 where a slot is not held."""
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    axis2 = op.Constant(value_ints=[2])
    page_size = op.Shape(pool, start=1, end=2)  # [1]: Z
    entries = op.Shape(table, start=2, end=3)  # [1]: M
    slots = entries * page_size  # [1]: M Z
    owners = op.ReduceProd(op.Shape(lengths))  # [1]: B Hkv
    length = op.Cast(op.Unsqueeze(lengths, axis2), to=7)  # [B, Hkv, 1]

    first_slot = op.Range(op.Squeeze(zero), op.Squeeze(entries), op.Squeeze(one)) * page_size  # [M]
    page = op.Where(first_slot < length, table, op.CastLike(0, table))  # unused entries may be anything
    view = op.Reshape(  # [B Hkv, 1, M Z, D]
        op.Gather(pool, page), op.Concat(owners, one, slots, op.Shape(pool, start=2, end=3), axis=0), allowzero=1
    )
    slot = op.Range(op.Squeeze(zero), op.Squeeze(slots), op.Squeeze(one))  # [M Z]
    held = op.Reshape(slot < length, op.Concat(owners, one, slots, one, axis=0), allowzero=1)
    nothing = op.CastLike(0.0, pool)
    empty = op.Expand(nothing, op.Concat(owners, one, one, op.Shape(pool, start=2, end=3), axis=0))
    return op.Concat(op.Where(held, view, nothing), empty, axis=2)


@script(TRTPASS, default_opset=op)
def visibility(q: Floats, slots: Int32, lengths: Int32, queries: Int32) -> tuple[Bool, Bool]:
    """Which queries see any slot `[B, Hkv, S, 1]`, and which slots each of them sees `[B Hkv, 1, S, slots + 1]`."""
    zero = op.Cast(op.Constant(value_int=0), to=6)
    one = op.Cast(op.Constant(value_int=1), to=6)
    tokens = op.Shape(q, start=2, end=3)  # [1]: S
    token = op.Range(zero, op.Cast(op.Squeeze(tokens), to=6), one)  # [S]
    asked = op.Unsqueeze(queries, op.Constant(value_ints=[1, 2]))  # [B, 1, 1]
    limit = op.Unsqueeze(lengths, op.Constant(value_ints=[2])) - asked + token + one  # [B, Hkv, S]
    limit = op.Unsqueeze(op.Where(token < asked, limit, zero), op.Constant(value_ints=[3]))  # [B, Hkv, S, 1]
    sees = limit > zero
    slot = op.Range(zero, slots + one, one)  # [slots + 1]
    visible = op.Or(slot < limit, op.And(op.Not(sees), slot == slots))  # [B, Hkv, S, slots + 1]
    owners = op.ReduceProd(op.Shape(lengths))
    alone = op.Constant(value_ints=[1])
    return sees, op.Reshape(visible, op.Concat(owners, alone, tokens, op.Shape(visible, start=3, end=4), axis=0))


@script(TRTPASS, default_opset=op)
def attend(
    q: Floats,
    k_pages: Floats,
    v_pages: Floats,
    page_table: Int32,
    lengths: Int32,
    queries: Int32,
    scale: float = 0.0,
) -> Floats:
    """Over every entry of the table, each of which must stand for a page where the pool has one."""
    key = paged_view(k_pages, page_table, lengths)  # [B Hkv, 1, M Z + 1, D]
    value = paged_view(v_pages, page_table, lengths)  # [B Hkv, 1, M Z + 1, Dv]
    slots = op.Cast(op.Squeeze(op.Shape(key, start=2, end=3)), to=6) - op.Cast(op.Constant(value_int=1), to=6)
    sees, visible = visibility(q, slots, lengths, queries)

    # Attention's own default is 1 / sqrt(D); the ratio to it is 1 unless another scale was given.
    minus_one = op.Constant(value_ints=[-1])
    sizes = op.Shape(q, start=2, end=4)  # [2]: S, D
    width = op.Cast(op.Shape(q, start=3, end=4), to=1)
    ratio = op.Where(scale == 0.0, 1.0, scale * op.Sqrt(width))
    query = op.Reshape(q * op.CastLike(ratio, q), op.Concat(op.Shape(lengths), minus_one, sizes, axis=0))
    # Rows of padding may hold NaN. [B, Hkv, G, S, D]
    query = op.Where(op.Unsqueeze(sees, op.Constant(value_ints=[2])), query, op.CastLike(0.0, q))
    folded = op.Reshape(query, op.Concat(op.ReduceProd(op.Shape(lengths)), minus_one, sizes, axis=0))
    out = op.Attention(folded, key, value, visible)  # [B Hkv, G, S, Dv]
    return op.Reshape(out, op.Concat(op.Shape(q, start=0, end=3), minus_one, axis=0))


@script(TRTPASS, default_opset=op)
def padded(
    q: Floats,
    k_pages: Floats,
    v_pages: Floats,
    page_table: Int32,
    lengths: Int32,
    queries: Int32,
    scale: float = 0.0,
) -> Floats:
    """Over all M Z slots that an owner may hold; over none where the pool is empty: there is no page to read."""
    zero = op.Constant(value_ints=[0])
    pages = op.Min(op.Shape(k_pages, start=0, end=1), op.Constant(value_ints=[1]))
    readable = op.Slice(page_table, zero, op.Shape(page_table, start=2, end=3) * pages, op.Constant(value_ints=[2]))
    return attend(q, k_pages, v_pages, readable, lengths, queries, scale=scale)


@script(TRTPASS, default_opset=op)
def cut(
    q: Floats,
    k_pages: Floats,
    v_pages: Floats,
    page_table: Int32,
    lengths: Int32,
    queries: Int32,
    scale: float = 0.0,
) -> Floats:
    """Over as many pages as the longest owner uses."""
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    page_size = op.Max(op.Shape(k_pages, start=1, end=2), one)
    longest = op.Cast(op.Reshape(op.ReduceMax(lengths, keepdims=0), one), to=7)
    used = op.Slice(page_table, zero, (longest + page_size - one) / page_size, op.Constant(value_ints=[2]))
    return attend(q, k_pages, v_pages, used, lengths, queries, scale=scale)

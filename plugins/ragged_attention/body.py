"""RaggedAttention in standard operators: gather pages into a padded view, hide what is not held, attend with a mask.

Each owner (batch row, KV head) becomes a row of the batch with one KV head and its G query heads, so that every row
has its own keys. What is not held is replaced by 0 and not only masked: NaN times a probability of 0 is NaN.

Behind the slots comes one more, with a key and a value of 0, which only queries that see nothing else see: their output
is exactly 0, no softmax is empty, and a cache without any page needs no branch.

A decode step, whose owners hold very different numbers of keys, goes from owner to owner instead, where the runtime
allows lengths that depend on data: padding to the longest would read several times what is held.
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
def each_owner(
    q: Floats, k_pages: Floats, v_pages: Floats, page_table: Int32, lengths: Int32, queries: Int32, scale: float = 0.0
) -> Floats:
    """One query of each owner, over its own slots: nothing is padded to the longest. The pool has a page at least."""
    zero = op.Constant(value_ints=[0])
    minus_one = op.Constant(value_ints=[-1])
    nought = op.Cast(op.Constant(value_int=0), to=6)
    one = op.Cast(op.Constant(value_int=1), to=6)
    owners = op.ReduceProd(op.Shape(lengths), keepdims=0)  # B Hkv
    page_size = op.Cast(op.Squeeze(op.Shape(k_pages, start=1, end=2)), to=6)  # Z
    ratio = op.Where(scale == 0.0, 1.0, scale * op.Sqrt(op.Cast(op.Shape(q, start=3, end=4), to=1)))
    sizes = op.Shape(q, start=2, end=4)  # [2]: 1, D
    each = op.Reshape(owners, op.Constant(value_ints=[1]))
    query = op.Reshape(q * op.CastLike(ratio, q), op.Concat(each, minus_one, sizes, axis=0))  # [B Hkv, G, 1, D]
    held = op.Reshape(lengths, minus_one)
    asked = op.Reshape(op.Expand(op.Unsqueeze(queries, op.Constant(value_ints=[1])), op.Shape(lengths)), minus_one)
    table = op.Reshape(page_table, op.Concat(each, op.Shape(page_table, start=2, end=3), axis=0), allowzero=1)
    # A page that no slot is on, where a row of the table has none: what is read there is not used.
    table = op.Concat(table, op.Expand(nought, op.Concat(each, op.Constant(value_ints=[1]), axis=0)), axis=1)
    keys = op.Reshape(k_pages, op.Concat(minus_one, op.Shape(k_pages, start=2, end=3), axis=0))  # [P Z, D]
    values = op.Reshape(v_pages, op.Concat(minus_one, op.Shape(v_pages, start=2, end=3), axis=0))
    nothing = op.CastLike(0.0, q)
    shape = op.Concat(
        zero, op.Shape(query, start=1, end=2), op.Shape(q, start=2, end=3), op.Shape(v_pages, start=2, end=3), axis=0
    )
    out = op.Expand(nothing, shape)  # [0, G, 1, Dv]
    for i in range(owners):
        count = op.Gather(held, i)
        sees = op.And(count > nought, op.Gather(asked, i) > nought)
        slot = op.Range(nought, op.Max(count, one), one)  # [n]
        row = op.Gather(table, i)  # [M + 1]
        page = op.Where(count > nought, op.Gather(row, slot / page_size), nought)
        at = page * page_size + op.Mod(slot, page_size)
        both = op.Constant(value_ints=[0, 1])
        key = op.Unsqueeze(op.Gather(keys, at), both)  # [1, 1, n, D]
        value = op.Unsqueeze(op.Gather(values, at), both)
        mine = op.Where(sees, op.Unsqueeze(op.Gather(query, i), zero), nothing)  # [1, G, 1, D]
        rows = op.Attention(mine, key, value)
        out = op.Concat(out, op.Where(sees, rows, nothing), axis=0)
    return op.Reshape(out, op.Concat(op.Shape(q, start=0, end=3), op.Shape(v_pages, start=2, end=3), axis=0))


@script(TRTPASS, default_opset=op)
def longest(
    q: Floats, k_pages: Floats, v_pages: Floats, page_table: Int32, lengths: Int32, queries: Int32, scale: float = 0.0
) -> Floats:
    """Over as many pages as the longest owner uses."""
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    page_size = op.Max(op.Shape(k_pages, start=1, end=2), one)
    most = op.Cast(op.Reshape(op.ReduceMax(lengths, keepdims=0), one), to=7)
    used = op.Slice(page_table, zero, (most + page_size - one) / page_size, op.Constant(value_ints=[2]))
    return attend(q, k_pages, v_pages, used, lengths, queries, scale=scale)


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
    """A step of one token reads what each owner holds; one of several tokens, as much as the longest of them."""
    single = op.Equal(op.Shape(q, start=2, end=3), op.Constant(value_ints=[1]))
    filled = op.Greater(op.Size(k_pages), op.Constant(value_int=0))
    alone = op.Squeeze(op.And(single, filled))
    if alone:
        out = each_owner(q, k_pages, v_pages, page_table, lengths, queries, scale=scale)
    else:
        out = longest(q, k_pages, v_pages, page_table, lengths, queries, scale=scale)
    return out

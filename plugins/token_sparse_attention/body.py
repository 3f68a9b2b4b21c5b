"""TokenSparseAttention in standard operators: flat gathers, plain causal Attention, one inverse gather.

Compacted tokens stay in order and padding comes last, so causality among them needs no mask: a real query never sees a
padded key, and the rows of padded queries are never read.

A set serves H / N query heads and reads key head ``n * Hkv / N``; both N = H and N = Hkv are that one formula, and K
and V are gathered from their grouped heads, never expanded before. Whole rows are gathered from `[B H S, D]` because
GatherElements along D costs ten times as much in ONNX Runtime.
"""

from __future__ import annotations

from onnxscript import script

from plugins._body import TRTPASS, Floats, Int32, Int64, op


@script(TRTPASS, default_opset=op)
def slot_of_token(index: Int32, count: Int32, tokens: Int64) -> Int32:
    """The inverse of ``index``: the slot of each token `[B, N, S]`, C where it was not selected."""
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    axis2 = op.Constant(value_ints=[2])
    slots = op.Shape(index, start=2, end=3)  # [1]: C
    # Padded slots write past S, each to a place of its own.
    slot = op.Cast(op.Range(op.Squeeze(zero), op.Squeeze(slots), op.Squeeze(one)), to=6)  # [C]
    target = op.Where(slot < op.Unsqueeze(count, axis2), index, op.Cast(tokens, to=6) + slot)
    empty = op.Expand(op.Cast(slots, to=6), op.Concat(op.Shape(index, start=0, end=2), tokens + slots, axis=0))
    slot_of = op.ScatterElements(empty, target, op.Expand(slot, op.Shape(index)), axis=2)  # [B, N, S + C]
    return op.Slice(slot_of, zero, tokens, axis2)


@script(TRTPASS, default_opset=op)
def gathered(q: Floats, k: Floats, v: Floats, index: Int32, count: Int32, scale: float = 0.0) -> Floats:
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    minus_one = op.Constant(value_ints=[-1])
    axis2 = op.Constant(value_ints=[2])
    sets = op.Shape(index, start=0, end=2)  # [2]: B, N
    slots = op.Shape(index, start=2, end=3)  # [1]: C
    tokens = op.Shape(q, start=2, end=3)  # [1]: S
    width = op.Shape(q, start=3, end=4)  # [1]: D
    all_sets = op.ReduceProd(sets, keepdims=0)  # B N
    all_heads = op.ReduceProd(op.Shape(q, start=0, end=2), keepdims=0)  # B H
    key_heads = op.ReduceProd(op.Shape(k, start=0, end=2), keepdims=0)  # B Hkv
    set_number = op.Range(op.Squeeze(zero), all_sets, op.Squeeze(one))  # [B N]
    head_number = op.Range(op.Squeeze(zero), all_heads, op.Squeeze(one))  # [B H]
    tokens32 = op.Cast(tokens, to=6)

    position = op.Min(index, tokens32 - op.Cast(one, to=6))  # padding reads the last token
    per_set = op.Concat(sets, minus_one, one, axis=0)
    first_query = op.Cast(op.Reshape(head_number * tokens, per_set), to=6)  # [B, N, H / N, 1]
    query_row = first_query + op.Unsqueeze(position, axis2)  # [B, N, H / N, C]
    first_key = op.Reshape(set_number * key_heads / all_sets * tokens, op.Concat(sets, one, axis=0))  # [B, N, 1]
    key_row = op.Cast(first_key, to=6) + position  # [B, N, C]
    rows = op.Concat(minus_one, width, axis=0)
    query = op.Gather(op.Reshape(q, rows), op.Reshape(query_row, op.Concat(op.Shape(q, start=0, end=2), slots, axis=0)))
    key = op.Gather(op.Reshape(k, rows), key_row)
    value = op.Gather(op.Reshape(v, op.Concat(minus_one, op.Shape(v, start=3, end=4), axis=0)), key_row)

    # Attention's own default is 1 / sqrt(D); the ratio to it is 1 unless another scale was given.
    ratio = op.Where(scale == 0.0, 1.0, scale * op.Sqrt(op.Cast(width, to=1)))
    attended = op.Attention(query, key * op.CastLike(ratio, key), value, is_causal=1)  # [B, H, C, Dv]

    slot_of = op.Unsqueeze(slot_of_token(index, count, tokens), axis2)  # [B, N, 1, S]
    first_slot = op.Cast(op.Reshape(head_number * slots, per_set), to=6)  # [B, N, H / N, 1]
    zero_row = op.Cast(all_heads * slots, to=6)
    source = op.Where(slot_of < op.Cast(slots, to=6), first_slot + slot_of, zero_row)  # [B, N, H / N, S]
    value_width = op.Shape(v, start=3, end=4)
    flat = op.Reshape(attended, op.Concat(minus_one, value_width, axis=0))  # [B H C, Dv]
    nothing = op.Expand(op.CastLike(0.0, v), op.Concat(one, value_width, axis=0))
    return op.Gather(op.Concat(flat, nothing, axis=0), op.Reshape(source, op.Shape(q, start=0, end=3)))


@script(TRTPASS, default_opset=op)
def interleaved(q: Floats, k: Floats, v: Floats, index: Int32, count: Int32, scale: float = 0.0) -> Floats:
    """As ``gathered``, with rows ordered by slot, then head: an attention that reads `[B, C, H D]` moves none of them.

    The transposes around Attention cancel with its own where it is lowered to one that has that layout.
    """
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    minus_one = op.Constant(value_ints=[-1])
    axis2 = op.Constant(value_ints=[2])
    sets = op.Shape(index, start=0, end=2)  # [2]: B, N
    slots = op.Shape(index, start=2, end=3)  # [1]: C
    outer = op.Shape(q, start=0, end=2)  # [2]: B, H
    heads = op.Shape(q, start=1, end=2)  # [1]: H
    tokens = op.Shape(q, start=2, end=3)  # [1]: S
    width = op.Shape(q, start=3, end=4)  # [1]: D
    value_width = op.Shape(v, start=3, end=4)  # [1]: Dv
    all_sets = op.ReduceProd(sets, keepdims=0)  # B N
    all_heads = op.ReduceProd(outer, keepdims=0)  # B H
    key_heads = op.ReduceProd(op.Shape(k, start=0, end=2), keepdims=0)  # B Hkv
    set_number = op.Range(op.Squeeze(zero), all_sets, op.Squeeze(one))  # [B N]
    head_number = op.Range(op.Squeeze(zero), all_heads, op.Squeeze(one))  # [B H]
    tokens32 = op.Cast(tokens, to=6)

    position = op.Min(index, tokens32 - op.Cast(one, to=6))  # padding reads the last token
    per_set = op.Concat(sets, minus_one, one, axis=0)
    first_query = op.Cast(op.Reshape(head_number * tokens, per_set), to=6)  # [B, N, H / N, 1]
    query_row = op.Reshape(first_query + op.Unsqueeze(position, axis2), op.Concat(outer, slots, axis=0))  # [B, H, C]
    first_key = op.Reshape(set_number * key_heads / all_sets * tokens, op.Concat(sets, one, axis=0))  # [B, N, 1]
    key_row = op.Transpose(op.Cast(first_key, to=6) + position, perm=[0, 2, 1])  # [B, C, N]
    rows = op.Concat(minus_one, width, axis=0)
    query = op.Gather(op.Reshape(q, rows), op.Transpose(query_row, perm=[0, 2, 1]))  # [B, C, H, D]
    key = op.Gather(op.Reshape(k, rows), key_row)  # [B, C, N, D]
    value = op.Gather(op.Reshape(v, op.Concat(minus_one, value_width, axis=0)), key_row)  # [B, C, N, Dv]

    # Attention's own default is 1 / sqrt(D); the ratio to it is 1 unless another scale was given.
    ratio = op.Where(scale == 0.0, 1.0, scale * op.Sqrt(op.Cast(width, to=1)))
    attended = op.Attention(
        op.Transpose(query, perm=[0, 2, 1, 3]),
        op.Transpose(key * op.CastLike(ratio, key), perm=[0, 2, 1, 3]),
        op.Transpose(value, perm=[0, 2, 1, 3]),
        is_causal=1,
    )  # [B, H, C, Dv]

    # Row (b C + slot) H + h of the attended rows, and the row of zeros for tokens that were not selected.
    slot_of = op.Unsqueeze(slot_of_token(index, count, tokens), axis2)  # [B, N, 1, S]
    batch_number = head_number / op.Squeeze(heads)  # [B H]
    first = op.Cast(op.Reshape(batch_number * heads * (slots - one) + head_number, per_set), to=6)  # [B, N, H / N, 1]
    zero_row = op.Cast(all_heads * slots, to=6)
    source = op.Where(slot_of < op.Cast(slots, to=6), first + slot_of * op.Cast(heads, to=6), zero_row)
    flat = op.Reshape(op.Transpose(attended, perm=[0, 2, 1, 3]), op.Concat(minus_one, value_width, axis=0))
    nothing = op.Expand(op.CastLike(0.0, v), op.Concat(one, value_width, axis=0))
    return op.Gather(op.Concat(flat, nothing, axis=0), op.Reshape(source, op.Shape(q, start=0, end=3)))


@script(TRTPASS, default_opset=op)
def branching(q: Floats, k: Floats, v: Floats, index: Int32, count: Int32, scale: float = 0.0) -> Floats:
    """Plain causal attention where each set has every token, else ``interleaved`` over the largest count."""
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    tokens = op.Cast(op.Shape(q, start=2, end=3), to=6)  # [1]: S
    if op.Squeeze(op.ReduceMin(count, keepdims=0) == tokens):
        ratio = op.Where(scale == 0.0, 1.0, scale * op.Sqrt(op.Cast(op.Shape(q, start=3, end=4), to=1)))
        out = op.Attention(q, k * op.CastLike(ratio, k), v, is_causal=1)
    else:
        largest = op.Max(op.Reshape(op.Cast(op.ReduceMax(count, keepdims=0), to=7), one), one)
        cut = op.Slice(index, zero, largest, op.Constant(value_ints=[2]))
        out = interleaved(q, k, v, cut, count, scale=scale)
    return out

"""TokenSparseAttention in standard operators: flat gathers, plain causal Attention, one inverse gather.

Compacted tokens stay in order and padding comes last, so causality among them needs no mask: a real query never sees a
padded key, and the rows of padded queries are never read.

A set serves H / N query heads and reads key head ``n * Hkv / N``; both N = H and N = Hkv are that one formula, and K and
V are gathered from their grouped heads, never expanded before. A gather of whole rows from `[B H S, D]` is used because
GatherElements along D costs ten times as much in ONNX Runtime.
"""

from __future__ import annotations

from onnxscript import script

from plugins._body import TRTPASS, op


@script(TRTPASS, default_opset=op)
def TokenSparseAttention(q, k, v, index, count, scale: float = 0.0):
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    minus_one = op.Constant(value_ints=[-1])
    axis2 = op.Constant(value_ints=[2])
    axis3 = op.Constant(value_ints=[3])
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

    # Inverse: the slot of each token, C where it was not selected. Padded slots write past S, each to its own place.
    slot = op.Cast(op.Range(op.Squeeze(zero), op.Squeeze(slots), op.Squeeze(one)), to=6)  # [C]
    target = op.Where(index < tokens32, index, tokens32 + slot)
    empty = op.Expand(op.Cast(slots, to=6), op.Concat(sets, tokens + slots, axis=0))  # [B, N, S + C]
    slot_of = op.ScatterElements(empty, target, op.Expand(slot, op.Shape(index)), axis=2)
    slot_of = op.Slice(slot_of, zero, tokens, axis2)  # [B, N, S]
    first_slot = op.Cast(op.Reshape(head_number * slots, per_set), to=6)  # [B, N, H / N, 1]
    source = first_slot + op.Unsqueeze(op.Min(slot_of, op.Cast(slots - one, to=6)), axis2)  # [B, N, H / N, S]
    selected = op.Unsqueeze(op.Expand(op.Unsqueeze(slot_of < op.Cast(slots, to=6), axis2), op.Shape(source)), minus_one)
    heads_first = op.Shape(q, start=0, end=3)
    spread = op.Gather(
        op.Reshape(attended, op.Concat(minus_one, op.Shape(v, start=3, end=4), axis=0)),
        op.Reshape(source, heads_first),
    )  # [B, H, S, Dv]
    mask = op.Reshape(selected, op.Concat(heads_first, one, axis=0))
    return op.Where(mask, spread, op.CastLike(0.0, spread))

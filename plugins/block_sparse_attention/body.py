"""BlockSparseAttention in standard operators: a mask `[B, H, S, S]`, right and slow; only a kernel saves anything."""

from __future__ import annotations

from onnxscript import script

from plugins._body import TRTPASS, Floats, Int32, op


@script(TRTPASS, default_opset=op)
def BlockSparseAttention(
    q: Floats, k: Floats, v: Floats, blocks: Int32, count: Int32, block: int = 128, scale: float = 0.0
) -> Floats:
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    last = op.Constant(value_ints=[3])
    rows = op.Squeeze(op.Shape(blocks, start=2, end=3))  # Q
    slots = op.Squeeze(op.Shape(blocks, start=3, end=4))  # C
    tokens = op.Squeeze(op.Shape(q, start=2, end=3))  # S
    # Slots from count on list no block. [B, H, Q, C]
    read = op.Cast(op.Range(zero, slots, one), to=6) < op.Unsqueeze(count, last)
    chosen = op.Where(read, blocks, op.Cast(op.Constant(value_int=-1), to=6))
    column = op.Unsqueeze(op.Cast(op.Range(zero, rows, one), to=6), op.Constant(value_ints=[1]))  # [Q, 1]
    same = op.Cast(op.Unsqueeze(chosen, last) == column, to=6)  # [B, H, Q, Q, C]
    listed = op.ReduceMax(same, op.Constant(value_ints=[4]), keepdims=0)  # [B, H, Q, Q]

    token = op.Range(zero, tokens, one)  # [S]
    of = token / op.Cast(block, to=7)
    wide = op.Gather(op.Gather(listed, of, axis=2), of, axis=3)  # [B, H, S, S]
    causal = token <= op.Unsqueeze(token, op.Constant(value_ints=[1]))  # [S, S]
    visible = op.And(wide > op.Cast(zero, to=6), causal)
    sees = op.ReduceMax(op.Cast(visible, to=6), last, keepdims=1) > op.Cast(zero, to=6)  # [B, H, S, 1]
    # Who sees nothing sees all, so that no softmax is empty, and is made 0 afterwards.
    mask = op.Or(visible, op.Not(sees))
    # Attention's own default is 1 / sqrt(D); the ratio to it is 1 unless another scale was given.
    ratio = op.Where(scale == 0.0, 1.0, scale * op.Sqrt(op.Cast(op.Squeeze(op.Shape(q, start=3, end=4)), to=1)))
    out = op.Attention(q, k * op.CastLike(ratio, k), v, mask)
    return op.Where(sees, out, op.CastLike(0.0, out))

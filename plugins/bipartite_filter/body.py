"""BipartiteFilter in standard operators: cosines of even with odd tokens only, a quarter of all pairs."""

from __future__ import annotations

from onnxscript import script

from plugins._body import TRTPASS, Float32, Floats, Int32, op
from plugins._rows import unit_rows


@script(TRTPASS, default_opset=op)
def BipartiteFilter(metric: Floats, protected: Int32, lengths: Int32) -> tuple[Float32, Int32]:
    zero = op.Cast(op.Constant(value_int=0), to=6)
    one = op.Cast(op.Constant(value_int=1), to=6)
    axis1 = op.Constant(value_ints=[1])
    axis2 = op.Constant(value_ints=[2])
    first = op.Constant(value_ints=[0])
    size = op.Shape(metric, start=1, end=2)  # [1]: S
    tokens = op.Cast(op.Squeeze(size), to=6)
    position = op.Range(zero, tokens, one)  # [S]
    odd = op.Mod(position, one + one) == one
    free = op.And(position < op.Unsqueeze(lengths, axis1), protected == zero)  # [B, S]
    candidate = op.And(free, odd)

    units, directed = unit_rows(metric)
    left = op.Slice(units, first, size, axis1, axis2)  # [B, (S + 1) / 2, E]
    right = op.Slice(units, axis1, size, axis1, axis2)  # [B, S / 2, E]
    infinity = op.Constant(value_float=float("inf"))
    penalty = op.Where(op.And(candidate, directed), 0.0, op.Neg(infinity))  # [B, S]
    hidden = op.Unsqueeze(op.Slice(penalty, axis1, size, axis1, axis2), axis1)  # [B, 1, S / 2]
    cosine = op.MatMul(left, op.Transpose(right, perm=[0, 2, 1])) + hidden
    best = op.ReduceMax(cosine, axis2)  # [B, (S + 1) / 2, 1], -inf without a candidate
    pairs = op.Flatten(op.Pad(best, op.Constant(value_ints=[0, 0, 0, 0, 0, 1])), axis=1)  # [B, S or S + 1]
    inside = op.And(op.And(free, directed), op.Not(odd))
    score = op.Where(inside, op.Neg(op.Slice(pairs, first, size, axis1)), infinity)
    return score, op.Cast(candidate, to=6)

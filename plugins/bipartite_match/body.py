"""BipartiteMatch in standard operators: all cosines `[B, S, R]`, their maximum, and the first column that reaches it.

Not ArgMax: which of equal values it takes is up to the runtime.
"""

from __future__ import annotations

from onnxscript import script

from plugins._body import TRTPASS, Float32, Floats, Int32, op
from plugins._rows import unit_rows


@script(TRTPASS, default_opset=op)
def BipartiteMatch(a: Floats, b: Floats, lengths: Int32) -> tuple[Int32, Float32]:
    axis1 = op.Constant(value_ints=[1])
    axis2 = op.Constant(value_ints=[2])
    nothing = op.Constant(value_float=float("-inf"))
    rows = op.Squeeze(op.Shape(b, start=1, end=2))  # R
    index = op.Cast(op.Range(op.Constant(value_int=0), rows, op.Constant(value_int=1)), to=6)  # [R]
    left, chooses = unit_rows(a)
    right, directed = unit_rows(b)
    valid = op.And(directed, index < op.Unsqueeze(lengths, axis1))  # [B, R]
    possible = op.And(op.Unsqueeze(chooses, axis2), op.Unsqueeze(valid, axis1))  # [B, S, R]
    cosine = op.Where(possible, op.MatMul(left, op.Transpose(right, perm=[0, 2, 1])), nothing)
    best = op.ReduceMax(cosine, axis2)  # [B, S, 1]
    tied = op.And(possible, cosine == best)
    none = op.Cast(rows, to=6)
    # Min once more: without any row to choose from the minimum is that of nothing.
    match = op.Min(op.ReduceMin(op.Where(tied, index, none), axis2, keepdims=0), none)
    return match, op.Squeeze(best, axis2)

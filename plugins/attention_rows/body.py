"""AttentionRows in standard operators: R query rows a head are gathered, so that one row costs one row.

K is not expanded: the G query heads of a group become rows of one product with their key head.
"""

from __future__ import annotations

from onnxscript import script

from plugins._body import TRTPASS, Float32, Floats, Int32, op


@script(TRTPASS, default_opset=op)
def AttentionRows(
    q: Floats, k: Floats, bias: Float32, row: Int32, lengths: Int32, causal: int = 0, scale: float = 0.0
) -> Float32:
    zero = op.Cast(op.Constant(value_int=0), to=6)
    one = op.Cast(op.Constant(value_int=1), to=6)
    axis1 = op.Constant(value_ints=[1])
    axis2 = op.Constant(value_ints=[2])
    tokens = op.Cast(op.Squeeze(op.Shape(q, start=2, end=3)), to=6)  # S
    outer = op.Shape(q, start=0, end=2)  # [2]: B, H
    width = op.Shape(q, start=3, end=4)  # [1]: D

    # How many keys each row sees, `[B, R]`: none where the row is not a valid one.
    length = op.Unsqueeze(lengths, axis1)  # [B, 1]
    nearest = op.Max(op.Min(row, tokens - one), zero)  # what is gathered is always there
    reach = op.Where(op.Constant(value_int=causal) == 1, nearest + one, tokens)
    limit = op.Where(row == nearest, op.Min(reach, length), zero)
    limit = op.Where(row < length, limit, zero)
    visible = op.Range(zero, tokens, one) < op.Unsqueeze(limit, axis2)  # [B, R, S]
    added = op.Where(visible, op.Unsqueeze(bias, axis1), -3.4e38)

    place = op.Unsqueeze(op.Cast(nearest, to=7), op.Constant(value_ints=[1, 3]))  # [B, 1, R, 1]
    each = op.Expand(place, op.Concat(outer, op.Constant(value_ints=[1, 1]), axis=0))  # [B, H, R, 1]
    chosen = op.Cast(op.GatherND(q, each, batch_dims=2), to=1)  # [B, H, R, D]
    factor = op.Where(scale == 0.0, op.Reciprocal(op.Sqrt(op.Cast(width, to=1))), scale)  # [1]
    groups = op.Shape(k, start=0, end=2)  # [2]: B, Hkv
    folded = op.Reshape(chosen * factor, op.Concat(groups, op.Constant(value_ints=[-1]), width, axis=0))
    scores = op.MatMul(folded, op.Transpose(op.Cast(k, to=1), perm=[0, 1, 3, 2]))  # [B, Hkv, G R, S]
    shape = op.Concat(op.Shape(chosen, start=0, end=3), op.Shape(q, start=2, end=3), axis=0)  # B, H, R, S
    probability = op.Softmax(op.Reshape(scores, shape) + op.Unsqueeze(added, axis1), axis=-1)
    return op.Where(visible, op.ReduceMean(probability, axis1, keepdims=0), 0.0)

"""ColumnMass in standard operators: W rows a head are gathered, so no S x S tensor is ever made.

K is not expanded: the G query heads of a group become rows of one product with their key head.
"""

from __future__ import annotations

from onnxscript import script

from plugins._body import TRTPASS, Float32, Floats, Int32, op


@script(TRTPASS, default_opset=op)
def ColumnMass(
    q: Floats, k: Floats, lengths: Int32, window: int = 128, pool: int = 7, prefix: int = 0, scale: float = 0.0
) -> Float32:
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    minus_one = op.Constant(value_ints=[-1])
    tokens = op.Shape(q, start=2, end=3)  # [1]: S
    width = op.Shape(q, start=3, end=4)  # [1]: D
    length = op.Unsqueeze(op.Cast(lengths, to=7), op.Constant(value_ints=[1, 2]))  # [B, 1, 1]

    # The last W rows of each batch row: first + 0 .. first + W - 1. A row shorter than W has surplus rows at its end,
    # which are computed (from real, causal rows, so they are finite) and then weighted by zero.
    rows = op.Min(op.Reshape(op.Constant(value_int=window), one), tokens)  # [1]: W, at most S
    step = op.Range(op.Squeeze(zero), op.Squeeze(rows), op.Squeeze(one))  # [W]
    first = op.Max(length - rows, zero)  # [B, 1, 1]
    position = first + step  # [B, 1, W], below S
    heads = op.Range(op.Squeeze(zero), op.ReduceProd(op.Shape(q, start=0, end=2), keepdims=0), op.Squeeze(one))
    offset = op.Reshape(heads * tokens, op.Concat(op.Shape(q, start=0, end=2), one, axis=0))  # [B, H, 1]
    last = op.Gather(op.Reshape(q, op.Concat(minus_one, width, axis=0)), offset + position)  # [B, H, W, D]
    factor = op.Where(scale == 0.0, op.Reciprocal(op.Sqrt(op.Cast(width, to=1))), scale)  # [1]
    folded = op.Reshape(last, op.Concat(op.Shape(k, start=0, end=2), minus_one, width, axis=0))  # [B, Hkv, G W, D]
    scores = op.MatMul(op.Cast(folded, to=1) * factor, op.Transpose(op.Cast(k, to=1), perm=[0, 1, 3, 2]))

    # Row i sees keys up to its own position; one small bias [B, 1, 1, W, S] is broadcast over the heads.
    key = op.Range(op.Squeeze(zero), op.Squeeze(tokens), op.Squeeze(one))  # [S]
    visible = key <= op.Unsqueeze(position, op.Constant(value_ints=[1, 4]))  # [B, 1, 1, W, S]
    bias = op.Where(visible, 0.0, -3.4e38)
    grouped = op.Concat(op.Shape(k, start=0, end=2), minus_one, rows, tokens, axis=0)
    probability = op.Softmax(op.Reshape(scores, grouped) + bias, axis=-1)  # [B, Hkv, G, W, S]
    vote = op.Cast(op.Unsqueeze(position < length, op.Constant(value_ints=[1, 2])), to=1)  # [B, 1, 1, 1, W]
    summed = op.MatMul(vote, probability)  # [B, Hkv, G, 1, S]

    # Domain, pooling inside the domain, domain again.
    domain = key < length - prefix * (length - first)  # [B, 1, S]
    shape = op.Shape(q, start=0, end=3)
    inside = op.Where(domain, op.Reshape(summed, shape), 0.0)  # [B, H, S]
    width_of_pool = op.Reshape(op.Constant(value_int=pool), one)
    kernel = op.Expand(op.Reciprocal(op.Cast(width_of_pool, to=1)), op.Concat(one, one, width_of_pool, axis=0))
    line = op.Reshape(inside, op.Concat(minus_one, one, tokens, axis=0))  # [B H, 1, S]
    pooled = op.Reshape(op.Conv(line, kernel, auto_pad="SAME_UPPER"), shape)
    return op.Where(domain, pooled, 0.0)

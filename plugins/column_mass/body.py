"""ColumnMass in standard operators: W rows a head are gathered, so no S x S tensor is ever made.

The probabilities `[B, H, W, S]` are what costs: a product, a bias, a softmax, a product. K is not expanded, the G query
heads of a group become rows of one product with their key head. (Asking Attention for its probabilities instead, with
``qk_matmul_output_mode``, takes ONNX Runtime the same time.)
"""

from __future__ import annotations

from onnxscript import script

from plugins._body import TRTPASS, Float32, Floats, Int32, Int64, op


@script(TRTPASS, default_opset=op)
def last_rows(q: Floats, lengths: Int32, window: int = 128) -> tuple[Float32, Int64]:
    """The last W rows of each batch row, `[B, H, W, D]` float32, and their positions `[B, 1, W]`; W is at most S.

    A row of the batch that is shorter than W has surplus rows at its end: real rows, so that they are finite.
    """
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    tokens = op.Shape(q, start=2, end=3)  # [1]: S
    length = op.Unsqueeze(op.Cast(lengths, to=7), op.Constant(value_ints=[1, 2]))  # [B, 1, 1]
    rows = op.Min(op.Reshape(op.Constant(value_int=window), one), tokens)  # [1]: W
    step = op.Range(op.Squeeze(zero), op.Squeeze(rows), op.Squeeze(one))  # [W]
    position = op.Max(length - rows, zero) + step  # [B, 1, W], below S
    outer = op.Shape(q, start=0, end=2)  # [2]: B, H
    head = op.Range(op.Squeeze(zero), op.ReduceProd(outer, keepdims=0), op.Squeeze(one))
    offset = op.Reshape(head * tokens, op.Concat(outer, one, axis=0))  # [B, H, 1]
    flat = op.Reshape(q, op.Concat(op.Constant(value_ints=[-1]), op.Shape(q, start=3, end=4), axis=0))  # [B H S, D]
    return op.Cast(op.Gather(flat, offset + position), to=1), position


@script(TRTPASS, default_opset=op)
def pooled_columns(probability: Float32, position: Int64, lengths: Int32, pool: int = 7, prefix: int = 0) -> Float32:
    """Column sums over the real rows of `[B, H, W, S]`, then the domain, pooling inside it, and the domain again."""
    one = op.Constant(value_ints=[1])
    length = op.Unsqueeze(op.Cast(lengths, to=7), op.Constant(value_ints=[1, 2]))  # [B, 1, 1]
    vote = op.Unsqueeze(op.Cast(position < length, to=1), one)  # [B, 1, 1, W]
    summed = op.Squeeze(op.MatMul(vote, probability), op.Constant(value_ints=[2]))  # [B, H, S]

    tokens = op.Shape(probability, start=3, end=4)
    key = op.Range(op.Constant(value_int=0), op.Squeeze(tokens), op.Squeeze(one))  # [S]
    first = op.ReduceMin(position, op.Constant(value_ints=[2]))  # [B, 1, 1]
    domain = key < length - prefix * (length - first)  # [B, 1, S]
    inside = op.Where(domain, summed, 0.0)
    size = op.Reshape(op.Constant(value_int=pool), one)
    kernel = op.Expand(op.Reciprocal(op.Cast(size, to=1)), op.Concat(one, one, size, axis=0))  # [1, 1, pool]
    line = op.Reshape(inside, op.Concat(op.Constant(value_ints=[-1]), one, tokens, axis=0))  # [B H, 1, S]
    pooled = op.Reshape(op.Conv(line, kernel, auto_pad="SAME_UPPER"), op.Shape(summed))
    return op.Where(domain, pooled, 0.0)


@script(TRTPASS, default_opset=op)
def ColumnMass(
    q: Floats, k: Floats, lengths: Int32, window: int = 128, pool: int = 7, prefix: int = 0, scale: float = 0.0
) -> Float32:
    last, position = last_rows(q, lengths, window=window)
    minus_one = op.Constant(value_ints=[-1])
    tokens = op.Shape(q, start=2, end=3)  # [1]: S
    width = op.Shape(q, start=3, end=4)  # [1]: D
    factor = op.Where(scale == 0.0, op.Reciprocal(op.Sqrt(op.Cast(width, to=1))), scale)  # [1]
    groups = op.Shape(k, start=0, end=2)  # [2]: B, Hkv
    folded = op.Reshape(last * factor, op.Concat(groups, minus_one, width, axis=0))  # [B, Hkv, G W, D]
    scores = op.MatMul(folded, op.Transpose(op.Cast(k, to=1), perm=[0, 1, 3, 2]))
    key = op.Range(op.Constant(value_int=0), op.Squeeze(tokens), op.Constant(value_int=1))  # [S]
    visible = key <= op.Unsqueeze(position, op.Constant(value_ints=[3]))  # [B, 1, W, S]
    bias = op.Where(visible, 0.0, -3.4e38)
    shape = op.Concat(op.Shape(last, start=0, end=3), tokens, axis=0)
    probability = op.Softmax(op.Reshape(scores, shape) + bias, axis=-1)
    return pooled_columns(probability, position, lengths, pool=pool, prefix=prefix)

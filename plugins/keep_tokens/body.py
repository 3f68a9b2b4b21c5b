"""KeepTokens in standard operators: the rank of each token in its row, against how many stay.

A stream that is reduced is short (hundreds of tokens), so one sort is cheaper than the rounds of a bisection; the
`static` body counts pairs, as TensorRT has no stable sort.
"""

from __future__ import annotations

from onnxscript import script

from plugins._body import TRTPASS, Float32, Int32, op


@script(TRTPASS, default_opset=op)
def kept_tokens(length: Int32, fixed: int = 0, permille: int = 1000, rounding: int = 999, drop: int = 0) -> Int32:
    """``plugins._budget.kept`` of int32 of any shape, as one quotient:

    kept = (L permille + min(L, fixed) (1000 - permille) + rounding - 1000 drop) / 1000, at least 0. Division cuts
    towards zero, which differs from the floor below 0 alone; L is not exceeded.
    """
    thousand = op.Constant(value_int=1000)
    factor = op.Constant(value_int=permille)
    fixed_factor = op.Cast(thousand - factor, to=6)
    offset = op.Cast(op.Constant(value_int=rounding) - op.Constant(value_int=drop) * thousand, to=6)
    inside = op.Min(length, op.Cast(op.Constant(value_int=fixed), to=6))
    share = (length * op.Cast(factor, to=6) + inside * fixed_factor + offset) / op.Cast(thousand, to=6)
    return op.Max(share, op.Cast(op.Constant(value_int=0), to=6))


@script(TRTPASS, default_opset=op)
def ranked_scores(
    score: Float32, lengths: Int32, fixed: int = 0, permille: int = 1000, rounding: int = 999, drop: int = 0
) -> tuple[Float32, Int32, Int32]:
    """Scores `[B, S]`, -inf for NaN and for padding, which comes last of equals; positions `[S]`; kept(L) `[B, 1]`."""
    zero = op.Cast(op.Constant(value_int=0), to=6)
    tokens = op.Cast(op.Squeeze(op.Shape(score, start=1, end=2)), to=6)  # S
    position = op.Range(zero, tokens, op.Cast(op.Constant(value_int=1), to=6))  # [S]
    length = op.Unsqueeze(op.Min(lengths, tokens), op.Constant(value_ints=[1]))  # [B, 1]
    lowest = op.Constant(value_float=float("-inf"))
    ranked = op.Where(op.And(score > lowest, position < length), score, lowest)
    return ranked, position, kept_tokens(length, fixed=fixed, permille=permille, rounding=rounding, drop=drop)


@script(TRTPASS, default_opset=op)
def sorted_tokens(
    score: Float32, lengths: Int32, fixed: int = 0, permille: int = 1000, rounding: int = 999, drop: int = 0
) -> Int32:
    ranked, position, number = ranked_scores(
        score, lengths, fixed=fixed, permille=permille, rounding=rounding, drop=drop
    )
    _, order = op.TopK(ranked, op.Shape(score, start=1, end=2), axis=1)  # the lowest index first of equals
    first = op.Cast(position < number, to=6)  # [B, S], by rank
    return op.ScatterElements(first, order, first, axis=1)  # every place is written


@script(TRTPASS, default_opset=op)
def counted_tokens(
    score: Float32, lengths: Int32, fixed: int = 0, permille: int = 1000, rounding: int = 999, drop: int = 0
) -> Int32:
    ranked, position, number = ranked_scores(
        score, lengths, fixed=fixed, permille=permille, rounding=rounding, drop=drop
    )
    rival = op.Unsqueeze(ranked, op.Constant(value_ints=[1]))  # [B, 1, S]
    own = op.Unsqueeze(ranked, op.Constant(value_ints=[2]))  # [B, S, 1]
    earlier = position < op.Unsqueeze(position, op.Constant(value_ints=[1]))  # [S, S]
    ahead = op.Or(rival > own, op.And(rival == own, earlier))  # [B, S, S], never stored: TensorRT fuses it into the sum
    rank = op.ReduceSum(op.Cast(ahead, to=6), op.Constant(value_ints=[2]), keepdims=0)
    return op.Cast(rank < number, to=6)

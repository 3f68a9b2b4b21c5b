"""FicocoFilter in standard operators: the mean is one product with the mask; then the best token of each window.

``dynamic`` scatters scores into windows, as many as the largest place needs, and reads their minimum back. ``static``
compares all pairs of tokens, for TensorRT: their `[B, S, S]` live inside two minima. Scores are negative redundancies:
the best is the lowest.
"""

from __future__ import annotations

from typing import Any

from onnxscript import BOOL, script

from plugins._body import TRTPASS, Float32, Int32, op

Bool: Any = BOOL[...]
INFINITY = float("inf")


@script(TRTPASS, default_opset=op)
def filtered(
    prob: Float32, cue: Float32, protected: Int32, lengths: Int32, weight_permille: int
) -> tuple[Float32, Bool, Int32]:
    """Scores without penalty `[B, S]`, which tokens are ranked `[B, S]`, and the numbers of the tokens `[S]`."""
    axis1 = op.Constant(value_ints=[1])
    zero = op.Constant(value_int=0)
    token = op.Cast(op.Range(zero, op.Squeeze(op.Shape(cue, start=1, end=2)), op.Constant(value_int=1)), to=6)
    ranked = op.And(token < op.Unsqueeze(lengths, axis1), protected == op.Cast(zero, to=6))
    counted = op.Cast(ranked, to=1)
    weight = op.Cast(op.Constant(value_int=weight_permille), to=1) / 1000.0
    each = weight / op.Max(op.ReduceSum(counted, axis1), 1.0)  # [B, 1]
    received = op.Squeeze(op.MatMul(op.Unsqueeze(counted, axis1), prob), axis1)  # [B, S]
    return cue * (1.0 - weight) - received * each, ranked, token


@script(TRTPASS, default_opset=op)
def window_of(place: Int32, ranked: Bool, width: int, window: int) -> Int32:
    """Window of each token `[B, S]`, numbered from 1; 0 for a token in none."""
    zero = op.Cast(op.Constant(value_int=0), to=6)
    one = op.Cast(op.Constant(value_int=1), to=6)
    side = op.Cast(op.Constant(value_int=window), to=6)
    wide = op.Max(op.Cast(op.Constant(value_int=width), to=6), one)
    number = place / (wide * side) * wide + op.Mod(place, wide) / side
    return op.Where(op.And(ranked, place >= zero), number + one, zero)


@script(TRTPASS, default_opset=op)
def penalised(score: Float32, best: Bool, coefficient_permille: int) -> Float32:
    """Scores `[B, S]` with those of the best tokens taken away from 0 if negative, else to it."""
    coefficient = op.Cast(op.Constant(value_int=coefficient_permille), to=1) / 1000.0
    return op.Where(best, score * op.Where(score < 0.0, coefficient, 1.0 / coefficient), score)


@script(TRTPASS, default_opset=op)
def scattered(
    score: Float32, place: Int32, ranked: Bool, token: Int32, width: int, window: int, coefficient_permille: int
) -> Float32:
    """Scores `[B, S]` after the penalty; one function, so that names in the branch that calls it stay apart."""
    infinity = op.Constant(value_float=INFINITY)
    cell = window_of(place, ranked, width, window)  # [B, S]
    column = op.Unsqueeze(op.Cast(cell, to=7), op.Constant(value_ints=[2]))  # [B, S, 1]
    cells = op.ReduceMax(column, op.Constant(value_ints=[0, 1]), keepdims=0) + op.Constant(value_ints=[1])  # [1]
    empty = op.Expand(infinity, op.Concat(op.Shape(score, start=0, end=1), cells, axis=0))  # [B, windows]
    order = op.Where(op.IsNaN(score), infinity, score)
    lowest = op.GatherND(op.ScatterElements(empty, cell, order, axis=1, reduction="min"), column, batch_dims=1)
    number = op.Cast(token, to=1)  # [S]
    tied = op.Where(order == lowest, number, infinity)  # [B, S]
    first = op.GatherND(op.ScatterElements(empty, cell, tied, axis=1, reduction="min"), column, batch_dims=1)
    best = op.And(first == number, cell > op.Cast(op.Constant(value_int=0), to=6))
    return penalised(score, best, coefficient_permille)


@script(TRTPASS, default_opset=op)
def dynamic(
    prob: Float32,
    cue: Float32,
    place: Int32,
    protected: Int32,
    lengths: Int32,
    weight_permille: int = 350,
    width: int = 0,
    window: int = 2,
    coefficient_permille: int = 2000,
) -> Float32:
    plain, ranked, token = filtered(prob, cue, protected, lengths, weight_permille)
    if op.Constant(value_int=width) > op.Constant(value_int=0):
        spread = scattered(plain, place, ranked, token, width, window, coefficient_permille)
    else:
        spread = op.Identity(plain)
    return op.Where(ranked, spread, op.Constant(value_float=INFINITY))


@script(TRTPASS, default_opset=op)
def static(
    prob: Float32,
    cue: Float32,
    place: Int32,
    protected: Int32,
    lengths: Int32,
    weight_permille: int = 350,
    width: int = 0,
    window: int = 2,
    coefficient_permille: int = 2000,
) -> Float32:
    infinity = op.Constant(value_float=INFINITY)
    axis1 = op.Constant(value_ints=[1])
    axis2 = op.Constant(value_ints=[2])
    plain, ranked, token = filtered(prob, cue, protected, lengths, weight_permille)
    gridded = op.And(ranked, op.Constant(value_int=width) > op.Constant(value_int=0))
    cell = window_of(place, gridded, width, window)  # [B, S]
    order = op.Where(op.IsNaN(plain), infinity, plain)
    same = op.Unsqueeze(cell, axis2) == op.Unsqueeze(cell, axis1)  # [B, S, S]
    rival = op.Where(same, op.Unsqueeze(order, axis1), infinity)
    tied = op.And(same, rival == op.ReduceMin(rival, axis2))
    none = op.Cast(op.Constant(value_int=2147483647), to=6)
    first = op.ReduceMin(op.Where(tied, token, none), axis2, keepdims=0)  # [B, S]
    best = op.And(first == token, cell > op.Cast(op.Constant(value_int=0), to=6))
    return op.Where(ranked, penalised(plain, best, coefficient_permille), infinity)

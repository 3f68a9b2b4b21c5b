"""FicocoCorrelate in standard operators: affinities of the columns, then the highest, then their weights.

``static`` ranks columns by counting pairs, for TensorRT: the pairs `[B, M, C, C]` live inside one sum.
"""

from __future__ import annotations

from typing import Any

from onnxscript import BOOL, script

from plugins._body import TRTPASS, Float32, Int32, Int64, op
from plugins.ficoco_correlate import MOST

Bool: Any = BOOL[...]
NEVER = float("-inf")


@script(TRTPASS, default_opset=op)
def number_of(columns: Int64, eps_permille: int) -> Int64:
    """k of each number of columns, which is 0 or more."""
    eps = op.Constant(value_int=eps_permille)
    one = op.Constant(value_int=1)
    return columns + one - ((columns - one) * eps + op.Constant(value_int=1999)) / op.Constant(value_int=1000)


@script(TRTPASS, default_opset=op)
def weighed(value: Float32, used: Bool, number: Int64) -> Float32:
    """Weights `[B, M, K]` of values; ``used`` `[B, 1, K]`, ``number`` of them `[B, 1, 1]`."""
    real = op.Where(used, value, 0.0)
    total = op.ReduceSum(real, op.Constant(value_ints=[2]))  # [B, M, 1]
    proper = total > 0.0
    even = op.Cast(op.Max(number, op.Constant(value_int=1)), to=1)
    return op.Where(proper, real, op.Cast(used, to=1)) / op.Where(proper, total, even)


@script(TRTPASS, default_opset=op)
def columns(affinity: Float32, index: Int32, candidate: Int32, count: Int32) -> tuple[Float32, Int64, Int32]:
    """Affinities by slot `[B, M, C]`, -inf where no column is; how many columns there are `[B, 1]`; the slots `[C]`."""
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    axis1 = op.Constant(value_ints=[1])
    none = op.Cast(zero, to=6)
    slot = op.Cast(op.Range(zero, op.Squeeze(op.Shape(index, start=1, end=2)), one), to=6)  # [C]
    last = op.Cast(op.Shape(candidate, start=1, end=2), to=6) - op.Cast(one, to=6)  # [1]
    token = op.Max(op.Min(index, last), none)
    place = op.Unsqueeze(op.Cast(token, to=7), op.Constant(value_ints=[2]))  # [B, C, 1]
    joined = op.Not(op.GatherND(candidate, place, batch_dims=1) == none)
    real = op.And(slot < op.Unsqueeze(count, axis1), token == index)
    column = op.And(joined, real)  # [B, C]
    gathered = op.Transpose(op.GatherND(op.Transpose(affinity, perm=[0, 2, 1]), place, batch_dims=1), perm=[0, 2, 1])
    finite = op.Clip(op.Where(op.IsNaN(gathered), -MOST, gathered), -MOST, MOST)
    value = op.Where(op.Unsqueeze(column, axis1), finite, op.Constant(value_float=NEVER))  # [B, M, C]
    return value, op.ReduceSum(op.Cast(column, to=7), axis1), slot


@script(TRTPASS, default_opset=op)
def dynamic(
    affinity: Float32, index: Int32, candidate: Int32, count: Int32, eps_permille: int = 998
) -> tuple[Int32, Float32]:
    value, have, _ = columns(affinity, index, candidate, count)
    slots = op.Shape(index, start=1, end=2)  # [1]: C
    each = number_of(slots, eps_permille)  # [1]: K
    number = op.Unsqueeze(number_of(have, eps_permille), op.Constant(value_ints=[2]))  # [B, 1, 1]
    used = op.Range(op.Constant(value_int=0), op.Squeeze(each), op.Constant(value_int=1)) < number  # [B, 1, K]
    best, first = op.TopK(value, each)  # [B, M, K]: the lowest slot of equals first
    target = op.Cast(op.Where(used, first, slots), to=6)
    return op.Flatten(target, axis=1), op.Flatten(weighed(best, used, number), axis=1)


@script(TRTPASS, default_opset=op)
def static(
    affinity: Float32, index: Int32, candidate: Int32, count: Int32, eps_permille: int = 998
) -> tuple[Int32, Float32]:
    axis2 = op.Constant(value_ints=[2])
    axis3 = op.Constant(value_ints=[3])
    value, have, slot = columns(affinity, index, candidate, count)
    slots = op.Shape(index, start=1, end=2)  # [1]: C
    each = number_of(slots, eps_permille)  # [1]: K
    number = op.Unsqueeze(number_of(have, eps_permille), axis2)  # [B, 1, 1]
    turn = op.Range(op.Constant(value_int=0), op.Squeeze(each), op.Constant(value_int=1))  # [K]
    used = turn < number  # [B, 1, K]

    rival = op.Unsqueeze(value, axis2)  # [B, M, 1, C]
    own = op.Unsqueeze(value, axis3)  # [B, M, C, 1]
    earlier = slot < op.Unsqueeze(slot, op.Constant(value_ints=[1]))  # [C, C]
    ahead = op.Or(rival > own, op.And(rival == own, earlier))
    rank = op.ReduceSum(op.Cast(ahead, to=6), axis3, keepdims=0)  # [B, M, C]
    mine = op.Unsqueeze(rank, axis2) == op.Unsqueeze(op.Cast(turn, to=6), op.Constant(value_ints=[1]))  # [B, M, K, C]
    first = op.ReduceSum(op.Where(mine, slot, op.Cast(op.Constant(value_int=0), to=6)), axis3, keepdims=0)
    best = op.ReduceSum(op.Where(mine, rival, 0.0), axis3, keepdims=0)  # [B, M, K]
    target = op.Where(used, first, op.Cast(slots, to=6))
    return op.Flatten(target, axis=1), op.Flatten(weighed(best, used, number), axis=1)

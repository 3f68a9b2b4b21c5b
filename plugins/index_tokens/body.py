"""IndexTokens in standard operators: running sums say where each token goes, one scatter writes both lists.

The lists lie one behind the other, `[B, C + M + 1]`: C kept tokens, M others, and a place for what is in neither.
"""

from __future__ import annotations

from onnxscript import script

from plugins._body import TRTPASS, Int32, op
from plugins.keep_tokens.body import kept_tokens


@script(TRTPASS, default_opset=op)
def IndexTokens(
    keep: Int32, lengths: Int32, fixed: int = 0, permille: int = 1000, rounding: int = 999, drop: int = 0
) -> tuple[Int32, Int32, Int32, Int32]:
    axis1 = op.Constant(value_ints=[1])
    zero = op.Cast(op.Constant(value_int=0), to=6)
    one = op.Cast(op.Constant(value_int=1), to=6)
    shape = op.Shape(keep)  # [2]: B, S
    size = op.Shape(keep, start=1, end=2)  # [1]: S
    tokens = op.Cast(op.Squeeze(size), to=6)
    capacity = kept_tokens(tokens, fixed=fixed, permille=permille, rounding=rounding, drop=drop)  # C
    position = op.Range(zero, tokens, one)  # [S]
    valid = position < op.Unsqueeze(lengths, axis1)  # [B, S]
    wanted = op.And(op.Cast(keep, to=9), valid)
    number = op.Cast(wanted, to=6)
    # Tokens kept before each, at most C: the slot of a kept one, and what a token that goes has not before it.
    before = op.Min(op.CumSum(number, op.Constant(value_int=1), exclusive=1), capacity)
    stays = op.And(wanted, before < capacity)
    behind = op.Where(valid, position + capacity - before, tokens)
    place = op.Min(op.Where(stays, before, behind), tokens)  # [B, S], S for what goes nowhere
    room = op.Expand(tokens, shape + op.Constant(value_ints=[0, 1]))  # [B, S + 1]
    lists = op.ScatterElements(room, place, op.Expand(position, shape), axis=1)
    end = op.Unsqueeze(op.Cast(capacity, to=7), op.Constant(value_ints=[0]))  # [1]: C
    index = op.Slice(lists, op.Constant(value_ints=[0]), end, axis1)
    count = op.Min(op.ReduceSum(number, axis1, keepdims=0), capacity)
    return index, count, op.Slice(lists, end, size, axis1), op.Where(stays, before, op.Neg(one))

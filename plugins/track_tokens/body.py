"""TrackTokens in standard operators: targets are scattered to the tokens that were dropped, and owners look up.

The map has a column more at each end for what is outside; it holds the largest integer, which is no place.
"""

from __future__ import annotations

from onnxscript import script

from plugins._body import TRTPASS, Int32, op


@script(TRTPASS, default_opset=op)
def column_of(token: Int32, tokens: Int32) -> Int32:
    """Column of each token in the map: 0 and S + 1 for what is outside [0, S)."""
    outside = op.Cast(op.Constant(value_int=-1), to=6)
    return op.Max(op.Min(token, tokens), outside) - outside


@script(TRTPASS, default_opset=op)
def place_of_token(slot: Int32, rest: Int32, target: Int32, tokens: Int32) -> Int32:
    """Place after of token s - 1 of the stream `[B, S + 2]`, some of them no place; ``tokens`` is S."""
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    targets = op.Shape(target, start=1, end=2)  # [1]: T
    each = op.Max(targets / op.Max(op.Shape(rest, start=1, end=2), one), one)  # [1]: K
    first = op.Slice(target, zero, targets, one, each)  # [B, M]
    nothing = op.Cast(op.Constant(value_int=2147483647), to=6)
    kept = op.Pad(slot, op.Constant(value_ints=[0, 1, 0, 1]), nothing)
    joined = op.ScatterElements(kept, column_of(rest, tokens), first, axis=1)
    return op.Where(kept >= op.Cast(op.Constant(value_int=0), to=6), kept, joined)


@script(TRTPASS, default_opset=op)
def TrackTokens(owner: Int32, slot: Int32, rest: Int32, target: Int32, count: Int32) -> Int32:
    tokens = op.Cast(op.Shape(slot, start=1, end=2), to=6)  # [1]: S
    place = place_of_token(slot, rest, target, tokens)
    column = op.Unsqueeze(op.Cast(column_of(owner, tokens), to=7), op.Constant(value_ints=[2]))  # [B, N, 1]
    found = op.GatherND(place, column, batch_dims=1)  # [B, N]
    none = op.Cast(op.Constant(value_int=-1), to=6)
    return op.Max(op.Where(found < op.Unsqueeze(count, op.Constant(value_ints=[1])), found, none), none)

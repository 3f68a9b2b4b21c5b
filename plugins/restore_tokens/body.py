"""RestoreTokens in standard operators: the nearest source of each token by all pairs, then one gather of rows.

A pair is one integer, distance times S plus token, so that its minimum is the nearest, the lowest token of equals.
``dynamic`` leaves the pairs out where every token has an owner.
"""

from __future__ import annotations

from onnxscript import script

from plugins._body import TRTPASS, Floats, Int32, Int64, op


@script(TRTPASS, default_opset=op)
def owner_or_none(owner: Int32, x: Floats) -> Int64:
    """Owners `[B, S]`, with C in place of everything outside [0, C)."""
    rows = op.Shape(x, start=1, end=2)  # [1]: C
    place = op.Cast(owner, to=7)
    return op.Where(place >= op.Constant(value_int=0), op.Min(place, rows), rows)


@script(TRTPASS, default_opset=op)
def nearest_owner(owner: Int64, x: Floats, fixed: int, width: int) -> Int64:
    """Owner of each token `[B, S]`, of its nearest source where it is C; C where there is none."""
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    last = op.Constant(value_ints=[1])
    none = op.Shape(x, start=1, end=2)  # [1]: C
    tokens = op.Squeeze(op.Shape(owner, start=1, end=2))  # S
    token = op.Range(zero, tokens, one)  # [S]
    place = token - op.Constant(value_int=fixed)
    wide = op.Max(op.Constant(value_int=width), one)  # a line: one column has the same neighbours
    row = place / wide
    column = place - row * wide
    down = op.Unsqueeze(row, last) - row  # [S, S]
    along = op.Unsqueeze(column, last) - column
    pair = (down * down + along * along) * tokens + token  # [S, S]
    on_grid = place >= zero
    sourced = op.Where(on_grid, owner, none)  # [B, S]
    source = op.Unsqueeze(sourced < none, last)  # [B, 1, S]
    far = op.Constant(value_int=9223372036854775807)
    best = op.ReduceMin(op.Where(source, pair, far), op.Constant(value_ints=[2]))  # [B, S, 1]
    filled = op.GatherND(sourced, op.Mod(best, tokens), batch_dims=1)  # [B, S]; anything is C where there is no source
    return op.Where(owner < none, owner, op.Where(on_grid, filled, none))


@script(TRTPASS, default_opset=op)
def and_zero(x: Floats) -> Floats:
    """x with a row of zeros behind it `[B, C + 1, E]`, for what has no owner."""
    return op.Pad(x, op.Constant(value_ints=[0, 0, 0, 0, 1, 0]))


@script(TRTPASS, default_opset=op)
def dynamic(x: Floats, owner: Int32, fixed: int = 0, width: int = 0) -> Floats:
    given = owner_or_none(owner, x)
    if op.Squeeze(op.ReduceMax(given, keepdims=0) == op.Shape(x, start=1, end=2)):
        complete = nearest_owner(given, x, fixed, width)
    else:
        complete = op.Identity(given)
    return op.GatherND(and_zero(x), op.Unsqueeze(complete, op.Constant(value_ints=[2])), batch_dims=1)


@script(TRTPASS, default_opset=op)
def static(x: Floats, owner: Int32, fixed: int = 0, width: int = 0) -> Floats:
    complete = nearest_owner(owner_or_none(owner, x), x, fixed, width)
    return op.GatherND(and_zero(x), op.Unsqueeze(complete, op.Constant(value_ints=[2])), batch_dims=1)

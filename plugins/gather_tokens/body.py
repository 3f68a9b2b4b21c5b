"""GatherTokens in standard operators: a row of zeros before and behind the tokens, and one gather of whole rows."""

from __future__ import annotations

from onnxscript import script

from plugins._body import TRTPASS, Floats, Int32, op


@script(TRTPASS, default_opset=op)
def GatherTokens(x: Floats, index: Int32) -> Floats:
    tokens = op.Shape(x, start=1, end=2)  # [1]: S
    before = op.Constant(value_ints=[-1])
    place = op.Min(op.Max(op.Cast(index, to=7), before), tokens) - before  # [B, C] in [0, S + 1]
    padded = op.Pad(x, op.Constant(value_ints=[0, 1, 0, 0, 1, 0]))  # [B, S + 2, E]
    return op.GatherND(padded, op.Unsqueeze(place, op.Constant(value_ints=[2])), batch_dims=1)

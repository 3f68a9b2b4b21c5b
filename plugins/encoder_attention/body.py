"""EncoderAttention in standard operators: Attention-24, the bias spelt out for every query."""

from __future__ import annotations

from onnxscript import script

from plugins._body import TRTPASS, Float32, Floats, op


@script(TRTPASS, default_opset=op)
def EncoderAttention(q: Floats, k: Floats, v: Floats, bias: Float32, scale: float = 0.0) -> Floats:
    # Attention's own default is 1 / sqrt(D); the ratio to it is 1 unless another scale was given.
    ratio = op.Where(scale == 0.0, 1.0, scale * op.Sqrt(op.Cast(op.Squeeze(op.Shape(q, start=3, end=4)), to=1)))
    row = op.Unsqueeze(op.Max(bias, -60000.0), op.Constant(value_ints=[1, 2]))  # [B, 1, 1, S], finite in float16
    one = op.Constant(value_ints=[1])
    every = op.Expand(row, op.Concat(one, one, op.Shape(q, start=2, end=3), one, axis=0))  # [B, 1, S, S]
    return op.Attention(q, k * op.CastLike(ratio, k), v, op.CastLike(every, q))

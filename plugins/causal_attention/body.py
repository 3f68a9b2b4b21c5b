"""CausalAttention in standard operators: Attention-24."""

from __future__ import annotations

from onnxscript import script

from plugins._body import TRTPASS, Floats, op


@script(TRTPASS, default_opset=op)
def CausalAttention(q: Floats, k: Floats, v: Floats, scale: float = 0.0) -> Floats:
    # Attention's own default is 1 / sqrt(D); the ratio to it is 1 unless another scale was given.
    ratio = op.Where(scale == 0.0, 1.0, scale * op.Sqrt(op.Cast(op.Squeeze(op.Shape(q, start=3, end=4)), to=1)))
    return op.Attention(q, k * op.CastLike(ratio, k), v, is_causal=1)

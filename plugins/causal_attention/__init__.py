"""CausalAttention: dense causal attention, the control of every sparse one and a baseline of its own on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from trtpass.op import FLOATS, Case, Port, Tolerance, op

if TYPE_CHECKING:
    from torch import Tensor


@op(
    name="CausalAttention",
    source="Attention Is All You Need, arXiv 1706.03762, section 3.2; computed as in FlashAttention-2, arXiv "
    "2307.08691, section 3.1 (running softmax)",
    shape=lambda d, a: {"out": (d.B, d.H, d.S, d.Dv)},
    tolerance=Tolerance(
        atol={"float32": 2e-5, "float16": 4e-3},
        rtol={"float32": 1e-4, "float16": 4e-3},
        reason="rows are averages of v, so errors are relative to max|v|, a few units in the cases: float32 by the "
        "order of summation; float16 because q k and the probabilities may be rounded to 11 bits between the products",
    ),
)
def causal_attention(
    q: Annotated[Tensor, Port("B H S D", FLOATS)],
    k: Annotated[Tensor, Port("B Hkv S D", FLOATS)],
    v: Annotated[Tensor, Port("B Hkv S Dv", FLOATS)],
    *,
    scale: float = 0.0,
) -> Annotated[Tensor, Port("B H S Dv", FLOATS, name="out")]:
    """``out[b, h, t] = softmax(q[b, h, t] k[b, g, :t+1]^T scale) v[b, g, :t+1]`` with key head ``g = h // (H // Hkv)``.

    Args:
        q: queries after RoPE `[B, H, S, D]`.
        k: keys after RoPE `[B, Hkv, S, D]`.
        v: values `[B, Hkv, S, Dv]`.
        scale: factor of the scores; 0 means 1 / sqrt(D).

    Returns:
        out `[B, H, S, Dv]` in the dtype of q, computed in float32.
    """
    from torch.nn.functional import scaled_dot_product_attention

    query, key, value = q.float(), k.float(), v.float()
    out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale or None, enable_gqa=True)
    return out.to(q.dtype)


OP = causal_attention


@OP.body("dynamic")
@OP.body("static")
def _body() -> Any:
    from plugins.causal_attention.body import CausalAttention

    return CausalAttention


@OP.cases
def _cases() -> Sequence[Case]:
    from plugins.causal_attention.cases import CASES

    return CASES

"""EncoderAttention: every token attends to every token, each key with a bias of its own; the CPU's form of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from trtpass.op import FLOAT32, FLOATS, Case, Port, Tolerance, op

if TYPE_CHECKING:
    from torch import Tensor


@op(
    name="EncoderAttention",
    source="Attention Is All You Need, arXiv 1706.03762, section 3.2; bias: proportional attention of ToMe, arXiv "
    "2210.09461, section 3; computed with a running softmax as in FlashAttention-2, arXiv 2307.08691, section 3.1",
    shape=lambda d, a: {"out": (d.B, d.H, d.S, d.Dv)},
    tolerance=Tolerance(
        atol={"float32": 2e-5, "float16": 4e-3},
        rtol={"float32": 1e-4, "float16": 4e-3},
        reason="rows are averages of v, so errors are relative to max|v|, a few units in the cases: float32 by the "
        "order of summation; float16 because q k, the bias and the probabilities may be rounded to 11 bits",
    ),
)
def encoder_attention(
    q: Annotated[Tensor, Port("B H S D", FLOATS)],
    k: Annotated[Tensor, Port("B Hkv S D", FLOATS)],
    v: Annotated[Tensor, Port("B Hkv S Dv", FLOATS)],
    bias: Annotated[Tensor, Port("B S", FLOAT32)],
    *,
    scale: float = 0.0,
) -> Annotated[Tensor, Port("B H S Dv", FLOATS, name="out")]:
    """``out[b, h, t] = softmax_j(scale q[b, h, t] . k[b, g, j] + bias[b, j]) v[b, g]`` with ``g = h // (H // Hkv)``.

    Args:
        q: queries `[B, H, S, D]`.
        k: keys `[B, Hkv, S, D]`.
        v: values `[B, Hkv, S, Dv]`.
        bias: added to the scores of each key, in nats, finite `[B, S]`: the log of a token's size, -1e30 for padding.
        scale: factor of the scores; 0 means 1 / sqrt(D).

    Returns:
        out `[B, H, S, Dv]` in the dtype of q, computed in float32.
    """
    from torch.nn.functional import scaled_dot_product_attention

    query, key, value = q.float(), k.float(), v.float()
    mask = bias[:, None, None, :]  # [B, 1, 1, S]
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale or None, enable_gqa=True)
    return out.to(q.dtype)


OP = encoder_attention


@OP.body("dynamic")
@OP.body("static")
def _body() -> Any:
    from plugins.encoder_attention.body import EncoderAttention

    return EncoderAttention


@OP.cases
def _cases() -> Sequence[Case]:
    from plugins.encoder_attention.cases import CASES

    return CASES

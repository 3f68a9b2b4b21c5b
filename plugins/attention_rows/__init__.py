"""AttentionRows: the attention probabilities of chosen query rows, averaged over heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from trtpass.errors import InputError
from trtpass.op import FLOAT32, FLOATS, INT32, Case, Port, Tolerance, op

if TYPE_CHECKING:
    from torch import Tensor


@op(
    name="AttentionRows",
    source="EViT, arXiv 2202.07800, section 3 (attention of the class token); FastV, arXiv 2403.06764, section 4 (of "
    "the last token); FiCoCo, arXiv 2411.17686, section 3 (the whole map); ToMe, arXiv 2210.09461, section 3 (bias: "
    "the log of each key's size)",
    shape=lambda d, a: {"prob": (d.B, d.R, d.S)},
    tolerance=Tolerance(
        atol={"float32": 1e-6, "float16": 1e-6},
        rtol={"float32": 1e-4, "float16": 1e-4},
        reason="float32 throughout, whatever the input: a score of size 20 is known to about 1e-5, its exponential to "
        "1e-5 of itself, and the mean over heads has positive terms",
    ),
)
def attention_rows(
    q: Annotated[Tensor, Port("B H S D", FLOATS)],
    k: Annotated[Tensor, Port("B Hkv S D", FLOATS)],
    bias: Annotated[Tensor, Port("B S", FLOAT32)],
    row: Annotated[Tensor, Port("B R", INT32)],
    lengths: Annotated[Tensor, Port("B", INT32)],
    *,
    causal: int = 0,
    scale: float = 0.0,
) -> Annotated[Tensor, Port("B R S", FLOAT32, name="prob")]:
    """``prob[b, r]`` = mean over the H heads of ``softmax_j(scale q[b, h, row[b, r]] . k[b, h // G, j] + bias[b, j])``.

    The keys are j < L, and j <= i where ``causal``; all others have probability 0. Float32 whatever the input.

    Args:
        q: queries `[B, H, S, D]`, right-padded.
        k: keys `[B, Hkv, S, D]`; head h reads key head ``h // (H // Hkv)``. Padding must be finite.
        bias: added to the scores of each key, in units of nats `[B, S]`, such as the log of its size; padding may hold
            anything.
        row: query rows `[B, R]`; one outside [0, L) gives zeros.
        lengths: valid tokens L of each row `[B]`, clipped to [0, S].
        causal: 1 hides later keys, 0 does not.
        scale: factor of the scores; 0 means 1 / sqrt(D).

    Returns:
        prob float32 `[B, R, S]`.

    Raises:
        InputError: ``causal`` is neither 0 nor 1.
    """
    import torch

    if causal not in (0, 1):
        raise InputError(f"AttentionRows.causal is {causal}", "0 or 1")
    batch, heads, tokens, width = q.shape
    group = heads // k.shape[1]
    prob = torch.zeros(batch, row.shape[1], tokens, dtype=torch.float32, device=q.device)
    for b in range(batch):
        length = min(max(int(lengths[b]), 0), tokens)
        real = ((row[b] >= 0) & (row[b] < length)).nonzero()[:, 0]
        chosen = row[b, real].long()  # [r]
        keys = k[b].float().repeat_interleave(group, 0)[:, :length]  # [H, L, D]
        scores = q[b, :, chosen].float() @ keys.transpose(1, 2) * (scale or width**-0.5) + bias[b, :length]
        if causal:
            later = torch.arange(length, device=q.device) > chosen[:, None]  # [r, L]
            scores = scores.masked_fill(later, -torch.inf)
        prob[b, real, :length] = scores.softmax(-1).mean(0)
    return prob


OP = attention_rows


@OP.body("dynamic")
@OP.body("static")
def _body() -> Any:
    from plugins.attention_rows.body import AttentionRows

    return AttentionRows


@OP.cases
def _cases() -> Sequence[Case]:
    from plugins.attention_rows.cases import CASES

    return CASES

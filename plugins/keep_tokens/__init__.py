"""KeepTokens: which tokens of a row stay, as a mask: the highest scores within one budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from plugins._budget import check_budget, kept
from trtpass.op import FLOAT32, INT32, Case, Port, Tolerance, op

if TYPE_CHECKING:
    from torch import Tensor


@op(
    name="KeepTokens",
    source="EViT, arXiv 2202.07800, section 3 (a share of the tokens by score); ToMe, arXiv 2210.09461, section 3 (r "
    "fewer); FastV, arXiv 2403.06764, section 4; FiCoCo, arXiv 2411.17686, section 3 (N_S fewer)",
    shape=lambda d, a: {"keep": (d.B, d.S)},
    tolerance=Tolerance(atol={}, rtol={}, reason="integers: the set is exact, ties included"),
)
def keep_tokens(
    score: Annotated[Tensor, Port("B S", FLOAT32)],
    lengths: Annotated[Tensor, Port("B", INT32)],
    *,
    fixed: int = 0,
    permille: int = 1000,
    rounding: int = 999,
    drop: int = 0,
) -> Annotated[Tensor, Port("B S", INT32, name="keep")]:
    """1 for the first kept(L) valid tokens of each row in the order (score descending, index ascending), else 0.

    ``kept(L) = clamp(min(L, fixed) + (max(L - fixed, 0) * permille + rounding) // 1000 - drop, 0, L)``. A protected
    token has the score +inf. NaN counts as -inf.

    Args:
        score: `[B, S]`; padding may hold anything.
        lengths: valid tokens L of each row `[B]`, clipped to [0, S].
        fixed: tokens that the share does not count, such as those that are always kept, 0 to 2^20.
        permille: share of the other tokens in thousandths, 0 to 1000.
        rounding: 999 rounds the share up, 500 to the nearest, 0 down.
        drop: how many fewer, 0 to 2^20.

    Returns:
        keep int32 `[B, S]`, 1 or 0.

    Raises:
        InputError: an attribute out of range.
    """
    import torch

    check_budget("KeepTokens", fixed, permille, rounding, drop)
    batch, tokens = score.shape
    keep = torch.zeros(batch, tokens, dtype=torch.int32, device=score.device)
    for b in range(batch):
        length = min(max(int(lengths[b]), 0), tokens)
        row = torch.where(score[b, :length].isnan(), -torch.inf, score[b, :length])
        order = row.sort(descending=True, stable=True).indices
        keep[b, order[: kept(length, fixed, permille, rounding, drop)]] = 1
    return keep


OP = keep_tokens


@OP.body("dynamic")
def _dynamic() -> Any:
    from plugins.keep_tokens.body import sorted_tokens

    return sorted_tokens


@OP.body("static")
def _static() -> Any:
    from plugins.keep_tokens.body import counted_tokens

    return counted_tokens


@OP.cases
def _cases() -> Sequence[Case]:
    from plugins.keep_tokens.cases import CASES

    return CASES

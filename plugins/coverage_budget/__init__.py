"""CoverageBudget: how many tokens a layer keeps so that the pruned ones hold just the allowed share of the mass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from trtpass.errors import InputError
from trtpass.op import FLOAT32, INT32, Case, Port, Step, Tolerance, op

if TYPE_CHECKING:
    from torch import Tensor

MILLION = 10**6


@op(
    name="CoverageBudget",
    source="Token Sparse Attention, arXiv 2602.03216, section 3 (dynamic token coverage); prefix=1: its published code",
    shape=lambda d, a: {"keep": (d.B,)},
    tolerance=Tolerance(atol={}, rtol={}, reason="an integer made of fixed-point sums: equal in any order of adding"),
)
def coverage_budget(
    mass: Annotated[Tensor, Port("B H S", FLOAT32)],
    lengths: Annotated[Tensor, Port("B", INT32)],
    *,
    coverage_ppm: int = 5000,
    window: int = 128,
    min_tokens: int = 1024,
    prefix: int = 1,
) -> Annotated[Tensor, Port("B", INT32, name="keep")]:
    """The number of tokens to keep in each row, the same for all heads.

    With ``x_hj`` the mass clipped to [0, window] (NaN as 0) and ``c = float32(2^30 / (H window))``, column j holds
    ``q_j = sum_h round_half_even(x_hj c)``, an integer: a row's total is about 2^30. n is the smallest number of
    columns whose n lowest together hold at least ``coverage_ppm`` millionths of the total.

    Args:
        mass: column mass `[B, H, S]`, at most ``window`` in total for each head.
        lengths: valid tokens of each row `[B]`.
        coverage_ppm: share of the mass that may be pruned, in millionths.
        window: query rows that voted; with ``prefix`` also the columns at the end of a row that are always kept.
        min_tokens: rows of at most ``min_tokens + window`` tokens stay dense; with ``prefix`` a floor, window aside.
        prefix: 0, the paper: columns [0, L), keep = max(1, L - n). 1, the published code: columns [0, L - window),
            dense if n <= 1, else keep = max(min_tokens, (L - window) - n) + window, at most L.

    Returns:
        keep int32 `[B]`, 1 to L.

    Raises:
        InputError: ``coverage_ppm`` outside [0, 10^6), ``window`` below 1 or ``min_tokens`` below 0.
    """
    import torch

    if not 0 <= coverage_ppm < MILLION:
        raise InputError(f"CoverageBudget.coverage_ppm is {coverage_ppm}", "0 to 999999")
    if window < 1 or min_tokens < 0:
        raise InputError(f"CoverageBudget has window={window}, min_tokens={min_tokens}", "window >= 1, min_tokens >= 0")
    unit = torch.tensor(2.0**30, dtype=torch.float32) / (mass.shape[1] * window)
    share = (mass.float().nan_to_num(nan=0.0, posinf=window).clamp(0, window) * unit).round().long().sum(1)  # [B, S]
    keep = []
    for row, length in zip(share, lengths.tolist(), strict=True):
        domain = row[: max(length - window, 0) if prefix else length]
        lowest_first = torch.cat([domain.new_zeros(1), domain.sort().values.cumsum(0)])  # mass of the n lowest, n = 0..
        target = -(-coverage_ppm * int(lowest_first[-1]) // MILLION)
        pruned = int((lowest_first < target).sum())
        if length <= min_tokens + window or (prefix and pruned <= 1):
            keep.append(length)
        elif prefix:
            keep.append(min(length, max(min_tokens, length - window - pruned) + window))
        else:
            keep.append(max(1, length - pruned))
    return torch.tensor(keep, dtype=torch.int32, device=mass.device)


OP = coverage_budget


@OP.body("dynamic")
def _dynamic() -> Any:
    from plugins.coverage_budget.body import CoverageBudget

    return CoverageBudget


@OP.body("static")
def _static() -> Any:
    from plugins.coverage_budget.static import CoverageBudget

    return CoverageBudget


@OP.cases
def _cases() -> Sequence[Case]:
    from plugins.coverage_budget.cases import CASES

    return CASES


@OP.steps
def _steps() -> Sequence[Step]:
    from plugins.coverage_budget.steps import MASS_SHARE, SHARE_BUDGET

    return [Step(MASS_SHARE, ("mass", "lengths"), ("share",)), Step(SHARE_BUDGET, ("share", "lengths"), ("keep",))]

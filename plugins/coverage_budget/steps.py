"""CoverageBudget in two launches: each column's share of the mass, then the budget of each row from its shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from trtpass.kernel import Kernel
from trtpass.op import FLOAT32, INT32, Port, Tolerance, op

if TYPE_CHECKING:
    from torch import Tensor

MILLION = 10**6


@op(
    name="MassShare",
    source="Token Sparse Attention, arXiv 2602.03216, section 3 (dynamic token coverage)",
    shape=lambda d, a: {"share": (d.B, d.S)},
    tolerance=Tolerance(atol={}, rtol={}, reason="integers: rounding comes before the only sum"),
)
def mass_share(
    mass: Annotated[Tensor, Port("B H S", FLOAT32)],
    lengths: Annotated[Tensor, Port("B", INT32)],
    *,
    window: int = 128,
    prefix: int = 1,
) -> Annotated[Tensor, Port("B S", INT32, name="share")]:
    """Each column's mass over all heads in fixed point, ``q_j`` of CoverageBudget: a row's total is about 2^30.

    Args:
        mass: column mass `[B, H, S]`, at most ``window`` in total for each head.
        lengths: valid tokens of each row `[B]`.
        window: query rows that voted; with ``prefix`` also the columns at the end of a row that are no candidates.
        prefix: 0: columns [0, L); 1: columns [0, L - window).

    Returns:
        share int32 `[B, S]`; 0 outside the columns that ``prefix`` names.
    """
    import torch

    unit = torch.tensor(2.0**30, dtype=torch.float32) / (mass.shape[1] * window)
    share = (mass.float().nan_to_num(nan=0.0, posinf=window).clamp(0, window) * unit).round().long().sum(1)  # [B, S]
    column = torch.arange(mass.shape[2], device=mass.device)
    return share.where(column < lengths[:, None] - (window if prefix else 0), 0).int()


@op(
    name="ShareBudget",
    source="Token Sparse Attention, arXiv 2602.03216, section 3 (dynamic token coverage); prefix=1: its published code",
    shape=lambda d, a: {"keep": (d.B,)},
    tolerance=Tolerance(atol={}, rtol={}, reason="an integer made of sums of integers: equal in any order of adding"),
)
def share_budget(
    share: Annotated[Tensor, Port("B S", INT32)],
    lengths: Annotated[Tensor, Port("B", INT32)],
    *,
    coverage_ppm: int = 5000,
    window: int = 128,
    min_tokens: int = 1024,
    prefix: int = 1,
) -> Annotated[Tensor, Port("B", INT32, name="keep")]:
    """The number of tokens to keep in each row, as CoverageBudget defines it, from the columns' shares.

    Args:
        share: what MassShare makes, `[B, S]`: at least 0, and 0 outside the columns that ``prefix`` names.
        lengths: valid tokens of each row `[B]`.
        coverage_ppm: share of the mass that may be pruned, in millionths.
        window: query rows that voted; with ``prefix`` also the columns at the end of a row that are always kept.
        min_tokens: rows of at most ``min_tokens + window`` tokens stay dense; with ``prefix`` a floor, window aside.
        prefix: 0: columns [0, L); 1: columns [0, L - window).

    Returns:
        keep int32 `[B]`, 1 to L.
    """
    import torch

    keep = []
    for row, length in zip(share.long(), lengths.tolist(), strict=True):
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
    return torch.tensor(keep, dtype=torch.int32, device=share.device)


MASS_SHARE = mass_share
SHARE_BUDGET = share_budget


@MASS_SHARE.kernels
def _share_kernels() -> Sequence[Kernel]:
    from plugins.coverage_budget.kernel import SHARE

    return [SHARE]


@SHARE_BUDGET.kernels
def _budget_kernels() -> Sequence[Kernel]:
    from plugins.coverage_budget.kernel import BUDGET

    return [BUDGET]

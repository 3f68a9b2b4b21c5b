"""FicocoCorrelate: which kept tokens each dropped one joins, and with what weights."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

from trtpass.errors import InputError
from trtpass.op import FLOAT32, INT32, Case, Port, Tolerance, op

if TYPE_CHECKING:
    from torch import Tensor

MOST = 1e30  # of an affinity


def targets(d: SimpleNamespace, a: SimpleNamespace) -> Any:
    """T, K targets for each dropped token: one more than the columns but one, less the eps of them, rounded up.

    Rounded up in a way that stays above 0 where C is 0: runtimes divide negative numbers in two ways.
    """
    return d.M * (d.C + 1 - ((d.C - 1) * a.eps_permille + 1999) // 1000)


@op(
    name="FicocoCorrelate",
    source="FiCoCo, arXiv 2411.17686, section 3 (correlate stage: the kept tokens from the quantile eps on; compress "
    "stage: their normalised weights)",
    shape=lambda d, a: {"target": (d.B, targets(d, a)), "weight": (d.B, targets(d, a))},
    tolerance=Tolerance(
        atol={"float32": 1e-6},
        rtol={"float32": 1e-5},
        reason="a float32 sum of up to 1000 affinities in any order, and a division by it; targets are exact",
    ),
)
def ficoco_correlate(
    affinity: Annotated[Tensor, Port("B M S", FLOAT32)],
    index: Annotated[Tensor, Port("B C", INT32)],
    candidate: Annotated[Tensor, Port("B S", INT32)],
    count: Annotated[Tensor, Port("B", INT32)],
    *,
    eps_permille: int = 998,
) -> tuple[
    Annotated[Tensor, Port("B T", INT32, name="target")],
    Annotated[Tensor, Port("B T", FLOAT32, name="weight")],
]:
    """The columns of a row are its slots below ``count`` whose token ``index[c]`` is a candidate, t of them.

    Each of the M dropped tokens joins the ``k = t - ceil(eps (t - 1))`` columns of its highest affinity, ``eps =
    eps_permille / 1000``: those from the linear quantile eps of the columns on, where values differ. The weight of a
    column is its affinity over the sum of the k, or 1 / k where that sum is not above 0. Affinities are clipped to
    +-1e30, so that no sum overflows, and NaN is the lowest. ``T = M K``: K is the k of C columns.

    Args:
        affinity: of the dropped token m to the token s `[B, M, S]`.
        index: kept tokens `[B, C]`, ascending; what is outside [0, S) is none.
        candidate: tokens that may be joined, not 0 `[B, S]`.
        count: kept tokens of each row `[B]`.
        eps_permille: eps in thousandths, 0 to 999.

    Returns:
        target int32 `[B, T]`, of `[M, K]`: slots, the highest affinity first, the lowest slot of equals; C where a row
        has fewer than K. weight float32 `[B, T]`: 0 there.

    Raises:
        InputError: ``eps_permille`` outside 0 to 999.
    """
    import torch

    if not 0 <= eps_permille <= 999:
        raise InputError(f"FicocoCorrelate.eps_permille is {eps_permille}", "0 to 999")
    batch, dropped, tokens = affinity.shape
    slots = index.shape[1]
    each = slots - ((slots - 1) * eps_permille + 999) // 1000
    target = torch.full((batch, dropped, each), slots, dtype=torch.int32, device=affinity.device)
    weight = torch.zeros(batch, dropped, each, device=affinity.device)
    for b in range(batch):
        real = (torch.arange(slots, device=index.device) < count[b]) & (index[b] >= 0) & (index[b] < tokens)
        column = real.nonzero()[:, 0]
        column = column[candidate[b, index[b, column].long()] != 0]  # [t]
        number = len(column) - ((len(column) - 1) * eps_permille + 999) // 1000  # k
        value = affinity[b][:, index[b, column].long()].nan_to_num(nan=-MOST).clamp(-MOST, MOST)  # [M, t]
        value, order = value.sort(dim=1, descending=True, stable=True)
        value, order = value[:, :number], order[:, :number]
        target[b, :, :number] = column[order].int()
        total = value.sum(1, keepdim=True)
        even = total <= 0
        weight[b, :, :number] = torch.where(even, 1 / max(number, 1), value / torch.where(even, 1.0, total))
    return target.flatten(1), weight.flatten(1)


OP = ficoco_correlate


@OP.body("dynamic")
def _dynamic() -> Any:
    from plugins.ficoco_correlate.body import dynamic

    return dynamic


@OP.body("static")
def _static() -> Any:
    from plugins.ficoco_correlate.body import static

    return static


@OP.cases
def _cases() -> Sequence[Case]:
    from plugins.ficoco_correlate.cases import CASES

    return CASES

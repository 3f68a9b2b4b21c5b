"""SelectTokens: the highest-scoring tokens of each head, in ascending order, as capacity + count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from trtpass.errors import InputError
from trtpass.kernel import Kernel
from trtpass.op import FLOAT32, INT32, Case, Port, Tolerance, op

if TYPE_CHECKING:
    from torch import Tensor


@op(
    name="SelectTokens",
    source="Token Sparse Attention, arXiv 2602.03216, section 3 (per-head top-k, sorted); protected window as in "
    "SnapKV, arXiv 2404.14469, section 4",
    shape=lambda d, a: {"index": (d.B, d.N, (d.S * a.max_keep_permille + 999) // 1000), "count": (d.B, d.N)},
    tolerance=Tolerance(atol={}, rtol={}, reason="integers: the selected set is exact, ties included"),
)
def select_tokens(
    score: Annotated[Tensor, Port("B N S", FLOAT32)],
    keep: Annotated[Tensor, Port("B", INT32)],
    lengths: Annotated[Tensor, Port("B", INT32)],
    *,
    window: int = 0,
    max_keep_permille: int = 1000,
) -> tuple[
    Annotated[Tensor, Port("B N C", INT32, name="index")],
    Annotated[Tensor, Port("B N", INT32, name="count")],
]:
    """The ``min(keep, L, C)`` first tokens of each row in the order (protected, score descending, index ascending).

    Scores are clipped to +-1.7e38 (half of the largest float32; infinities too), and NaN counts as the lowest; equal
    scores go to the lowest index. Capacity ``C = ceil(S * max_keep_permille / 1000)`` depends on shapes alone.

    Args:
        score: `[B, N, S]`.
        keep: tokens wanted `[B]`, clipped to [0, min(L, C)].
        lengths: valid tokens L of each row `[B]`; later positions are never selected.
        window: the last ``min(window, L)`` tokens of a row are protected: they go before all others.
        max_keep_permille: capacity in thousandths of S, 1 to 1000.

    Returns:
        index int32 `[B, N, C]`, ascending, S in the slots from ``count`` on; count int32 `[B, N]`.

    Raises:
        InputError: ``max_keep_permille`` outside 1 to 1000 or ``window`` below 0.
    """
    import torch

    if not 1 <= max_keep_permille <= 1000:
        raise InputError(f"SelectTokens.max_keep_permille is {max_keep_permille}", "1 to 1000")
    if window < 0:
        raise InputError(f"SelectTokens.window is {window}", "0 or more")
    batch, heads, tokens = score.shape
    capacity = (tokens * max_keep_permille + 999) // 1000
    lowest = torch.finfo(torch.float32).min / 2
    finite = score.float().nan_to_num(nan=lowest).clamp(lowest, -lowest)
    index = torch.full((batch, heads, capacity), tokens, dtype=torch.int32, device=score.device)
    count = torch.empty(batch, heads, dtype=torch.int32, device=score.device)
    for b in range(batch):
        length = int(lengths[b])
        count[b] = number = max(0, min(int(keep[b]), length, capacity))
        by_score = finite[b, :, :length].sort(dim=-1, descending=True, stable=True).indices  # [N, L]
        unprotected = (by_score < length - window).to(torch.int8)
        order = by_score.gather(-1, unprotected.sort(dim=-1, stable=True).indices)
        index[b, :, :number] = order[:, :number].sort(dim=-1).values.int()
    return index, count


OP = select_tokens


@OP.body("dynamic")
def _dynamic() -> Any:
    from plugins.select_tokens.body import SelectTokens

    return SelectTokens


@OP.body("static")
def _static() -> Any:
    from plugins.select_tokens.static import SelectTokens

    return SelectTokens


@OP.cases
def _cases() -> Sequence[Case]:
    from plugins.select_tokens.cases import CASES

    return CASES


@OP.kernels
def _kernels() -> Sequence[Kernel]:
    from plugins.select_tokens.kernel import KERNEL

    return [KERNEL]

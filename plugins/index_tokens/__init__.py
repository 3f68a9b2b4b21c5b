"""IndexTokens: a mask of kept tokens as indices of those that stay and of those that go, and each token's new place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from plugins._budget import check_budget, kept
from trtpass.op import INT32, Case, Port, Tolerance, op

if TYPE_CHECKING:
    from torch import Tensor


def _shapes(d: Any, a: Any) -> dict[str, tuple[Any, ...]]:
    capacity = kept(d.S, a.fixed, a.permille, a.rounding, a.drop)
    return {"index": (d.B, capacity), "count": (d.B,), "rest": (d.B, d.S - capacity), "slot": (d.B, d.S)}


@op(
    name="IndexTokens",
    source="FiCoCo, arXiv 2411.17686, section 3 (the kept set T and the discarded set S); spatial order kept as in "
    "FastV, arXiv 2403.06764, section 4",
    shape=_shapes,
    tolerance=Tolerance(atol={}, rtol={}, reason="integers: positions and counts"),
)
def index_tokens(
    keep: Annotated[Tensor, Port("B S", INT32)],
    lengths: Annotated[Tensor, Port("B", INT32)],
    *,
    fixed: int = 0,
    permille: int = 1000,
    rounding: int = 999,
    drop: int = 0,
) -> tuple[
    Annotated[Tensor, Port("B C", INT32, name="index")],
    Annotated[Tensor, Port("B", INT32, name="count")],
    Annotated[Tensor, Port("B M", INT32, name="rest")],
    Annotated[Tensor, Port("B S", INT32, name="slot")],
]:
    """Positions of the kept tokens of each row, of the others, and where each token stands among the kept ones.

    The attributes give the capacity ``C = kept(S)`` (as in KeepTokens) and M = S - C, from shapes alone.

    Args:
        keep: not 0 for tokens to keep `[B, S]`; padding may hold anything.
        lengths: valid tokens of each row `[B]`, clipped to [0, S].
        fixed: see KeepTokens, as the other three.
        permille: share in thousandths, 0 to 1000.
        rounding: added before the division by 1000, 0 to 999.
        drop: how many fewer, 0 to 2^20.

    Returns:
        index int32 `[B, C]`: the first C kept tokens, ascending, S behind them; count int32 `[B]`: how many; rest int32
        `[B, M]`: the first M of the other valid tokens, ascending, S behind them; slot int32 `[B, S]`: the place of a
        token in ``index``, -1 for one that is not there.

    Raises:
        InputError: an attribute out of range.
    """
    import torch

    check_budget("IndexTokens", fixed, permille, rounding, drop)
    batch, tokens = keep.shape
    capacity = kept(tokens, fixed, permille, rounding, drop)
    whole: dict[str, Any] = {"dtype": torch.int32, "device": keep.device}
    index = torch.full((batch, capacity), tokens, **whole)
    rest = torch.full((batch, tokens - capacity), tokens, **whole)
    slot = torch.full((batch, tokens), -1, **whole)
    count = torch.zeros(batch, **whole)
    for b in range(batch):
        valid = torch.arange(tokens, device=keep.device) < int(lengths[b])
        stays = ((keep[b] != 0) & valid).nonzero()[:, 0][:capacity]
        valid[stays] = False
        others = valid.nonzero()[:, 0][: tokens - capacity]
        count[b] = len(stays)
        index[b, : len(stays)] = stays.int()
        rest[b, : len(others)] = others.int()
        slot[b, stays] = torch.arange(len(stays), **whole)
    return index, count, rest, slot


OP = index_tokens


@OP.body("dynamic")
@OP.body("static")
def _body() -> Any:
    from plugins.index_tokens.body import IndexTokens

    return IndexTokens


@OP.cases
def _cases() -> Sequence[Case]:
    from plugins.index_tokens.cases import CASES

    return CASES

"""TrackTokens: where each original token goes when the stream that holds it gets shorter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from trtpass.errors import InputError
from trtpass.op import INT32, Case, Port, Tolerance, op

if TYPE_CHECKING:
    from torch import Tensor


@op(
    name="TrackTokens",
    source="ToMe, arXiv 2210.09461, section 3 (tracking which tokens were merged); FiCoCo, arXiv 2411.17686, section 3 "
    "(a dropped token joins its correlated ones, here the heaviest)",
    shape=lambda d, a: {"moved": (d.B, d.N)},
    tolerance=Tolerance(atol={}, rtol={}, reason="integers: places of tokens"),
)
def track_tokens(
    owner: Annotated[Tensor, Port("B N", INT32)],
    slot: Annotated[Tensor, Port("B S", INT32)],
    rest: Annotated[Tensor, Port("B M", INT32)],
    target: Annotated[Tensor, Port("B T", INT32)],
    count: Annotated[Tensor, Port("B", INT32)],
) -> Annotated[Tensor, Port("B N", INT32, name="moved")]:
    """The place of each of N original tokens in a stream that goes from S tokens to ``count``.

    A token at place ``o = owner[n]`` goes to ``slot[o]`` where that is not negative; else, where ``o = rest[m]``, to
    the first of the places that the dropped token m joins, ``target[m * K]`` with ``K = T // M``. What is outside
    [0, count) is no place, and neither is an ``o`` outside [0, S).

    Args:
        owner: place of each original token in the stream before `[B, N]`, -1 for none.
        slot: place after of each token of the stream `[B, S]`, negative for one that is dropped.
        rest: the dropped tokens `[B, M]`, each once; what is outside [0, S) is none.
        target: the places that dropped tokens join `[B, T]`, K for each of the M, heaviest first.
        count: tokens of the stream after `[B]`.

    Returns:
        moved int32 `[B, N]`: place of each original token in the stream after, -1 for none.

    Raises:
        InputError: T is no multiple of M, or 0 where M is not.
    """
    import torch

    dropped, targets, tokens = rest.shape[1], target.shape[1], slot.shape[1]
    if targets % max(dropped, 1) or (targets == 0) != (dropped == 0):
        raise InputError(
            f"TrackTokens.target has T = {targets} for M = {dropped}", "T a multiple of M, 1 or more of it"
        )
    first = target[:, :: max(targets // max(dropped, 1), 1)]  # [B, M]
    moved = torch.full_like(owner, -1)
    for b in range(owner.shape[0]):
        joined = torch.full((tokens,), -1, dtype=torch.int32, device=slot.device)
        real = (rest[b] >= 0) & (rest[b] < tokens)
        joined[rest[b, real].long()] = first[b, real]
        after = torch.where(slot[b] >= 0, slot[b], joined)  # [S]
        inside = (owner[b] >= 0) & (owner[b] < tokens)
        moved[b, inside] = after[owner[b, inside].long()]
    return torch.where((moved >= 0) & (moved < count[:, None]), moved, -1)


OP = track_tokens


@OP.body("dynamic")
@OP.body("static")
def _body() -> Any:
    from plugins.track_tokens.body import TrackTokens

    return TrackTokens


@OP.cases
def _cases() -> Sequence[Case]:
    from plugins.track_tokens.cases import CASES

    return CASES

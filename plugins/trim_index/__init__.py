"""TrimIndex: a list of tokens no longer than the batch needs, where the target allows a length that depends on data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from trtpass.op import INT32, Case, Port, Tolerance, op

if TYPE_CHECKING:
    from torch import Tensor


@op(
    name="TrimIndex",
    source="LLaVA-Scissor, arXiv 2506.21862, section 3 (how many components there are depends on the data)",
    shape=lambda d, a: {"trimmed": (d.B, d.S)},
    tolerance=Tolerance(atol={}, rtol={}, reason="integers: indices, copied as they are"),
)
def trim_index(
    index: Annotated[Tensor, Port("B S", INT32)],
    count: Annotated[Tensor, Port("B", INT32)],
) -> Annotated[Tensor, Port("B C", INT32, name="trimmed")]:
    """The first ``count`` entries of each row; all others are S, which is no token.

    Args:
        index: a list a row `[B, S]`.
        count: entries that mean something `[B]`, clipped to [0, S].

    Returns:
        trimmed int32 `[B, C]`, C = S; the ``dynamic`` body cuts C to the largest count.
    """
    import torch

    places = index.shape[1]
    return torch.where(torch.arange(places, device=index.device) < count[:, None], index, places)


OP = trim_index


@OP.body("dynamic")
def _dynamic() -> Any:
    from plugins.trim_index.body import cut

    return cut


@OP.body("static")
def _static() -> Any:
    from plugins.trim_index.body import padded

    return padded


@OP.cases
def _cases() -> Sequence[Case]:
    from plugins.trim_index.cases import CASES

    return CASES

"""SegmentMean: the mean of the tokens that share a label."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

from trtpass.errors import InputError
from trtpass.op import FLOATS, INT32, Case, Port, Step, Tolerance, op

if TYPE_CHECKING:
    from torch import Tensor


def capacity(d: SimpleNamespace, a: SimpleNamespace) -> Any:
    """C, the segments that there is room for."""
    return (d.S * a.max_segments_permille + 999) // 1000


@op(
    name="SegmentMean",
    source="LLaVA-Scissor, arXiv 2506.21862, section 3 (the representative of a component is the mean of its members)",
    shape=lambda d, a: {
        "mean": (d.B, capacity(d, a), d.E),
        "size": (d.B, capacity(d, a)),
    },
    tolerance=Tolerance(
        atol={"float32": 1e-5, "float16": 1e-5},
        rtol={"float32": 1e-5, "float16": 1e-3},
        reason="float32 sums of up to 1000 values of size 1 to 10, whose order may differ, divided by their number; "
        "float16 is rounded once, at the end, and a sum near a rounding boundary may fall on either side (2^-10)",
    ),
)
def segment_mean(
    x: Annotated[Tensor, Port("B S E", FLOATS)],
    label: Annotated[Tensor, Port("B S", INT32)],
    *,
    max_segments_permille: int = 1000,
) -> tuple[
    Annotated[Tensor, Port("B C E", FLOATS, name="mean")],
    Annotated[Tensor, Port("B C", INT32, name="size")],
]:
    """``mean[b, c]`` = mean of the ``x[b, i]`` with ``label[b, i] = c``, summed in float32 in ascending order of i.

    Capacity ``C = ceil(S * max_segments_permille / 1000)`` depends on shapes alone. A value that is not finite reaches
    the mean of its own segment and no other.

    Args:
        x: tokens `[B, S, E]`; those outside every segment may hold anything.
        label: segment of each token `[B, S]`; a token whose label is outside [0, C) belongs to none.
        max_segments_permille: capacity in thousandths of S, 1 to 1000.

    Returns:
        mean `[B, C, E]` in the dtype of x, 0 for an empty segment; size int32 `[B, C]`: tokens of each segment.

    Raises:
        InputError: ``max_segments_permille`` outside 1 to 1000.
    """
    import torch

    if not 1 <= max_segments_permille <= 1000:
        raise InputError(f"SegmentMean.max_segments_permille is {max_segments_permille}", "1 to 1000")
    batch, tokens, width = x.shape
    capacity = (tokens * max_segments_permille + 999) // 1000
    mean = torch.zeros(batch, capacity, width, dtype=x.dtype, device=x.device)
    size = torch.zeros(batch, capacity, dtype=torch.int32, device=x.device)
    for b in range(batch):
        kept = ((label[b] >= 0) & (label[b] < capacity)).nonzero()[:, 0]
        segment = label[b, kept].long()
        size[b] = segment.bincount(minlength=capacity)
        total = torch.zeros(capacity, width, device=x.device).index_add_(0, segment, x[b, kept].float())
        mean[b] = (total / size[b].clamp(min=1)[:, None]).to(x.dtype)
    return mean, size


OP = segment_mean


@OP.body("dynamic")
def _dynamic() -> Any:
    from plugins.segment_mean.body import scattered

    return scattered


@OP.body("static")
def _static() -> Any:
    from plugins.segment_mean.body import multiplied

    return multiplied


@OP.cases
def _cases() -> Sequence[Case]:
    from plugins.segment_mean.cases import CASES

    return CASES


@OP.steps
def _steps() -> Sequence[Step]:
    from plugins.segment_mean.steps import SEGMENT_MEANS, SEGMENT_ORDER

    return [
        Step(SEGMENT_ORDER, ("label",), ("order", "ordered")),
        Step(SEGMENT_MEANS, ("x", "order", "ordered"), ("mean", "size")),
    ]

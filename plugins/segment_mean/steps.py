"""SegmentMean in two launches: tokens in the order of their labels, then the mean of each segment's rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from plugins.segment_mean import OP, capacity
from trtpass.kernel import Kernel
from trtpass.op import FLOATS, INT32, Port, Tolerance, op

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = "LLaVA-Scissor, arXiv 2506.21862, section 3 (the representative of a component is the mean of its members)"


@op(
    name="SegmentOrder",
    source=SOURCE,
    shape=lambda d, a: {"order": (d.B, d.S), "ordered": (d.B, d.S)},
    tolerance=Tolerance(atol={}, rtol={}, reason="integers: a stable sort has one result"),
)
def segment_order(
    label: Annotated[Tensor, Port("B S", INT32)],
    *,
    max_segments_permille: int = 1000,
) -> tuple[
    Annotated[Tensor, Port("B S", INT32, name="order")],
    Annotated[Tensor, Port("B S", INT32, name="ordered")],
]:
    """Tokens by ascending label, those of one label by ascending index.

    Args:
        label: segment of each token `[B, S]`; outside [0, C) it counts as -1.
        max_segments_permille: C in thousandths of S, rounded up.

    Returns:
        order int32 `[B, S]`: the tokens; ordered int32 `[B, S]`: their labels.
    """
    capacity = (label.shape[1] * max_segments_permille + 999) // 1000
    ordered, order = label.masked_fill((label < 0) | (label >= capacity), -1).sort(stable=True)
    return order.int(), ordered


@op(
    name="SegmentMeans",
    source=SOURCE,
    shape=lambda d, a: {
        "mean": (d.B, capacity(d, a), d.E),
        "size": (d.B, capacity(d, a)),
    },
    tolerance=Tolerance(
        atol={"float32": 1e-5, "float16": 1e-5},
        rtol={"float32": 1e-5, "float16": 1e-3},
        reason="that of SegmentMean: float32 sums in another order, rounded once",
    ),
)
def segment_means(
    x: Annotated[Tensor, Port("B S E", FLOATS)],
    order: Annotated[Tensor, Port("B S", INT32)],
    ordered: Annotated[Tensor, Port("B S", INT32)],
    *,
    max_segments_permille: int = 1000,
) -> tuple[
    Annotated[Tensor, Port("B C E", FLOATS, name="mean")],
    Annotated[Tensor, Port("B C", INT32, name="size")],
]:
    """SegmentMean of tokens whose order is known.

    Args:
        x: tokens `[B, S, E]`.
        order: tokens by ascending label `[B, S]`.
        ordered: their labels `[B, S]`, -1 for tokens of no segment.
        max_segments_permille: capacity C in thousandths of S.

    Returns:
        mean `[B, C, E]` and size int32 `[B, C]`, as SegmentMean.
    """
    import torch

    label = torch.empty_like(ordered).scatter_(1, order.long(), ordered)
    return OP(x, label, max_segments_permille=max_segments_permille)


SEGMENT_ORDER, SEGMENT_MEANS = segment_order, segment_means


@SEGMENT_ORDER.kernels
def _order_kernels() -> Sequence[Kernel]:
    from plugins.segment_mean.kernel import ORDER

    return [ORDER]


@SEGMENT_MEANS.kernels
def _mean_kernels() -> Sequence[Kernel]:
    from plugins.segment_mean.kernel import MEANS

    return [MEANS]

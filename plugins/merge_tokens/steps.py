"""MergeTokens in two launches: tokens in the order of their targets, then each row with the tokens that join it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from trtpass.kernel import Kernel
from trtpass.op import FLOAT32, FLOATS, INT32, Port, Tolerance, op

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = "ToMe, arXiv 2210.09461, section 3 (size-weighted mean of merged tokens)"


@op(
    name="TargetOrder",
    source=SOURCE,
    shape=lambda d, a: {"order": (d.B, d.S), "ordered": (d.B, d.S)},
    tolerance=Tolerance(atol={}, rtol={}, reason="integers: a stable sort has one result"),
)
def target_order(
    label: Annotated[Tensor, Port("B S", INT32)],
) -> tuple[
    Annotated[Tensor, Port("B S", INT32, name="order")],
    Annotated[Tensor, Port("B S", INT32, name="ordered")],
]:
    """Tokens by ascending label, those of one label by ascending index.

    Args:
        label: target of each token `[B, S]`; below 0, and at 2^31 - 1, it counts as -1.

    Returns:
        order int32 `[B, S]`: the tokens; ordered int32 `[B, S]`: their labels.
    """
    ordered, order = label.masked_fill((label < 0) | (label == 2**31 - 1), -1).sort(stable=True)
    return order.int(), ordered


@op(
    name="MergeRows",
    source=SOURCE,
    shape=lambda d, a: {"merged": (d.B, d.R, d.E), "merged_size": (d.B, d.R)},
    tolerance=Tolerance(
        atol={"float32": 1e-5, "float16": 1e-5},
        rtol={"float32": 1e-5, "float16": 1e-3},
        reason="that of MergeTokens: float32 sums in another order, rounded once",
    ),
)
def merge_rows(
    base: Annotated[Tensor, Port("B R E", FLOATS)],
    base_size: Annotated[Tensor, Port("B R", FLOAT32)],
    x: Annotated[Tensor, Port("B S E", FLOATS)],
    size: Annotated[Tensor, Port("B S", FLOAT32)],
    order: Annotated[Tensor, Port("B S", INT32)],
    ordered: Annotated[Tensor, Port("B S", INT32)],
) -> tuple[
    Annotated[Tensor, Port("B R E", FLOATS, name="merged")],
    Annotated[Tensor, Port("B R", FLOAT32, name="merged_size")],
]:
    """MergeTokens of tokens whose order is known.

    Args:
        base: rows that tokens join `[B, R, E]`.
        base_size: weight of each of them `[B, R]`.
        x: tokens `[B, S, E]`.
        size: weight of each token `[B, S]`.
        order: tokens by ascending target `[B, S]`.
        ordered: their targets `[B, S]`; a token whose target is outside [0, R) goes nowhere.

    Returns:
        merged `[B, R, E]` and merged_size float32 `[B, R]`, as MergeTokens.
    """
    import torch

    from plugins.merge_tokens import OP

    target = torch.empty_like(ordered).scatter_(1, order.long(), ordered)
    return OP(base, base_size, x, size, target)


TARGET_ORDER, MERGE_ROWS = target_order, merge_rows


@TARGET_ORDER.kernels
def _order_kernels() -> Sequence[Kernel]:
    from plugins.merge_tokens.kernel import ORDER

    return [ORDER]


@MERGE_ROWS.kernels
def _merge_kernels() -> Sequence[Kernel]:
    from plugins.merge_tokens.kernel import MERGE

    return [MERGE]

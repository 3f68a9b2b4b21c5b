"""MergeTokens: tokens join targets as a mean weighted by size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from trtpass.op import FLOAT32, FLOATS, INT32, Case, Port, Step, Tolerance, op

if TYPE_CHECKING:
    from torch import Tensor


@op(
    name="MergeTokens",
    source="ToMe, arXiv 2210.09461, section 3 (size-weighted mean of merged tokens); LLaVA-Scissor, arXiv 2506.21862, "
    "section 3 (a representative with all tokens that joined it: every size 1)",
    shape=lambda d, a: {"merged": (d.B, d.R, d.E), "merged_size": (d.B, d.R)},
    tolerance=Tolerance(
        atol={"float32": 1e-5, "float16": 1e-5},
        rtol={"float32": 1e-5, "float16": 1e-3},
        reason="float32 sums of up to 1000 products of size 1 to 10, whose order may differ, divided by their weight; "
        "float16 is rounded once, at the end, and a sum near a rounding boundary may fall on either side (2^-10)",
    ),
)
def merge_tokens(
    base: Annotated[Tensor, Port("B R E", FLOATS)],
    base_size: Annotated[Tensor, Port("B R", FLOAT32)],
    x: Annotated[Tensor, Port("B S E", FLOATS)],
    size: Annotated[Tensor, Port("B S", FLOAT32)],
    target: Annotated[Tensor, Port("B S", INT32)],
) -> tuple[
    Annotated[Tensor, Port("B R E", FLOATS, name="merged")],
    Annotated[Tensor, Port("B R", FLOAT32, name="merged_size")],
]:
    """Each row r of ``base`` becomes the mean of itself and of the tokens whose target is r, weighted by size.

    ``merged_size_r = base_size_r + sum size_i`` and ``merged_r = (base_size_r base_r + sum size_i x_i) /
    merged_size_r``, over the i with ``target_i = r`` in ascending order, in float32. A value that is not finite reaches
    the row that its token joins and no other.

    Args:
        base: rows that tokens join `[B, R, E]`.
        base_size: weight of each of them `[B, R]`, 0 or more.
        x: tokens `[B, S, E]`; those that go nowhere may hold anything.
        size: weight of each token `[B, S]`, 0 or more.
        target: row of base that each token joins `[B, S]`; a token whose target is outside [0, R) goes nowhere.

    Returns:
        merged `[B, R, E]` in the dtype of base, 0 where ``merged_size`` is 0; merged_size float32 `[B, R]`.
    """
    import torch

    merged = torch.zeros_like(base)
    merged_size = base_size.clone()
    for b in range(base.shape[0]):
        kept = ((target[b] >= 0) & (target[b] < base.shape[1])).nonzero()[:, 0]
        row, weight = target[b, kept].long(), size[b, kept]
        total = base_size[b, :, None] * base[b].float()
        total.index_add_(0, row, weight[:, None] * x[b, kept].float())
        merged_size[b].index_add_(0, row, weight)
        mean = total / merged_size[b, :, None]
        merged[b] = torch.where(merged_size[b, :, None] == 0, 0.0, mean).to(base.dtype)
    return merged, merged_size


OP = merge_tokens


@OP.body("dynamic")
def _dynamic() -> Any:
    from plugins.merge_tokens.body import scattered

    return scattered


@OP.body("static")
def _static() -> Any:
    from plugins.merge_tokens.body import multiplied

    return multiplied


@OP.cases
def _cases() -> Sequence[Case]:
    from plugins.merge_tokens.cases import CASES

    return CASES


@OP.steps
def _steps() -> Sequence[Step]:
    from plugins.merge_tokens.steps import MERGE_ROWS, TARGET_ORDER

    return [
        Step(TARGET_ORDER, ("target",), ("order", "ordered")),
        Step(MERGE_ROWS, ("base", "base_size", "x", "size", "order", "ordered"), ("merged", "merged_size")),
    ]

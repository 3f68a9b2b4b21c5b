"""RestoreTokens: a row for each original token again, of a stream that got shorter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from trtpass.errors import InputError
from trtpass.op import FLOATS, INT32, Case, Port, Tolerance, op

if TYPE_CHECKING:
    from torch import Tensor


@op(
    name="RestoreTokens",
    source="ToMe, arXiv 2210.09461, section 3 (a merged token stands for its members); a pruned token of EViT, arXiv "
    "2202.07800, section 3, or of FastV, arXiv 2403.06764, section 4, takes the row of its nearest neighbour",
    shape=lambda d, a: {"rows": (d.B, d.S, d.E)},
    tolerance=Tolerance(
        atol={"float32": 0.0, "float16": 0.0},
        rtol={"float32": 0.0, "float16": 0.0},
        reason="rows are copied, bit by bit",
    ),
)
def restore_tokens(
    x: Annotated[Tensor, Port("B C E", FLOATS)],
    owner: Annotated[Tensor, Port("B S", INT32)],
    *,
    fixed: int = 0,
    width: int = 0,
) -> Annotated[Tensor, Port("B S E", FLOATS, name="rows")]:
    """The row ``x[owner[n]]`` of each original token n; where it has none, that of the nearest original token with one.

    Original tokens from ``fixed`` on lie on a grid of ``width`` columns, row by row; nearest is the smallest squared
    distance, the lowest token of equals. With ``width`` 0 they lie in a line. Tokens before ``fixed`` (a class token)
    have no place there: they fill nothing, and without an owner are 0. So is every token where no other can fill it.

    Args:
        x: the stream `[B, C, E]`.
        owner: place of each of the S original tokens in it `[B, S]`; what is outside [0, C) is none.
        fixed: original tokens before the grid.
        width: columns of the grid, 0 for a line.

    Returns:
        rows `[B, S, E]` in the dtype of x.

    Raises:
        InputError: ``fixed`` or ``width`` below 0.
    """
    import torch

    if fixed < 0 or width < 0:
        raise InputError(f"RestoreTokens has fixed={fixed}, width={width}", "0 or more")
    batch, tokens = owner.shape
    rows = torch.zeros(batch, tokens, x.shape[2], dtype=x.dtype, device=x.device)
    place = torch.arange(tokens, device=x.device) - fixed
    row, column = (place // width, place % width) if width else (place * 0, place)
    distance = (row[:, None] - row).square() + (column[:, None] - column).square()  # [S, S]
    for b in range(batch):
        has = (owner[b] >= 0) & (owner[b] < x.shape[1])
        rows[b, has] = x[b, owner[b, has].long()]
        source = (has & (place >= 0)).nonzero()[:, 0]  # ascending
        orphan = (~has & (place >= 0)).nonzero()[:, 0]
        if len(source) and len(orphan):
            order = distance[orphan][:, source].sort(dim=1, stable=True).indices[:, 0]
            rows[b, orphan] = x[b, owner[b, source[order]].long()]
    return rows


OP = restore_tokens


@OP.body("dynamic")
def _dynamic() -> Any:
    from plugins.restore_tokens.body import dynamic

    return dynamic


@OP.body("static")
def _static() -> Any:
    from plugins.restore_tokens.body import static

    return static


@OP.cases
def _cases() -> Sequence[Case]:
    from plugins.restore_tokens.cases import CASES

    return CASES

"""GatherTokens: the rows of a token stream that an index names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from trtpass.op import FLOATS, INT32, Case, Port, Tolerance, op

if TYPE_CHECKING:
    from torch import Tensor


@op(
    name="GatherTokens",
    source="FiCoCo, arXiv 2411.17686, section 3 (the tokens that are kept, and those that are discarded); ToMe, "
    "arXiv 2210.09461, section 3",
    shape=lambda d, a: {"rows": (d.B, d.C, d.E)},
    tolerance=Tolerance(
        atol={"float32": 0.0, "float16": 0.0},
        rtol={"float32": 0.0, "float16": 0.0},
        reason="rows are copied, bit for bit",
    ),
)
def gather_tokens(
    x: Annotated[Tensor, Port("B S E", FLOATS)],
    index: Annotated[Tensor, Port("B C", INT32)],
) -> Annotated[Tensor, Port("B C E", FLOATS, name="rows")]:
    """``rows[b, c] = x[b, index[b, c]]``, zeros where the index is outside [0, S).

    Args:
        x: token stream `[B, S, E]`.
        index: rows to take `[B, C]`, in any order, the same one as often as wanted.

    Returns:
        rows `[B, C, E]` of the type of ``x``.
    """
    import torch

    tokens = x.shape[1]
    inside = (index >= 0) & (index < tokens)  # [B, C]
    padded = torch.cat([x, x.new_zeros(x.shape[0], 1, x.shape[2])], 1)  # row S is zeros
    place = torch.where(inside, index, tokens).long()[..., None].expand(-1, -1, x.shape[2])
    return padded.gather(1, place)


OP = gather_tokens


@OP.body("dynamic")
@OP.body("static")
def _body() -> Any:
    from plugins.gather_tokens.body import GatherTokens

    return GatherTokens


@OP.cases
def _cases() -> Sequence[Case]:
    from plugins.gather_tokens.cases import CASES

    return CASES

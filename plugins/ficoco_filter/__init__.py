"""FicocoFilter: which tokens are redundant, by the attention they get and their part in a cue, spread over a grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from trtpass.errors import InputError
from trtpass.op import FLOAT32, INT32, Case, Port, Tolerance, op

if TYPE_CHECKING:
    from torch import Tensor


@op(
    name="FicocoFilter",
    source="FiCoCo, arXiv 2411.17686, section 3 (filter stage of FiCoCo-V and FiCoCo-L, local penalty)",
    shape=lambda d, a: {"score": (d.B, d.S)},
    tolerance=Tolerance(
        atol={"float32": 1e-6},
        rtol={"float32": 1e-5},
        reason="a float32 mean of up to 1000 probabilities in any order, less a cue of the same size",
    ),
)
def ficoco_filter(
    prob: Annotated[Tensor, Port("B S S", FLOAT32)],
    cue: Annotated[Tensor, Port("B S", FLOAT32)],
    place: Annotated[Tensor, Port("B S", INT32)],
    protected: Annotated[Tensor, Port("B S", INT32)],
    lengths: Annotated[Tensor, Port("B", INT32)],
    *,
    weight_permille: int = 350,
    width: int = 0,
    window: int = 2,
    coefficient_permille: int = 2000,
) -> Annotated[Tensor, Port("B S", FLOAT32, name="score")]:
    """The negative redundancy of each token, so that the highest are kept.

    Over the valid unprotected tokens V of a row, N of them, the redundancy of token i is ``s_i = w mean_j prob[j, i] -
    (1 - w) cue_i`` with j in V and ``w = weight_permille / 1000``. Then the penalty, which keeps neighbours from being
    dropped together: in each window of the grid the token of V with the highest s, the lowest of equals, gets ``c s``
    if s is above 0, else ``s / c``, with ``c = coefficient_permille / 1000``. NaN is the lowest s, and stays NaN.

    Args:
        prob: head mean of the attention probabilities `[B, S, S]`, a row for each query; rows outside V must be finite.
        cue: what speaks for a token `[B, S]`: the attention of the class token or of the text.
        place: place of each token on the grid, row by row `[B, S]`; a negative one is in no window.
        protected: tokens that stay, not 0 `[B, S]`.
        lengths: valid tokens of each row `[B]`.
        weight_permille: w in thousandths, 0 to 1000.
        width: columns of the grid, 0 for no penalty.
        window: rows and columns of a window; ``width * window`` is below 2^31.
        coefficient_permille: c in thousandths, 1 or more.

    Returns:
        score float32 `[B, S]`: -s, and +inf for tokens outside V.

    Raises:
        InputError: an attribute out of its range.
    """
    import torch

    if not 0 <= weight_permille <= 1000 or coefficient_permille < 1:
        raise InputError(
            f"FicocoFilter has weight_permille={weight_permille}, coefficient_permille={coefficient_permille}",
            "0 to 1000, and 1 or more",
        )
    if width < 0 or window < 1 or max(width, 1) * window >= 2**31:
        raise InputError(f"FicocoFilter has width={width}, window={window}", "0 or more, 1 or more, product < 2^31")
    weight, coefficient = weight_permille / 1000, coefficient_permille / 1000
    ranked = (torch.arange(prob.shape[2], device=prob.device) < lengths[:, None]) & (protected == 0)  # [B, S]
    number = ranked.sum(1, keepdim=True).clamp(min=1)
    received = torch.where(ranked[:, :, None], prob, 0.0).sum(1) / number
    redundancy = weight * received - (1 - weight) * cue
    order = redundancy.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    for b in range(prob.shape[0] if width else 0):
        best: dict[tuple[int, int], int] = {}
        for i in (ranked[b] & (place[b] >= 0)).nonzero()[:, 0].tolist():
            row, column = divmod(int(place[b, i]), width)
            first = best.setdefault((row // window, column // window), i)
            if order[b, i] > order[b, first]:
                best[row // window, column // window] = i
        for i in best.values():
            redundancy[b, i] *= coefficient if redundancy[b, i] > 0 else 1 / coefficient
    return torch.where(ranked, -redundancy, torch.inf)


OP = ficoco_filter


@OP.body("dynamic")
def _dynamic() -> Any:
    from plugins.ficoco_filter.body import dynamic

    return dynamic


@OP.body("static")
def _static() -> Any:
    from plugins.ficoco_filter.body import static

    return static


@OP.cases
def _cases() -> Sequence[Case]:
    from plugins.ficoco_filter.cases import CASES

    return CASES

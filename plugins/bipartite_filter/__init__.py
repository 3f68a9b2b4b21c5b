"""BipartiteFilter: how far each even token is from its most similar odd one, and which odd ones there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from trtpass.op import FLOAT32, FLOATS, INT32, Case, Port, Tolerance, op

if TYPE_CHECKING:
    from torch import Tensor


@op(
    name="BipartiteFilter",
    source="ToMe, arXiv 2210.09461, section 3 (bipartite soft matching: alternating sets, the best match of each)",
    shape=lambda d, a: {"score": (d.B, d.S), "candidate": (d.B, d.S)},
    tolerance=Tolerance(
        atol={"float32": 2e-6, "float16": 2e-6},
        rtol={"float32": 0.0, "float16": 0.0},
        reason="float32 throughout, whatever the input: a cosine is a sum of E products of at most 1 in total, each "
        "known to a few units of 2^-24, and a maximum moves by no more than its terms",
    ),
)
def bipartite_filter(
    metric: Annotated[Tensor, Port("B S E", FLOATS)],
    protected: Annotated[Tensor, Port("B S", INT32)],
    lengths: Annotated[Tensor, Port("B", INT32)],
) -> tuple[
    Annotated[Tensor, Port("B S", FLOAT32, name="score")],
    Annotated[Tensor, Port("B S", INT32, name="candidate")],
]:
    """``score_i = -max_j cos(metric_i, metric_j)`` over the candidates j, for even i; the highest scores are kept.

    Candidates are the valid unprotected odd positions. A position that is odd, protected or padding has +inf, as has
    one without a direction (as in BipartiteMatch) or without any candidate that has one: nothing to merge with.

    Args:
        metric: what tokens are compared by, such as keys averaged over heads `[B, S, E]`; padding may hold anything.
        protected: not 0 for tokens that never merge `[B, S]`.
        lengths: valid tokens of each row `[B]`, clipped to [0, S].

    Returns:
        score float32 `[B, S]`, candidate int32 `[B, S]`, 1 or 0.
    """
    import torch

    from plugins._cosine import unit_rows

    batch, tokens = protected.shape
    position = torch.arange(tokens, device=metric.device)
    score = torch.full((batch, tokens), torch.inf, device=metric.device)
    candidate = torch.zeros(batch, tokens, dtype=torch.int32, device=metric.device)
    for b in range(batch):
        free = (position < int(lengths[b])) & (protected[b] == 0)
        candidate[b] = (free & (position % 2 == 1)).int()
        units, directed = unit_rows(metric[b])
        left = (free & directed & (position % 2 == 0)).nonzero()[:, 0]
        right = (directed & (candidate[b] == 1)).nonzero()[:, 0]
        if len(left) and len(right):
            score[b, left] = -(units[left] @ units[right].T).amax(1)
    return score, candidate


OP = bipartite_filter


@OP.body("dynamic")
@OP.body("static")
def _body() -> Any:
    from plugins.bipartite_filter.body import BipartiteFilter

    return BipartiteFilter


@OP.cases
def _cases() -> Sequence[Case]:
    from plugins.bipartite_filter.cases import CASES

    return CASES

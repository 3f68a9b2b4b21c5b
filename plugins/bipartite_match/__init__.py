"""BipartiteMatch: the most similar row of one set for each row of another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from trtpass.op import FLOAT32, FLOATS, INT32, Case, Port, Step, Tolerance, op

if TYPE_CHECKING:
    from torch import Tensor


@op(
    name="BipartiteMatch",
    source="ToMe, arXiv 2210.09461, section 3 (bipartite soft matching: an edge from each token to its most similar); "
    "LLaVA-Scissor, arXiv 2506.21862, section 3 (every token joins its most similar representative)",
    shape=lambda d, a: {"match": (d.B, d.S), "similarity": (d.B, d.S)},
    tolerance=Tolerance(
        atol={"float32": 2e-6, "float16": 2e-6},
        rtol={"float32": 0.0, "float16": 0.0},
        reason="float32 throughout, whatever the input: a cosine is a sum of E products of at most 1 in total, each "
        "known to a few units of 2^-24; matches are exact wherever two cosines differ by more than that",
    ),
)
def bipartite_match(
    a: Annotated[Tensor, Port("B S E", FLOATS)],
    b: Annotated[Tensor, Port("B R E", FLOATS)],
    lengths: Annotated[Tensor, Port("B", INT32)],
) -> tuple[
    Annotated[Tensor, Port("B S", INT32, name="match")],
    Annotated[Tensor, Port("B S", FLOAT32, name="similarity")],
]:
    """``match[n, i]`` = the valid row j of ``b[n]`` with the highest ``cos(a[n, i], b[n, j])``, the lowest j of equals.

    Cosines are float32, whatever the input. A vector without a direction is similar to nothing: a zero vector, or one
    whose sum of squares is not a finite normal float32 (NaN or infinity in it, a norm below about 1e-19 or above
    1.8e19). Such a row of b is never chosen, and such a row of a chooses none.

    Args:
        a: rows that choose `[B, S, E]`.
        b: rows to choose from `[B, R, E]`, right-padded; padding may hold anything.
        lengths: valid rows of b `[B]`, clipped to [0, R].

    Returns:
        match int32 `[B, S]`, R where nothing can be chosen; similarity float32 `[B, S]`, that cosine, -inf where
        nothing can be chosen.
    """
    import torch

    from plugins._cosine import unit_rows

    batch, tokens = a.shape[:2]
    rows = b.shape[1]
    match = torch.full((batch, tokens), rows, dtype=torch.int32, device=a.device)
    similarity = torch.full((batch, tokens), -torch.inf, device=a.device)
    for n in range(batch):
        left, chooses = unit_rows(a[n])
        right, valid = unit_rows(b[n])
        index = torch.arange(rows, device=a.device)
        valid &= index < int(lengths[n])
        if not valid.any():
            continue
        cosine = (left @ right.T).masked_fill(~(chooses[:, None] & valid), -torch.inf)  # [S, R]
        best = cosine.amax(1)
        tied = (cosine == best[:, None]) & (cosine > -torch.inf)
        similarity[n] = best
        match[n] = torch.where(tied, index, rows).amin(1)
    return match, similarity


OP = bipartite_match


@OP.body("dynamic")
@OP.body("static")
def _body() -> Any:
    from plugins.bipartite_match.body import BipartiteMatch

    return BipartiteMatch


@OP.cases
def _cases() -> Sequence[Case]:
    from plugins.bipartite_match.cases import CASES

    return CASES


@OP.steps
def _steps() -> Sequence[Step]:
    from plugins.bipartite_match.steps import MATCH_ROWS, ROW_DIRECTIONS

    return [
        Step(ROW_DIRECTIONS, ("b", "lengths"), ("inverse",)),
        Step(MATCH_ROWS, ("a", "b", "inverse", "lengths"), ("match", "similarity")),
    ]

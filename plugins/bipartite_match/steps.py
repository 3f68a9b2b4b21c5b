"""BipartiteMatch in two launches: the norms of the rows of b, which every row of a needs, then the matches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from trtpass.kernel import Kernel
from trtpass.op import FLOAT32, FLOATS, INT32, Port, Tolerance, op

if TYPE_CHECKING:
    from torch import Tensor


@op(
    name="RowDirections",
    source="ToMe, arXiv 2210.09461, section 3 (cosine similarity)",
    shape=lambda d, a: {"inverse": (d.B, d.R)},
    tolerance=Tolerance(
        atol={"float32": 0.0, "float16": 0.0},
        rtol={"float32": 1e-5, "float16": 1e-5},
        reason="a float32 sum of up to a few thousand positive terms in any order, its root and its inverse",
    ),
)
def row_directions(
    x: Annotated[Tensor, Port("B R E", FLOATS)],
    lengths: Annotated[Tensor, Port("B", INT32)],
) -> Annotated[Tensor, Port("B R", FLOAT32, name="inverse")]:
    """``inverse[n, j] = 1 / norm(x[n, j])`` in float32; 0 where there is no direction.

    Args:
        x: rows `[B, R, E]`.
        lengths: valid rows `[B]`; later ones may hold anything.

    Returns:
        inverse float32 `[B, R]`: 0 for padding, and for rows whose sum of squares is not a finite normal float32.
    """
    from plugins._cosine import inverse_norms

    return inverse_norms(x, lengths)


@op(
    name="MatchRows",
    source="ToMe, arXiv 2210.09461, section 3 (an edge from each token to its most similar)",
    shape=lambda d, a: {"match": (d.B, d.S), "similarity": (d.B, d.S)},
    tolerance=Tolerance(
        atol={"float32": 2e-6, "float16": 2e-6},
        rtol={"float32": 0.0, "float16": 0.0},
        reason="that of BipartiteMatch: float32 throughout, whatever the input",
    ),
)
def match_rows(
    a: Annotated[Tensor, Port("B S E", FLOATS)],
    b: Annotated[Tensor, Port("B R E", FLOATS)],
    inverse: Annotated[Tensor, Port("B R", FLOAT32)],
    lengths: Annotated[Tensor, Port("B", INT32)],
) -> tuple[
    Annotated[Tensor, Port("B S", INT32, name="match")],
    Annotated[Tensor, Port("B S", FLOAT32, name="similarity")],
]:
    """BipartiteMatch for rows of b whose norms are known.

    Args:
        a: rows that choose `[B, S, E]`.
        b: rows to choose from `[B, R, E]`.
        inverse: what RowDirections makes of b `[B, R]`; a row is chosen only where it is above 0.
        lengths: valid rows of b `[B]`.

    Returns:
        match int32 `[B, S]` and similarity float32 `[B, S]`, as BipartiteMatch.
    """
    from plugins.bipartite_match import OP

    return OP(a, b.masked_fill(inverse[..., None] == 0, 0.0), lengths)


ROW_DIRECTIONS = row_directions
MATCH_ROWS = match_rows


@ROW_DIRECTIONS.kernels
def _direction_kernels() -> Sequence[Kernel]:
    from plugins._triton_cosine import directions

    return [directions("R")]


@MATCH_ROWS.kernels
def _match_kernels() -> Sequence[Kernel]:
    from plugins.bipartite_match.kernel import MATCH

    return [MATCH]

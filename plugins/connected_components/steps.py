"""ConnectedComponents in launches: the graph as bits, rounds in which trees of tokens join, then names.

Every token points at a root, at first at its lowest neighbour. In a round all rows of the graph look for other trees
(``LowestRoots``, on the whole GPU), and every tree joins the lowest that a member found (``JoinTrees``, one program for
each batch row). Rows whose neighbours are all in their own tree stay so, and are read no more. ``ROUNDS`` rounds settle
most graphs (similar tokens of a video: trees shrink 3 to 30 times in each); ``ComponentLabels`` goes on where they do
not, in a loop of its own, so that the result never depends on their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from plugins.connected_components.rounds import COMPONENT_LABELS, EXACT, JOIN_TREES, LOWEST_ROOTS, SOURCE, adjacency
from trtpass.errors import InputError
from trtpass.kernel import Kernel
from trtpass.op import FLOAT32, FLOATS, INT32, Port, Step, Tolerance, op

if TYPE_CHECKING:
    from torch import Tensor

ROUNDS = 3


@op(
    name="TokenDirections",
    source=SOURCE,
    shape=lambda d, a: {"inverse": (d.B, d.S)},
    tolerance=Tolerance(
        atol={"float32": 0.0, "float16": 0.0},
        rtol={"float32": 1e-5, "float16": 1e-5},
        reason="a float32 sum of up to a few thousand positive terms in any order, its root and its inverse",
    ),
)
def token_directions(
    x: Annotated[Tensor, Port("B S E", FLOATS)],
    lengths: Annotated[Tensor, Port("B", INT32)],
) -> Annotated[Tensor, Port("B S", FLOAT32, name="inverse")]:
    """``inverse[b, i] = 1 / norm(x[b, i])`` in float32; 0 where there is no direction.

    Args:
        x: tokens `[B, S, E]`.
        lengths: valid tokens of each row `[B]`; later ones may hold anything.

    Returns:
        inverse float32 `[B, S]`: 0 for padding, and for tokens whose sum of squares is not a finite normal float32.
    """
    from plugins._cosine import inverse_norms

    return inverse_norms(x, lengths)


@op(name="SimilarPairs", source=SOURCE, shape=lambda d, a: {"pairs": (d.B, d.S, (d.S + 31) // 32)}, tolerance=EXACT)
def similar_pairs(
    x: Annotated[Tensor, Port("B S E", FLOATS)],
    inverse: Annotated[Tensor, Port("B S", FLOAT32)],
    *,
    tau: float = 0.9,
) -> Annotated[Tensor, Port("B S W", INT32, name="pairs")]:
    """Bit ``j % 32`` of ``pairs[b, i, j // 32]`` is set where ``cos(x_i, x_j) > tau`` and i is not j.

    Args:
        x: tokens `[B, S, E]`.
        inverse: what TokenDirections makes of them `[B, S]`; a token is similar to others only where it is above 0.
        tau: threshold, exclusive.

    Returns:
        pairs int32 `[B, S, W]`, W = ceil(S / 32): symmetric, as the product for i < j decides for both; bits from S on
        are 0.

    Raises:
        InputError: ``tau`` is NaN.
    """
    import torch

    if tau != tau:
        raise InputError("SimilarPairs.tau is NaN", "a number")
    batch, tokens = inverse.shape
    directed = inverse > 0
    unit = x.float().masked_fill(~directed[..., None], 0.0) * inverse[..., None]
    words = (tokens + 31) // 32
    bits = torch.zeros(batch, tokens, words * 32, dtype=torch.int64, device=x.device)
    for b in range(batch):
        above = ((unit[b] @ unit[b].T > tau) & directed[b, :, None] & directed[b]).triu(1)
        bits[b, :, :tokens] = above | above.T
    weight = 1 << torch.arange(32, device=x.device)
    return (bits.view(batch, tokens, words, 32) * weight).sum(-1).to(torch.int32)


@op(
    name="Neighbours",
    source=SOURCE,
    shape=lambda d, a: {"lowest": (d.B, d.S), "degree": (d.B, d.S)},
    tolerance=EXACT,
)
def neighbours(
    pairs: Annotated[Tensor, Port("B S W", INT32)],
) -> tuple[
    Annotated[Tensor, Port("B S", INT32, name="lowest")],
    Annotated[Tensor, Port("B S", INT32, name="degree")],
]:
    """The lowest neighbour of each token, and how many it has.

    Args:
        pairs: what SimilarPairs makes `[B, S, W]`.

    Returns:
        lowest int32 `[B, S]`: the lowest index among a token and its neighbours; degree int32 `[B, S]`.
    """
    import torch

    lowest, degree = (torch.zeros(pairs.shape[:2], dtype=torch.int32, device=pairs.device) for _ in range(2))
    for b in range(pairs.shape[0]):
        similar = adjacency(pairs[b])
        degree[b] = similar.sum(1)
        index = torch.arange(similar.shape[0], dtype=torch.int32, device=pairs.device)
        near = torch.where(similar, index, index[:, None])
        lowest[b] = torch.minimum(near.amin(1), index) if len(index) else index
    return lowest, degree


TOKEN_DIRECTIONS, SIMILAR_PAIRS, NEIGHBOURS = token_directions, similar_pairs, neighbours


def steps() -> Sequence[Step]:
    """Every launch, in order."""
    made = [
        Step(TOKEN_DIRECTIONS, ("x", "lengths"), ("inverse",)),
        Step(SIMILAR_PAIRS, ("x", "inverse"), ("pairs",)),
        Step(NEIGHBOURS, ("pairs",), ("lowest_0", "degree")),
        Step(JOIN_TREES, ("lowest_0", "lowest_0"), ("root_1",)),
    ]
    for r in range(1, ROUNDS):
        seen = "degree" if r == 1 else f"border_{r - 1}"  # a token without neighbours has none in another tree
        made += [
            Step(LOWEST_ROOTS, ("pairs", f"root_{r}", seen), (f"lowest_{r}", f"border_{r}")),
            Step(JOIN_TREES, (f"root_{r}", f"lowest_{r}"), (f"root_{r + 1}",)),
        ]
    last = f"root_{ROUNDS}", f"lowest_{ROUNDS}", f"border_{ROUNDS}"
    return [
        *made,
        Step(LOWEST_ROOTS, ("pairs", last[0], f"border_{ROUNDS - 1}"), last[1:]),
        Step(COMPONENT_LABELS, ("pairs", *last, "degree", "lengths"), ("label", "components", "lowest_member", "head")),
    ]


@TOKEN_DIRECTIONS.kernels
def _direction_kernels() -> Sequence[Kernel]:
    from plugins._triton_cosine import directions

    return [directions("S")]


@SIMILAR_PAIRS.kernels
def _pair_kernels() -> Sequence[Kernel]:
    from plugins.connected_components.kernel import PAIRS

    return [PAIRS]


@NEIGHBOURS.kernels
def _neighbour_kernels() -> Sequence[Kernel]:
    from plugins.connected_components.trees import NEIGHBOURS as kernel

    return [kernel]

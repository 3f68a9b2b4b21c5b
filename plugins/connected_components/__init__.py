"""ConnectedComponents: groups of tokens that are linked by similar neighbours, however long the chain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from trtpass.errors import InputError
from trtpass.op import FLOATS, INT32, Case, Port, Step, Tolerance, op

if TYPE_CHECKING:
    from torch import Tensor


@op(
    name="ConnectedComponents",
    source="Semantic connected components: LLaVA-Scissor, arXiv 2506.21862, section 3 (here always exact, no sampling)",
    shape=lambda d, a: {"label": (d.B, d.S), "components": (d.B,)},
    tolerance=Tolerance(atol={}, rtol={}, reason="integers: exact wherever no cosine is within rounding of tau"),
)
def connected_components(
    x: Annotated[Tensor, Port("B S E", FLOATS)],
    lengths: Annotated[Tensor, Port("B", INT32)],
    *,
    tau: float = 0.9,
) -> tuple[
    Annotated[Tensor, Port("B S", INT32, name="label")],
    Annotated[Tensor, Port("B", INT32, name="components")],
]:
    """Connected components of the graph on each row's tokens whose edges are the pairs with ``cos(x_i, x_j) > tau``.

    Cosines are float32, whatever the input. A token without a direction is similar to nothing, not even for tau < -1:
    a zero vector, or one whose sum of squares is not a finite normal float32 (NaN or infinity in it, a norm below about
    1e-19 or above 1.8e19). It is a component of its own.

    Components are numbered 0, 1, ... by ascending index of their head: the member of the highest degree (number of
    other tokens similar to it), of equal degrees the one with the lowest index.

    Args:
        x: tokens `[B, S, E]`, right-padded; padding may hold anything.
        lengths: valid tokens L of each row `[B]`, clipped to [0, S].
        tau: threshold, exclusive. Above 1 every token is its own component; below -1 all with a direction are one.

    Returns:
        label int32 `[B, S]`: number of the token's component, S for padding (positions from L on); components int32
        `[B]`: how many there are, 0 for an empty row.

    Raises:
        InputError: ``tau`` is NaN.
    """
    import torch

    from plugins._cosine import unit_rows

    if tau != tau:
        raise InputError("ConnectedComponents.tau is NaN", "a number")
    batch, tokens = x.shape[:2]
    label = torch.full((batch, tokens), tokens, dtype=torch.int32, device=x.device)
    components = torch.zeros(batch, dtype=torch.int32, device=x.device)
    for b in range(batch):
        length = min(max(int(lengths[b]), 0), tokens)
        unit, directed = unit_rows(x[b, :length])
        pairs = directed[:, None] & directed[None, :]
        above = ((unit @ unit.T > tau) & pairs).triu(1)  # a product may round differently below the diagonal
        similar = above | above.T  # [L, L]
        degree = similar.sum(1).tolist()
        groups: list[tuple[int, Tensor]] = []  # head and members
        seen = torch.zeros(length, dtype=torch.bool, device=x.device)
        for start in range(length):
            if seen[start]:
                continue
            members = torch.zeros_like(seen)
            members[start] = True
            frontier = members
            while frontier.any():
                frontier = similar[frontier].any(0) & ~members
                members = members | frontier
            seen |= members
            head = max(members.nonzero()[:, 0].tolist(), key=lambda i: (degree[i], -i))
            groups.append((head, members))
        components[b] = len(groups)
        for number, (_, members) in enumerate(sorted(groups, key=lambda group: group[0])):
            label[b, :length][members] = number
    return label, components


OP = connected_components


@OP.body("dynamic")
@OP.body("static")
def _body() -> Any:
    from plugins.connected_components.body import ConnectedComponents

    return ConnectedComponents


@OP.cases
def _cases() -> Sequence[Case]:
    from plugins.connected_components.cases import CASES

    return CASES


@OP.steps
def _steps() -> Sequence[Step]:
    from plugins.connected_components.steps import steps

    return steps()

"""The steps of ConnectedComponents that join trees of tokens, and name what they have become."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from trtpass.kernel import Kernel
from trtpass.op import INT32, Port, Tolerance, op

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = "Semantic connected components: LLaVA-Scissor, arXiv 2506.21862, section 3"
EXACT = Tolerance(atol={}, rtol={}, reason="integers: exact wherever no cosine is within rounding of tau")


def adjacency(pairs: Tensor) -> Tensor:
    """Words of bits `[S, W]` as bool `[S, S]`."""
    import torch

    bits = (pairs[..., None] >> torch.arange(32, device=pairs.device)) & 1
    return bits.flatten(-2)[:, : pairs.shape[0]].bool()


def roots_of(parent: Tensor) -> Tensor:
    """Where the pointers `[S]` of each token end; none points above itself."""
    while not (parent[parent] == parent).all():
        parent = parent[parent]
    return parent


@op(name="JoinTrees", source=SOURCE, shape=lambda d, a: {"joined": (d.B, d.S)}, tolerance=EXACT)
def join_trees(
    root: Annotated[Tensor, Port("B S", INT32)],
    lowest: Annotated[Tensor, Port("B S", INT32)],
) -> Annotated[Tensor, Port("B S", INT32, name="joined")]:
    """Every tree joins the tree of the lowest token that one of its members found; ``joined`` are the new roots.

    A tree is the tokens of one root. The lowest ``lowest`` of its members becomes what the root points at, and pointers
    are followed to their ends.

    Args:
        root: what each token points at `[B, S]`, at most its own index.
        lowest: what each token found `[B, S]`, at most ``root``.

    Returns:
        joined int32 `[B, S]`: where pointers end.
    """
    import torch

    joined = torch.empty_like(root)
    for b in range(root.shape[0]):
        parent = root[b].long().scatter_reduce(0, root[b].long(), lowest[b].long(), "amin")
        joined[b] = roots_of(parent)[root[b].long()]
    return joined


@op(
    name="LowestRoots",
    source=SOURCE,
    shape=lambda d, a: {"lowest": (d.B, d.S), "border": (d.B, d.S)},
    tolerance=EXACT,
)
def lowest_roots(
    pairs: Annotated[Tensor, Port("B S W", INT32)],
    root: Annotated[Tensor, Port("B S", INT32)],
    unsettled: Annotated[Tensor, Port("B S", INT32)],
) -> tuple[
    Annotated[Tensor, Port("B S", INT32, name="lowest")],
    Annotated[Tensor, Port("B S", INT32, name="border")],
]:
    """The lowest root among each token's and its neighbours', and whether they have several.

    Args:
        pairs: what SimilarPairs makes `[B, S, W]`.
        root: the root of each token's tree `[B, S]`.
        unsettled: 0 for tokens whose neighbours are known to be in their own tree `[B, S]`; those are not looked at.

    Returns:
        lowest int32 `[B, S]`; border int32 `[B, S]`: 1 where a neighbour has another root, else 0.
    """
    import torch

    lowest, border = root.clone(), torch.zeros_like(root)
    for b in range(root.shape[0]):
        similar = adjacency(pairs[b]) & (unsettled[b] != 0)[:, None]
        near = torch.where(similar, root[b], root[b, :, None])  # [S, S]
        if near.numel():
            lowest[b] = torch.minimum(near.amin(1), root[b])
            border[b] = (near != root[b, :, None]).any(1).int()
    return lowest, border


@op(
    name="ComponentLabels",
    source=SOURCE,
    shape=lambda d, a: {
        "label": (d.B, d.S),
        "components": (d.B,),
        "tree": (d.B, d.S),
        "head": (d.B, d.S),
    },
    tolerance=EXACT,
)
def component_labels(
    pairs: Annotated[Tensor, Port("B S W", INT32)],
    root: Annotated[Tensor, Port("B S", INT32)],
    lowest: Annotated[Tensor, Port("B S", INT32)],
    border: Annotated[Tensor, Port("B S", INT32)],
    degree: Annotated[Tensor, Port("B S", INT32)],
    lengths: Annotated[Tensor, Port("B", INT32)],
) -> tuple[
    Annotated[Tensor, Port("B S", INT32, name="label")],
    Annotated[Tensor, Port("B", INT32, name="components")],
    Annotated[Tensor, Port("B S", INT32, name="tree")],
    Annotated[Tensor, Port("B S", INT32, name="head")],
]:
    """Components of the graph and their numbers, from trees that may have more joining to do.

    Args:
        pairs: what SimilarPairs makes `[B, S, W]`.
        root: the root of each token's tree `[B, S]`.
        lowest: what LowestRoots makes of it `[B, S]`.
        border: 0 for tokens whose neighbours are all in their own tree `[B, S]`.
        degree: neighbours of each token `[B, S]`.
        lengths: valid tokens of each row `[B]`, clipped to [0, S].

    Returns:
        label int32 `[B, S]` and components int32 `[B]`, as ConnectedComponents; tree int32 `[B, S]`: the lowest member
        of each token's component, itself for padding; head int32 `[B, S]`: its member of the highest degree, of equals
        the lowest.
    """
    import torch

    batch, tokens = root.shape
    label = torch.full_like(root, tokens)
    components = torch.zeros(batch, dtype=torch.int32, device=root.device)
    tree, head = torch.empty_like(root), torch.empty_like(root)
    for b in range(batch):
        similar = adjacency(pairs[b])
        index = torch.arange(tokens, device=root.device)
        lowest_of = index
        while tokens:
            near = torch.where(similar, lowest_of, lowest_of[:, None]).amin(1)
            joined = roots_of(lowest_of.scatter_reduce(0, lowest_of, near, "amin"))[lowest_of]
            if (joined == lowest_of).all():
                break
            lowest_of = joined
        rank = degree[b].long() * (tokens + 1) + tokens - index
        best = rank.new_full((tokens,), -1).scatter_reduce(0, lowest_of, rank, "amax")[lowest_of]
        head_of = tokens - best % (tokens + 1)
        length = min(max(int(lengths[b]), 0), tokens)
        is_head = (head_of == index) & (index < length)
        number = is_head.cumsum(0) - 1
        label[b, :length] = number[head_of[:length]].int()
        components[b] = is_head.sum()
        tree[b], head[b] = lowest_of, head_of
    return label, components, tree, head


JOIN_TREES, LOWEST_ROOTS, COMPONENT_LABELS = join_trees, lowest_roots, component_labels


@JOIN_TREES.kernels
def _join_kernels() -> Sequence[Kernel]:
    from plugins.connected_components.trees import JOIN

    return [JOIN]


@LOWEST_ROOTS.kernels
def _root_kernels() -> Sequence[Kernel]:
    from plugins.connected_components.trees import LOWEST

    return [LOWEST]


@COMPONENT_LABELS.kernels
def _label_kernels() -> Sequence[Kernel]:
    from plugins.connected_components.labels import LABELS

    return [LABELS]

"""Baselines of ``scc.components``: what one would write without our operators, no loop over frames or tokens.

NumPy's result is also what ours and PyTorch's are checked against.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trtpass.bench.measure import Array, require_close
from trtpass.errors import CheckFailed

if TYPE_CHECKING:
    from torch import Tensor

BASELINES = {
    "numpy": "NumPy (batched products, segment sums as sparse products) and scipy.sparse.csgraph.connected_components",
    "torch": "PyTorch (batched products, index_add) and scipy.sparse.csgraph.connected_components",
}
TAU = 0.9
ATOL, RTOL = 1e-4, 1e-4  # means of float32 values of size 1 to 10


@dataclass
class Merged:
    """What both sides make.

    Attributes:
        label: of each token, over all frames, ``[F n]``.
        counts: components after each step.
        match: with two steps, the final row that each token joins ``[F n]``.
        merged: means of the first step `[K, E]`, or the rows after the join.
        size: tokens in each, float.
    """

    label: Array
    counts: list[int]
    match: Array | None
    merged: Array
    size: Array


def require_same(made: Merged, right: Merged) -> None:
    """The two baselines, which have no padding: integers exactly, rows within rounding."""
    for name in ("label", "counts", "match", "size"):
        got, expected = getattr(made, name), getattr(right, name)
        if not np.array_equal(got, expected):
            raise CheckFailed(f"scc.components: PyTorch's {name} is not NumPy's", "one result of both baselines")
    require_close("scc.components, rows of PyTorch", made.merged, right.merged.astype(np.float64), ATOL, RTOL)


def in_numpy(x: Array, steps: int) -> Merged:
    """Tokens `[F, n, E]`, one step or two, in NumPy and scipy."""
    flat = x.reshape(-1, x.shape[-1])
    unit = _unit(flat)
    label = _components(unit.reshape(x.shape))
    member = _members(label)
    size = np.diff(member.indptr)
    mean = (member @ flat) / size[:, None].astype(np.float32)
    if steps == 1:
        return Merged(label, [len(mean)], None, mean, size)
    group = _members(_components(_unit(mean)[None]))
    base = (group @ mean) / np.diff(group.indptr)[:, None].astype(np.float32)
    match = np.argmax(unit @ _unit(base).T, axis=1)
    joined = _members(match, len(base))
    size = np.diff(joined.indptr) + 1
    return Merged(label, [len(mean), len(base)], match, (base + joined @ flat) / size[:, None].astype(np.float32), size)


def _unit(x: Array) -> Array:
    return x / np.sqrt(np.einsum("te,te->t", x, x))[:, None]


def _components(unit: Array) -> Array:
    """Components of each group of `[G, n, E]`, numbered over all groups by the index of their head, ``[G n]``."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    groups, tokens, _ = unit.shape
    near = np.matmul(unit, unit.transpose(0, 2, 1)) > TAU
    near.reshape(groups, -1)[:, :: tokens + 1] = False
    degree = np.count_nonzero(near, axis=2).ravel()
    edge = np.flatnonzero(near)
    column = edge // (tokens * tokens) * tokens + edge % tokens
    starts = np.concatenate([[0], np.cumsum(degree)])
    graph = csr_array((np.ones(len(edge), np.int8), column, starts), shape=(len(degree), len(degree)))
    _, found = connected_components(graph, directed=False)
    order = np.lexsort((np.arange(len(degree)), -degree, found))
    head = order[np.unique(found[order], return_index=True)[1]]
    number = np.empty(len(head), np.int64)
    number[np.argsort(head)] = np.arange(len(head))
    return number[found]


def _members(label: Array, rows: int = 0) -> Any:
    """A sparse matrix of ones `[segments, tokens]`: times tokens it sums each segment."""
    from scipy.sparse import csr_array

    counts = np.bincount(label, minlength=rows)
    starts = np.concatenate([[0], np.cumsum(counts)])
    order = np.argsort(label, kind="stable")
    return csr_array((np.ones(len(label), np.float32), order, starts), shape=(len(counts), len(label)))


def in_torch(x: Array, steps: int) -> Merged:
    """The same in PyTorch and scipy, on as many threads as torch has."""
    import torch

    with torch.inference_mode():
        flat = torch.from_numpy(x).flatten(0, 1)
        unit = flat / flat.norm(dim=1, keepdim=True)
        label = _torch_components(unit.view(x.shape))
        mean, size = _sums(flat, label)
        mean /= size[:, None]
        if steps == 1:
            return Merged(label.numpy(), [len(mean)], None, mean.numpy(), size.numpy())
        group = _torch_components((mean / mean.norm(dim=1, keepdim=True))[None])
        base, members = _sums(mean, group)
        base /= members[:, None]
        match = (unit @ (base / base.norm(dim=1, keepdim=True)).T).argmax(1)
        size = torch.bincount(match, minlength=len(base)) + 1
        merged = base.index_add(0, match, flat).div_(size[:, None])
        counts = [len(mean), len(base)]
        return Merged(label.numpy(), counts, match.numpy(), merged.numpy(), size.numpy())


def _torch_components(unit: Tensor) -> Tensor:
    """Components of each group of unit vectors `[G, n, E]`, numbered over all groups by the index of their head."""
    import torch
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    groups, tokens, _ = unit.shape
    near = torch.bmm(unit, unit.transpose(1, 2)) > TAU
    near.diagonal(dim1=1, dim2=2).fill_(False)
    degree = near.sum(2, dtype=torch.int32).flatten()
    group, _, other = near.nonzero(as_tuple=True)
    column = (other + group * tokens).int().numpy()
    starts = np.concatenate([[0], degree.cumsum(0).numpy()])
    graph: Any = csr_array((np.ones(len(column), np.int8), column, starts), shape=(groups * tokens,) * 2)
    count, found = connected_components(graph, directed=False)
    part = torch.from_numpy(found).long()
    # The head has the most neighbours and, of equals, the lowest index: one integer.
    index = torch.arange(groups * tokens)
    rank = degree.long() * (groups * tokens) + (groups * tokens - 1 - index)
    best = torch.zeros(count, dtype=torch.long).scatter_reduce_(0, part, rank, "amax")
    is_head = rank == best[part]
    number = torch.empty(count, dtype=torch.long)
    number[part[is_head]] = torch.arange(count)
    return number[part]


def _sums(x: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the tokens of each label `[K, E]`, and how many they are `[K]`."""
    import torch

    size = torch.bincount(label)
    return torch.zeros(len(size), x.shape[1]).index_add_(0, label, x), size

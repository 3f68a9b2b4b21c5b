"""Cases of ConnectedComponents: built so that no cosine is near tau, since a flipped edge changes everything.

tests/test_merging_operators.py measures the distance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from plugins._cases import Array, int32
from trtpass.op import Case

Tokens = Callable[[np.random.Generator, int, int], Array]  # (rng, S, E) -> [S, E] float64


def rotation(rng: np.random.Generator, width: int) -> Array:
    """A random orthogonal matrix `[E, E]`."""
    return np.linalg.qr(rng.standard_normal((width, width)))[0]


def arcs(rng: np.random.Generator, tokens: int, width: int) -> Array:
    """Tokens on circles in E // 2 orthogonal planes, at every tenth degree or not at all; E = 1: on a line.

    At tau = 0.9 (25.8 degrees) neighbours to 20 degrees are similar, so that arcs of all sizes are components.
    """
    scale = np.exp(rng.standard_normal((tokens, 1)) / 2)
    if width == 1:
        return scale * rng.choice([-1.0, 1.0], (tokens, 1))
    planes = width // 2
    plane, step = np.nonzero(rng.random((planes, 36)) < 0.35)  # the places that tokens may take
    chosen = rng.integers(len(plane), size=tokens)
    angle = np.deg2rad(10.0 * step[chosen])
    x = np.zeros((tokens, width))
    x[np.arange(tokens), 2 * plane[chosen]] = np.cos(angle)
    x[np.arange(tokens), 2 * plane[chosen] + 1] = np.sin(angle)
    return scale * (x @ rotation(rng, width))


def chain(order: Callable[[np.random.Generator, int], Array]) -> Tokens:
    """Token k of the chain is the sum of axes k and k + 1: a cosine of 0.5 to the next, of 0 to others. E = S + 1."""

    def make(rng: np.random.Generator, tokens: int, width: int) -> Array:
        x = np.zeros((tokens, width))
        place = order(rng, tokens)
        x[place, np.arange(tokens)] = x[place, np.arange(tokens) + 1] = 1.0
        return x

    return make


def sparse_graph(rng: np.random.Generator, tokens: int, width: int) -> Array:
    """A random graph of degree 4 at most: an axis for each edge and one for each token, cosine 1/4 along an edge."""
    x = np.zeros((tokens, width))
    degree = np.zeros(tokens, dtype=int)
    pairs = {tuple(sorted(pair)) for pair in rng.integers(tokens, size=(width - tokens, 2)).tolist()}
    for axis, (i, j) in enumerate(sorted(pairs)):
        if i != j and degree[i] < 4 and degree[j] < 4:
            x[[i, j], axis] = 1.0
            degree[[i, j]] += 1
    x[np.arange(tokens), width - tokens + np.arange(tokens)] = np.sqrt(4 - degree)
    return x * np.exp(rng.standard_normal((tokens, 1)) / 2)


def without_direction(*values: float) -> Tokens:
    """Arcs with a third of the tokens replaced: wholly zero, or with one of ``values`` in them."""

    def make(rng: np.random.Generator, tokens: int, width: int) -> Array:
        x = arcs(rng, tokens, width)
        for row in rng.permutation(tokens)[: tokens // 3]:
            value = rng.choice([0.0, *values])
            if value == 0 or abs(value) < 1e-19:
                x[row] = value
            else:
                x[row, rng.integers(width)] = value
        return x

    return make


def _case(
    name: str,
    lengths: Sequence[int],
    width: int,
    tokens: Tokens = arcs,
    size: int | None = None,
    dtype: str = "float32",
    slow: bool = False,
    **attrs: Any,
) -> Case:
    padded = size or max(lengths)

    def make(seed: int) -> Sequence[Any]:
        rng = np.random.default_rng(seed)
        x = np.full((len(lengths), padded, width), np.nan)  # padding may hold anything
        for row, length in zip(x, lengths, strict=True):
            row[:length] = tokens(rng, length, width)
        return x.astype(dtype), int32(lengths)

    return Case(name, make, attrs, slow)


def _shuffled(rng: np.random.Generator, tokens: int) -> Array:
    return rng.permutation(tokens)


def _ascending(rng: np.random.Generator, tokens: int) -> Array:
    return np.arange(tokens)


def _lowest_beside_highest(rng: np.random.Generator, tokens: int) -> Array:
    """0, S - 1, S - 2, ... 1: the lowest index is last to arrive where labels only creep from token to token."""
    return np.concatenate([[0], np.arange(tokens - 1, 0, -1)])


CASES = [
    *(_case(f"{n}-tokens", [n], e) for n, e in ((1, 7), (63, 33), (127, 7), (128, 33), (129, 64))),
    _case("1000-tokens", [1000], 64, without_direction(np.nan, np.inf, 1e30, 1e-22), slow=True),
    _case("one-wide", [65], 1),
    _case("ragged-batch", [50, 0, 31], 33),
    _case("padding-only-tail", [20, 40], 7, size=64),
    _case("full-and-empty", [129, 0], 33),
    *(_case(f"float16-{e}-wide", [65, 20, 1], e, dtype="float16") for e in (1, 7, 33)),
    _case("chain-of-600", [600], 601, chain(_shuffled), tau=0.4, slow=True),  # more rounds than the steps have
    _case("chain-of-200", [200], 201, chain(_shuffled), tau=0.4),
    _case("float16-blocks", [300, 200], 64, dtype="float16"),
    _case("chain-of-200-ascending", [200], 201, chain(_ascending), tau=0.4),
    _case("float16-even-blocks", [200, 256], 64, dtype="float16"),
    _case("chain-of-200-far-root", [200], 201, chain(_lowest_beside_highest), tau=0.4),
    _case("chain-of-63", [63], 64, chain(_shuffled), tau=0.4, dtype="float16"),
    *(_case(f"sparse-graph-{n}", [n, n], n + edges, sparse_graph, tau=0.125) for n, edges in ((50, 40), (63, 90))),
    _case("all-linked", [40], 7, tau=-0.3),
    _case("above-1", [40, 63], 7, without_direction(np.nan), tau=2.0),
    _case("below-minus-1", [40, 63], 7, without_direction(np.nan), tau=-2.0),
    _case("without-direction", [128, 70, 5], 33, without_direction(np.nan, np.inf, -np.inf, 1e-22)),
    _case("without-direction-float16", [128, 70, 5], 33, without_direction(np.nan, np.inf, -np.inf), dtype="float16"),
    _case("nothing-but-zeros", [30], 7, lambda rng, tokens, width: np.zeros((tokens, width))),
    _case("no-tokens", [0, 0, 0], 7, size=63),
]

"""Cases of FicocoFilter: grids and none, protected tokens, ties that are exact in any order, values not finite.

Two tokens of a window differ by more than rounding, or have equal sums of exact terms and equal cues.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from plugins._cases import Array, int32
from trtpass.op import Case

Values = Callable[[np.random.Generator, int, int], tuple[Array, Array]]


def attention(rng: np.random.Generator, batch: int, tokens: int) -> tuple[Array, Array]:
    """Softmax rows `[B, S, S]`, and one more of each as the cue `[B, S]`."""
    weight = np.exp(rng.standard_normal((batch, tokens + 1, tokens)) * 2)
    prob = weight / weight.sum(-1, keepdims=True)
    return prob[:, 1:], prob[:, 0]


def ties(rng: np.random.Generator, batch: int, tokens: int) -> tuple[Array, Array]:
    """Columns of a few kinds, in multiples of 1/1024; one cue for all."""
    kind = rng.integers(0, 3, (batch, 1, tokens))
    return np.broadcast_to((kind + 1) / 1024, (batch, tokens, tokens)).copy(), np.full((batch, tokens), 0.001)


def _not_finite(rng: np.random.Generator, batch: int, tokens: int) -> tuple[Array, Array]:
    prob, cue = attention(rng, batch, tokens)
    cue[rng.random(cue.shape) < 0.2] = np.nan
    cue[rng.random(cue.shape) < 0.2] = np.inf
    return prob, cue


def _nothing(rng: np.random.Generator, batch: int, tokens: int) -> tuple[Array, Array]:
    return np.zeros((batch, tokens, tokens)), np.full((batch, tokens), np.nan)


def grid(rng: np.random.Generator, batch: int, tokens: int, share: float = 0.7) -> Array:
    """Distinct ascending places `[B, S]` that fill a share of a grid; the first token of each row has none."""
    most = int(tokens / share) + 1
    place = np.stack([np.sort(rng.permutation(most)[:tokens]) for _ in range(batch)])
    place[:, :1] = -1
    return place.astype(np.int32)


def _case(
    name: str,
    lengths: Sequence[int],
    values: Values = attention,
    tokens: int | None = None,
    protect: float = 0.1,
    share: float = 0.7,
    places: Callable[[Array], Array] = lambda place: place,
    **attrs: int,
) -> Case:
    """Tokens are protected with a probability of ``protect``; padded rows and columns of prob are zero."""

    def make(seed: int) -> Sequence[Any]:
        rng = np.random.default_rng(seed)
        batch, most = len(lengths), tokens or max(lengths)
        prob, cue = values(rng, batch, most)
        for row, length in zip(prob, lengths, strict=True):
            row[length:] = row[:, length:] = 0.0
        protected = np.where(rng.random((batch, most)) < protect, rng.choice([1, -1, 7], (batch, most)), 0)
        place = places(grid(rng, batch, most, share))
        inputs = [x.astype(np.float32) for x in (prob, cue)]
        return *inputs, place, protected.astype(np.int32), int32(lengths)

    return Case(name, make, attrs)


def _far(place: Array) -> Array:
    """Negative places, and one pair far away: as far as a body has the memory for."""
    place[:, ::5] = [-(2**31)]
    place[:, -2:] = 10**6
    return place


CASES = [
    *(_case(f"{n}-tokens", [n], width=7) for n in (1, 2, 63, 127, 128, 129)),
    _case("1000-tokens", [1000], width=37, protect=0.0),
    _case("no-grid", [129], weight_permille=600),
    _case("cue-alone", [65], width=8, weight_permille=0),
    _case("attention-alone", [65], width=8, weight_permille=1000),
    _case("ragged", [100, 60, 1], width=10, tokens=110),
    _case("empty-row", [0, 40, 7], width=10),
    *(_case(f"windows-of-{n}", [100], width=10, window=n, coefficient_permille=3000) for n in (1, 3, 50)),
    _case("one-column", [60], width=1, share=0.5),
    _case("wide", [60], width=1000, window=4),
    _case("halved", [100, 90], width=10, coefficient_permille=500),
    _case("ties", [128, 100, 31], ties, width=10, window=4),
    _case("ties-attention-alone", [128], ties, width=10, window=3, weight_permille=1000),
    _case("all-protected", [40, 30], width=8, protect=1.0),
    _case("not-finite", [100, 80], _not_finite, width=10, window=3),
    _case("nothing-but-nan", [30], _nothing, width=5),
    _case("far", [60, 50], width=10, places=_far),
]

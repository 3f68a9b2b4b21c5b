"""Cases of FicocoCorrelate: one, two and many targets, rows that keep fewer, ties, sums of 0, nothing dropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from plugins._cases import Array
from plugins.track_tokens.cases import stream
from trtpass.op import Case

Values = Callable[[np.random.Generator, tuple[int, ...]], Array]


def kept_tokens(slot: Array, capacity: int) -> Array:
    """index `[B, C]`, padded with S, of the tokens that have a slot `[B, S]`."""
    index = np.full((len(slot), capacity), slot.shape[1], np.int32)
    for b, s in np.argwhere(slot >= 0):
        index[b, slot[b, s]] = s
    return index


def _shares(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    weight = np.exp(rng.standard_normal(shape) * 2)
    return weight / np.maximum(weight.sum(-1, keepdims=True), 1e-30)


def _few_values(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.integers(0, 3, shape) / 4


def _signs(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Sums above, at and below 0, and far from it where they are not at 0."""
    return rng.choice([-1.0, -0.0, 0.0, 1.0, 2.0], shape)


def _not_finite(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.choice([np.nan, np.inf, -np.inf, 1.0], shape)


def _case(
    name: str,
    tokens: int,
    capacity: int,
    lengths: Sequence[int] | None = None,
    values: Values = _shares,
    protect: float = 0.1,
    wild: bool = False,
    **attrs: int,
) -> Case:
    """Kept tokens are no candidates with a probability of ``protect``; what is no column holds NaN."""
    rows = lengths or [tokens]

    def make(seed: int) -> Sequence[Any]:
        rng = np.random.default_rng(seed)
        slot, _, count = stream(rng, tokens, capacity, rows)
        index = kept_tokens(slot, capacity)
        candidate = np.where(rng.random(slot.shape) < protect, 0, rng.choice([1, -1, 7], slot.shape))
        affinity = values(rng, (len(rows), tokens - capacity, tokens)).astype(np.float32)
        affinity[np.broadcast_to(((slot < 0) | (candidate == 0))[:, None], affinity.shape)] = np.nan
        if wild and capacity:
            index[:, -1] = rng.choice([tokens, 2**31 - 1], len(rows))
            index[0, 0] = -(2**31)
        return affinity, index, candidate.astype(np.int32), count

    return Case(name, make, attrs)


CASES = [
    *(_case(f"{n}-tokens", n, (n + 1) // 2, eps_permille=950) for n in (1, 2, 63, 127, 128, 129)),
    _case("1000-tokens", 1000, 988),
    *(_case(f"{c}-columns", c + 3, c, protect=0.0) for c in (500, 501, 502, 577)),
    _case("all-columns", 40, 25, eps_permille=0),
    _case("highest-alone", 40, 25, eps_permille=999),
    _case("half", 65, 40, eps_permille=500),
    _case("ragged", 64, 40, [64, 50, 1], eps_permille=900),
    _case("empty-row", 40, 20, [0, 40, 15], eps_permille=900),
    _case("no-candidates", 40, 20, [40, 30], protect=1.0, eps_permille=900),
    _case("nothing-dropped", 65, 65, [65, 40, 0]),
    _case("nothing-kept", 30, 0, [30, 20]),
    _case("ties", 100, 60, [100, 80, 50], _few_values, eps_permille=900),
    _case("signs", 100, 60, [100, 70], _signs, eps_permille=950),
    _case("not-finite", 50, 30, [50, 40], _not_finite, eps_permille=970),
    _case("outside", 60, 40, [60, 50], wild=True, eps_permille=900),
]

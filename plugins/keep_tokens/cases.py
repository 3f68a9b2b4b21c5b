"""Cases of KeepTokens: sizes, every part of the budget, ties, protected tokens, scores that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from plugins._cases import Array, int32
from trtpass.op import Case

Scores = Callable[[np.random.Generator, tuple[int, int]], Array]


def normal(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    return rng.standard_normal(shape)


def protected(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    """A normal score, +inf for the first token and for a quarter of the others."""
    score = np.where(rng.random(shape) < 0.25, np.inf, rng.standard_normal(shape))
    score[:, :1] = np.inf
    return score


def few_values(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    return rng.choice([-1.0, -0.0, 0.0, 1.0], shape)


def not_finite(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    return rng.choice([np.nan, np.inf, -np.inf, 3.4028235e38, -3.4028235e38, 1e-45, -1e-45, 0.0, 1.0], shape)


def _case(name: str, lengths: Sequence[int], scores: Scores = normal, tokens: int | None = None, **attrs: int) -> Case:
    size = tokens or max(lengths)

    def make(seed: int) -> Sequence[Any]:
        rng = np.random.default_rng(seed)
        score = scores(rng, (len(lengths), size)).astype(np.float32)
        for row, length in zip(score, lengths, strict=True):
            row[max(length, 0) :] = rng.choice([np.nan, np.inf, 9.0])  # padding may hold anything
        return score, int32(lengths)

    return Case(name, make, attrs)


CASES = [
    *(_case(f"{n}-tokens", [n], permille=500) for n in (1, 63, 127, 128, 129, 1000)),
    *(_case(f"rounding-{r}", [50, 49, 48], permille=333, rounding=r) for r in (0, 500, 999)),
    *(_case(f"drop-{d}", [50, 9, 1], drop=d) for d in (0, 1, 8, 9, 50, 2**20)),
    _case("all-kept", [40, 13], not_finite),
    _case("none-kept", [40], permille=0, rounding=0),
    _case("fixed", [50, 6, 4, 1], protected, fixed=5, permille=250),
    _case("fixed-of-a-long-row", [9], fixed=2**20, permille=0),
    _case("fixed-drop", [50, 20, 4], protected, fixed=3, permille=500, rounding=500, drop=2),
    _case("ragged", [100, 60, 1], permille=700),
    _case("padding", [30, 20, 0], tokens=64, permille=400),
    _case("lengths-out-of-range", [90, -3, 40], tokens=40, permille=500),
    _case("too-many-protected", [64, 33], protected, permille=100),
    *(_case(f"ties-{p}", [100, 31, 7], few_values, permille=p) for p in (300, 600)),
    *(_case(f"not-finite-{p}", [100, 57, 9], not_finite, permille=p) for p in (150, 400, 850, 950)),
    _case("nothing-but-nan", [33], lambda rng, shape: np.full(shape, np.nan), permille=500),
]

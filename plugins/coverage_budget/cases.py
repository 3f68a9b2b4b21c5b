"""Cases of CoverageBudget: both modes, the borders of the dense rule, ties, masses that are not a mass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from plugins._cases import Array, int32, mass
from trtpass.op import Case

Edit = Callable[[Array], None]


def _case(
    name: str,
    lengths: Sequence[int],
    edit: Edit | None = None,
    tokens: int | None = None,
    heads: int = 3,
    **attrs: Any,
) -> Case:
    settings = {"window": 16, "min_tokens": 8, "coverage_ppm": 20000, **attrs}

    def make(seed: int) -> Sequence[Any]:
        values = mass(seed, heads, tokens or max(lengths), lengths, settings["window"])
        if edit is not None:
            edit(values)
        return values, int32(lengths)

    return Case(name, make, settings)


def _put(value: float, where: Any = np.s_[...]) -> Edit:
    def edit(values: Array) -> None:
        values[where] = value

    return edit


def _halves(values: Array) -> None:
    """Of 2 heads and a window of 16: each is a whole number of fixed-point units, or that and a half."""
    numbers: Array = np.floor(np.random.default_rng(len(values)).random(values.shape) * 2**24)
    numbers[..., ::2] %= 8
    values[...] = numbers * 2.0**-26


CASES = [
    *(_case(f"{n}-tokens-paper", [n], prefix=0) for n in (1, 63, 127, 128, 129, 1000)),
    *(_case(f"{n}-tokens", [n]) for n in (1, 63, 127, 128, 129, 1000)),
    *(_case(f"window-{d:+d}", [16 + d], min_tokens=0, coverage_ppm=200000) for d in (-1, 0, 1, 2)),
    *(_case(f"floor-{d:+d}", [24 + d], coverage_ppm=500000) for d in (-1, 0, 1, 2)),
    _case("floor-holds", [100], min_tokens=60, coverage_ppm=900000),
    _case("defaults", [1200], window=128, min_tokens=1024, coverage_ppm=5000),
    _case("ragged-batch", [300, 150, 20], coverage_ppm=50000),
    _case("ragged-batch-paper", [300, 150, 1], coverage_ppm=50000, prefix=0, min_tokens=0),
    _case("padding", [40, 60], tokens=100),
    _case("zero-coverage", [200], coverage_ppm=0),
    _case("zero-coverage-paper", [200], coverage_ppm=0, prefix=0),
    _case("smallest-coverage", [200], coverage_ppm=1),
    _case("nearly-all", [200], coverage_ppm=999999),
    _case("nearly-all-paper", [200], coverage_ppm=999999, prefix=0, min_tokens=0),
    _case("all-equal", [200], _put(16 / 200), coverage_ppm=100000),
    _case("many-ties", [200], _put(0.01, np.s_[:, :, :150]), coverage_ppm=100000),
    _case("no-mass", [200], _put(0.0)),
    _case("one-column", [200], _put(0.0, np.s_[:, :, 1:])),
    _case("nan-and-infinity", [200], lambda x: x[..., :3].__setitem__(..., [np.nan, np.inf, -np.inf])),
    _case("beyond-a-mass", [500], _put(16.0), coverage_ppm=500000),
    _case("halves", [200], _halves, heads=2, coverage_ppm=1),
    _case("halves-paper", [200], _halves, heads=2, coverage_ppm=300000, prefix=0, min_tokens=0),
    _case("many-heads", [130], heads=20, coverage_ppm=100000),
    # Longer than any block of a kernel's smaller tactic, two in a row so that one of them is tried with it.
    _case("2100-tokens", [2100], heads=1, coverage_ppm=50000),
    _case("2100-tokens-ragged", [2100, 2060], heads=1, coverage_ppm=300000, prefix=0, min_tokens=0),
]

"""Cases of SelectTokens: sizes, protected windows, capacity, ties, and scores that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from plugins._cases import Array, int32, mass, normal
from trtpass.op import Case

Scores = Callable[[int, Sequence[int], int], Array]


def _normal(seed: int, lengths: Sequence[int], tokens: int) -> Array:
    return normal(seed, len(lengths), 3, tokens)


def _heavy_tail(seed: int, lengths: Sequence[int], tokens: int) -> Array:
    return mass(seed, 3, tokens, lengths)


def _few_values(seed: int, lengths: Sequence[int], tokens: int) -> Array:
    return np.random.default_rng(seed).integers(-1, 2, (len(lengths), 3, tokens)).astype(np.float32)


def _not_finite(seed: int, lengths: Sequence[int], tokens: int) -> Array:
    values = np.array([np.nan, np.inf, -np.inf, 3.4028235e38, -3.4028235e38, 1e-45, -1e-45, 0.0, 1.0], dtype=np.float32)
    return np.random.default_rng(seed).choice(values, (len(lengths), 3, tokens))


def _adjacent(seed: int, lengths: Sequence[int], tokens: int) -> Array:
    """Neighbouring floats around 1, where the spacing changes."""
    steps = np.random.default_rng(seed).integers(-3, 4, (len(lengths), 3, tokens))
    return (np.float32(1).view(np.int32) + steps.astype(np.int32)).view(np.float32)


def _zeros(seed: int, lengths: Sequence[int], tokens: int) -> Array:
    """Zeros of both signs, which are equal, among the smallest floats."""
    values = np.array([0.0, -0.0, 0.0, -0.0, 1e-45, -1e-45], dtype=np.float32)
    return np.random.default_rng(seed).choice(values, (len(lengths), 3, tokens))


def _one_set(scores: Scores) -> Scores:
    return lambda seed, lengths, tokens: scores(seed, lengths, tokens)[:, :1].copy()


def _constant(seed: int, lengths: Sequence[int], tokens: int) -> Array:
    return np.full((len(lengths), 3, tokens), 0.25, np.float32)


def _case(
    name: str,
    lengths: Sequence[int],
    keep: Sequence[int],
    scores: Scores = _heavy_tail,
    tokens: int | None = None,
    **attrs: Any,
) -> Case:
    def make(seed: int) -> Sequence[Any]:
        return scores(seed, lengths, tokens or max(lengths)), int32(keep), int32(lengths)

    return Case(name, make, attrs)


CASES = [
    *(_case(f"{n}-tokens", [n], [(n + 1) // 2]) for n in (1, 63, 127, 128, 129, 1000)),
    *(_case(f"keep-{n}", [50], [n], _normal) for n in (0, 1, 49, 50, 60, -3)),
    *(_case(f"window-{d:+d}", [16 + d], [8], window=16) for d in (-1, 0, 1)),
    *(_case(f"keep-window-{d:+d}", [100], [16 + d], window=16) for d in (-1, 0, 1)),
    _case("window-wider-than-row", [100, 9], [50, 5], window=16),
    _case("ragged-batch", [100, 60, 1], [70, 60, 1], _normal, window=8),
    _case("padding", [30, 20], [12, 40], _normal, tokens=64),
    _case("one-set", [100], [40], lambda seed, lengths, tokens: normal(seed, 1, 1, tokens)),
    *(_case(f"capacity-{p}", [129], [100], max_keep_permille=p, window=4) for p in (1, 250, 999)),
    _case("capacity-below-window", [100], [80], max_keep_permille=50, window=16),
    _case("ties", [100], [50], _few_values),
    _case("ties-window", [100, 31], [50, 30], _few_values, window=8),
    _case("all-equal", [100], [33], _constant),
    _case("all-equal-window", [100], [33], _constant, window=8),
    *(_case(f"not-finite-{n}", [100], [n], _not_finite, window=4) for n in (10, 30, 50, 70, 90)),
    _case("not-finite-window", [40], [9], _not_finite, window=16),
    _case("adjacent-floats", [100], [50], _adjacent),
    *(_case(f"zeros-{n}", [100], [n], _zeros) for n in (20, 40, 60, 90)),
    # Longer than any block of a kernel's smaller tactic, two in a row so that one of them is tried with it.
    _case("2100-tokens", [2100], [1200], _one_set(_normal), window=16),
    _case("2100-tokens-ties", [2100, 2070], [900, 2068], _one_set(_few_values), window=32),
]

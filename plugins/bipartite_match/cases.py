"""Cases of BipartiteMatch: best matches that are best by far, or ties that are exact in any order of summing.

tests/test_merging_operators.py measures both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from plugins._cases import Array, int32
from trtpass.op import Case

Pair = Callable[[np.random.Generator, int, int, int], tuple[Array, Array]]  # (rng, S, R, E) -> [S, E], [R, E]


def planted(rng: np.random.Generator, tokens: int, rows: int, width: int) -> tuple[Array, Array]:
    """Rows in random directions, or along the axes where they are few; each token is one of them and some noise."""
    if rows <= width:
        b = np.linalg.qr(rng.standard_normal((width, width)))[0][:rows]
    else:
        b = rng.standard_normal((rows, width)) / np.sqrt(width)
    noise = rng.standard_normal((tokens, width)) / np.sqrt(width)
    a = b[rng.integers(rows, size=tokens)] + 0.2 * noise
    return a * np.exp(rng.standard_normal((tokens, 1))), b * np.exp(rng.standard_normal((rows, 1)))


def ties(rng: np.random.Generator, tokens: int, rows: int, width: int) -> tuple[Array, Array]:
    """Signs times powers of two, in a power of four of axes: norms, quotients and sums are exact, and ties abound."""
    a, b = (rng.choice([-1.0, 1.0], (n, width)) * 2.0 ** rng.integers(-3, 4, (n, 1)) for n in (tokens, rows))
    b[rows // 2 :] = b[: rows - rows // 2] * 2  # everything twice, in another length
    return a, b


def without_direction(pair: Pair, *values: float) -> Pair:
    """A third of either side is zero vectors or vectors with one of ``values`` in them; no token was made from such."""

    def spoil(rng: np.random.Generator, x: Array, chosen: Array) -> None:
        for row in chosen:
            value = rng.choice([0.0, *values])
            if abs(value) < 1e-19:
                x[row] = value
            else:
                x[row, rng.integers(x.shape[1])] = value

    def make(rng: np.random.Generator, tokens: int, rows: int, width: int) -> tuple[Array, Array]:
        order = rng.permutation(rows)
        bad, good = np.split(order, [rows // 3])
        b = np.ones((rows, width))
        a, b[np.sort(good)] = pair(rng, tokens, len(good), width)
        spoil(rng, a, rng.permutation(tokens)[: tokens // 3])
        spoil(rng, b, bad)
        return a, b

    return make


def zeros(rng: np.random.Generator, tokens: int, rows: int, width: int) -> tuple[Array, Array]:
    return rng.standard_normal((tokens, width)), np.zeros((rows, width))


def _case(
    name: str,
    tokens: int,
    lengths: Sequence[int],
    width: int,
    pair: Pair = planted,
    rows: int | None = None,
    dtype: str = "float32",
    slow: bool = False,
) -> Case:
    padded = rows or max(lengths)

    def make(seed: int) -> Sequence[Any]:
        rng = np.random.default_rng(seed)
        a = np.zeros((len(lengths), tokens, width))
        b = np.full((len(lengths), padded, width), np.nan)  # padding may hold anything
        for n, length in enumerate(lengths):
            a[n], b[n, :length] = pair(rng, tokens, max(length, 1), width) if length else (1.0, 0.0)
        return a.astype(dtype), b.astype(dtype), int32(lengths)

    return Case(name, make, {}, slow)


CASES = [
    *(_case(f"{n}-tokens", n, [r], e) for n, r, e in ((1, 1, 7), (63, 7, 7), (127, 60, 33), (128, 64, 64))),
    *(_case(f"{n}-tokens-one-row", n, [1], 33) for n in (1, 129)),
    _case("1000-tokens", 1000, [300], 64, without_direction(planted, np.nan, np.inf, 1e30, 1e-22), slow=True),
    _case("more-rows-than-tokens", 5, [200], 33),
    _case("batch", 50, [20, 7, 31], 33),
    _case("rows-absent", 40, [20, 0, 1], 33, rows=24),
    _case("no-rows", 63, [0, 0], 7, rows=5),
    _case("no-room", 63, [0, 0], 7),
    _case("float16", 129, [33, 20, 1], 33, dtype="float16"),
    _case("float16-7-wide", 63, [7, 3], 7, dtype="float16"),
    *(_case(f"float16-{r}-rows", 200, [r, 257], 64, dtype="float16") for r in (300, 280, 290)),
    _case("one-wide", 65, [9, 2, 1], 1, ties),
    *(_case(f"ties-{e}-wide", 128, [100, 31, 3], e, ties) for e in (4, 16)),
    _case("ties-float16", 128, [100, 31, 3], 16, ties, dtype="float16"),
    _case("ties-64-wide", 63, [127], 64, ties),
    _case("without-direction", 100, [40, 33, 3], 33, without_direction(planted, np.nan, np.inf, -np.inf, 1e-22)),
    _case("without-direction-float16", 100, [40, 1], 33, without_direction(planted, np.nan, -np.inf), dtype="float16"),
    _case("without-direction-ties", 63, [40, 33], 16, without_direction(ties, np.nan, np.inf)),
    _case("nothing-but-zeros", 30, [10], 7, zeros),
]

"""Cases of AttentionRows: one row or all of them, causal or not, groups, biases, rows that are none, both floats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from plugins._cases import Array, int32, normal
from trtpass.op import Case


def first(rng: np.random.Generator, lengths: Sequence[int], tokens: int) -> Array:
    return np.zeros((len(lengths), 1))


def last(rng: np.random.Generator, lengths: Sequence[int], tokens: int) -> Array:
    return np.array(lengths)[:, None] - 1


def every(rng: np.random.Generator, lengths: Sequence[int], tokens: int) -> Array:
    return np.tile(np.arange(tokens), (len(lengths), 1))


def drawn(rng: np.random.Generator, lengths: Sequence[int], tokens: int) -> Array:
    """Seven rows in any order, some twice, some of them none."""
    return rng.integers(-1, tokens + 2, (len(lengths), 7))


def far(rng: np.random.Generator, lengths: Sequence[int], tokens: int) -> Array:
    return rng.choice([-(2**31), -1, 0, tokens - 1, tokens, 2**31 - 1], (len(lengths), 9))


def _case(
    name: str,
    lengths: Sequence[int],
    rows: Any = drawn,
    tokens: int | None = None,
    heads: tuple[int, int] = (2, 2),
    width: int = 16,
    dtype: str = "float32",
    spread: float = 1.5,
    **attrs: Any,
) -> Case:
    """Half of the biases are 0, the others logarithms of sizes; behind a row they are NaN."""
    size = tokens or max(lengths)

    def make(seed: int) -> Sequence[Any]:
        rng = np.random.default_rng(seed)
        q = normal(seed, len(lengths), heads[0], size, width, scale=spread, dtype=dtype)
        k = normal(seed + 1, len(lengths), heads[1], size, width, scale=spread, dtype=dtype)
        bias = np.where(rng.random((len(lengths), size)) < 0.5, 0, np.log(rng.integers(1, 9, (len(lengths), size))))
        for values, length in zip(bias, lengths, strict=True):
            values[max(length, 0) :] = np.nan
        return q, k, bias.astype(np.float32), rows(rng, lengths, size).astype(np.int32), int32(lengths)

    return Case(name, make, attrs)


CASES = [
    *(_case(f"{n}-tokens", [n]) for n in (1, 63, 127, 128, 129)),
    *(_case(f"{n}-tokens-causal", [n], last, causal=1) for n in (1, 63, 129)),
    _case("1000-tokens", [1000], first, heads=(3, 1)),
    _case("every-row", [65, 40, 1], every),
    _case("every-row-causal", [65, 40, 1], every, heads=(6, 2), causal=1),
    _case("every-row-of-many", [300], every, heads=(1, 1), width=7),
    _case("first-row", [50, 20, 3], first, heads=(6, 2)),
    _case("last-row", [50, 20, 3], last, heads=(6, 2), causal=1),
    _case("padding", [9, 0, 33], tokens=50),
    _case("lengths-out-of-range", [90, -3, 40], tokens=40),
    _case("rows-far-away", [40, 17], far, causal=1),
    _case("no-rows", [20], lambda rng, lengths, tokens: np.zeros((1, 0))),
    _case("own-scale", [50], scale=0.5),
    _case("scores-far-apart", [64], spread=6.0),
    _case("wide", [33], width=80),
    _case("float16", [65, 20, 8], heads=(6, 2), dtype="float16"),
    _case("float16-every-row", [129, 40], every, dtype="float16", causal=1),
]

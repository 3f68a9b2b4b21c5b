"""Cases of MergeTokens: sizes, rows that nothing joins, targets that are none, weights of 0, values not finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from plugins._cases import Array, normal
from trtpass.op import Case


def _sizes(rng: np.random.Generator, kind: str, *shape: int) -> Array:
    """Weights float32: all 1, token counts with some zeros, or any positive number."""
    if kind == "ones":
        return np.ones(shape, np.float32)
    if kind == "counts":
        return rng.integers(0, 4, shape).astype(np.float32)
    return np.exp(rng.standard_normal(shape)).astype(np.float32)


def _case(
    name: str,
    tokens: int,
    rows: int,
    width: int,
    batch: int = 1,
    targets: tuple[int, int] | None = None,
    weights: tuple[str, str] = ("ones", "ones"),
    dtype: str = "float32",
    poison: Sequence[float] = (),
    slow: bool = False,
) -> Case:
    """Targets are drawn from ``targets``, by default [0, R); tokens that go nowhere hold NaN."""

    def make(seed: int) -> Sequence[Any]:
        rng = np.random.default_rng(seed)
        base = normal(seed, batch, rows, width, dtype=dtype)
        x = normal(seed + 1, batch, tokens, width, dtype=dtype)
        target = rng.integers(*(targets or (0, rows)), (batch, tokens)).astype(np.int32)
        for value in poison:
            x[rng.integers(batch), rng.integers(tokens), rng.integers(width)] = value
        x[(target < 0) | (target >= rows)] = np.nan
        base_size, size = _sizes(rng, weights[0], batch, rows), _sizes(rng, weights[1], batch, tokens)
        return base, base_size, x, size, target

    return Case(name, make, {}, slow)


POSITIVE = ("any", "any")
COUNTS = ("counts", "counts")

CASES = [
    *(_case(f"{n}-tokens", n, r, e) for n, r, e in ((1, 1, 1), (63, 20, 7), (127, 60, 33), (128, 64, 64))),
    _case("129-tokens", 129, 128, 33, weights=POSITIVE),
    _case("1000-tokens", 1000, 200, 64, weights=POSITIVE, slow=True),
    _case("one-row", 1000, 1, 7, weights=POSITIVE),
    _case("one-wide", 65, 9, 1, weights=POSITIVE),
    _case("more-rows-than-tokens", 5, 200, 7, weights=POSITIVE),
    _case("no-tokens", 0, 20, 7, batch=2, weights=COUNTS),
    _case("batch", 50, 20, 7, batch=3, weights=POSITIVE),
    _case("targets-outside", 100, 20, 7, batch=3, targets=(-10, 30), weights=POSITIVE),
    _case("targets-far-away", 63, 20, 7, targets=(-(2**31), 2**31 - 1)),
    _case("nowhere", 40, 9, 7, targets=(9, 10), weights=POSITIVE),
    _case("some-sizes-0", 100, 60, 7, batch=3, weights=COUNTS),
    _case("base-without-size", 63, 20, 33, weights=("counts", "ones"), targets=(5, 10)),
    _case("float16", 129, 40, 33, batch=3, targets=(-3, 43), weights=POSITIVE, dtype="float16"),
    _case("float16-counts", 128, 60, 7, weights=COUNTS, dtype="float16"),
    _case("not-finite", 100, 30, 7, batch=3, targets=(-3, 30), poison=(np.nan, np.inf, np.inf, -np.inf)),
    _case("not-finite-float16", 63, 20, 33, poison=(np.nan, np.inf, -np.inf), dtype="float16"),
]

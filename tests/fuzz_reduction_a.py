"""Random inputs of the operators that read attention, gather, keep, index and compare even with odd tokens."""

from __future__ import annotations

import numpy as np
from fuzz_values import (
    FAR,
    Request,
    Rng,
    floating,
    groups,
    heads_not_a_multiple,
    normal,
    replaced,
    scale,
    size,
    some,
    unreal_floats,
    width,
    with_attrs,
)

from plugins._cases import int32

WRONG_BUDGETS = {"fixed": (-1, 2**20 + 1), "permille": (-1, 1001), "rounding": (-1, 1000), "drop": (-5, 2**31)}


def lengths_of(rng: Rng, batch: int, tokens: int) -> np.ndarray:
    """Clipped to [0, S]."""
    return int32(rng.integers(-2, tokens + 3, batch) if rng.random() < 0.5 else [tokens] * batch)


def budget(rng: Rng, tokens: int) -> dict[str, int]:
    return {
        "fixed": int(rng.choice([0, 0, 1, 5, tokens + 2])),
        "permille": int(rng.choice([0, 100, 333, 500, 700, 1000, 1000])),
        "rounding": int(rng.choice([0, 500, 999])),
        "drop": int(rng.choice([0, 0, 1, 8, tokens // 2, 2**20])),
    }


def wrong_budget(rng: Rng, given: Request) -> Request:
    name = str(rng.choice(sorted(WRONG_BUDGETS)))
    return with_attrs(given, f"{name} out of range", **{name: int(rng.choice(WRONG_BUDGETS[name]))})


def gather(rng: Rng) -> Request:
    batch, s, taken, dtype = int(rng.choice([0, 1, 2, 3])), size(rng), size(rng), floating(rng)
    x = normal(rng, dtype, batch, s, width(rng))
    if rng.random() < 0.3:
        x = some(rng, x, np.nan, np.inf, -np.inf)
    return Request([x, rng.integers(-2, s + 3, (batch, taken)).astype(np.int32)])


def wrong_gather(rng: Rng, given: Request) -> Request:
    return replaced(given, 1, some(rng, given.inputs[1], *FAR, share=0.6), "indices far out")


def rows(rng: Rng) -> Request:
    """Padding of k is large, that of the bias is NaN."""
    (b, h, g), s, d, dtype = groups(rng), size(rng), width(rng), floating(rng)
    q, k = normal(rng, dtype, b, h, s, d), normal(rng, dtype, b, g, s, d)
    bias, lengths = rng.standard_normal((b, s)).astype(np.float32), lengths_of(rng, b, s)
    for n, length in enumerate(np.clip(lengths, 0, s)):
        k[n, :, length:], bias[n, length:] = 3e4, np.nan
    row = np.tile(np.arange(s), (b, 1)) if rng.random() < 0.3 else rng.integers(-1, s + 2, (b, rng.integers(15)))
    attrs = {"causal": int(rng.integers(2)), "scale": scale(rng)}
    return Request([q, k, bias, row.astype(np.int32), lengths], attrs)


def wrong_rows(rng: Rng, given: Request) -> Request:
    kind = rng.integers(5)
    if kind == 0:
        return with_attrs(given, "causal is neither 0 nor 1", causal=int(rng.choice([-1, 2, 2**31])))
    if kind == 1:
        return heads_not_a_multiple(given)
    if kind == 2:
        return unreal_floats(rng, given, 0, 1, 2)
    at = int(rng.choice([3, 4]))
    return replaced(given, at, some(rng, given.inputs[at], *FAR, share=0.6), "rows or lengths far out", True)


def keep(rng: Rng) -> Request:
    """Ties, NaN and infinities; padding is poison."""
    batch, s = int(rng.choice([0, 1, 2, 3])), size(rng, 100)
    score, lengths = rng.standard_normal((batch, s)).astype(np.float32), lengths_of(rng, batch, s)
    draw = rng.random()
    if draw < 0.3:
        score = np.round(score * rng.choice([0.0, 1.0, 3.0])).astype(np.float32)
    if 0.2 < draw < 0.6:
        score = some(rng, score, np.nan, np.inf, -np.inf, 3e38, -3e38, 0.0, -0.0, 1e-45, share=0.3)
    for values, length in zip(score, np.clip(lengths, 0, s), strict=True):
        values[length:] = rng.choice([np.nan, np.inf, 1e9])
    return Request([score, lengths], budget(rng, s))


def wrong_keep(rng: Rng, given: Request) -> Request:
    if rng.random() < 0.5:
        return wrong_budget(rng, given)
    return replaced(given, 1, some(rng, given.inputs[1], *FAR, share=0.6), "lengths far out")


def index(rng: Rng) -> Request:
    batch, s = int(rng.choice([0, 1, 2, 3])), size(rng, 100)
    mask = rng.choice(int32([0, 1, -1, 2**31 - 1]), (batch, s))
    return Request(
        [np.where(rng.random((batch, s)) < rng.random(), mask, 0), lengths_of(rng, batch, s)], budget(rng, s)
    )


def even_odd(rng: Rng) -> Request:
    """Vectors of any length, some without a direction, some protected; padding is NaN."""
    batch, s, e = int(rng.choice([0, 1, 2, 3])), size(rng), width(rng)
    metric = rng.standard_normal((batch, s, e)) * np.exp(rng.standard_normal((batch, s, 1)))
    if rng.random() < 0.4:
        metric = np.where(rng.random((batch, s, 1)) < 0.2, rng.choice([0.0, np.nan, np.inf], (batch, s, 1)), metric)
    lengths = lengths_of(rng, batch, s)
    for row, length in zip(metric, np.clip(lengths, 0, s), strict=True):
        row[length:] = np.nan
    protected = np.where(rng.random((batch, s)) < rng.choice([0.0, 0.1, 0.9]), rng.choice([1, -7], (batch, s)), 0)
    return Request([metric.astype(floating(rng)), protected.astype(np.int32), lengths])


def wrong_even_odd(rng: Rng, given: Request) -> Request:
    if rng.random() < 0.5:
        return unreal_floats(rng, given, 0)
    return replaced(given, 2, some(rng, given.inputs[2], *FAR, share=0.6), "lengths far out")

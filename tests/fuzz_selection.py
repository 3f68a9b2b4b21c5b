"""Random inputs of the operators that score, budget and select."""

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


def column_mass(rng: Rng) -> Request:
    """Padding must be finite, and is large."""
    (b, h, g), s, d, dtype = groups(rng), size(rng), width(rng), floating(rng)
    s = max(s, 1)
    q, k = normal(rng, dtype, b, h, s, d), normal(rng, dtype, b, g, s, d)
    lengths = rng.integers(1, s + 1, b)
    for n, length in enumerate(lengths):
        q[n, :, length:] = k[n, :, length:] = 3e4
    window = int(rng.choice([1, 2, 5, 16, 31, 128, 1000]))
    pool = int(rng.choice([1, 3, 7, 51]))
    attrs = {"window": window, "pool": pool, "prefix": int(rng.integers(2)), "scale": scale(rng)}
    return Request([q, k, int32(lengths)], attrs)


def wrong_column_mass(rng: Rng, given: Request) -> Request:
    kind = rng.integers(5)
    if kind == 0:
        tokens = given.inputs[0].shape[2]
        return replaced(given, 2, some(rng, given.inputs[2], 0, -1, tokens + 1, tokens + 1000), "lengths out of range")
    if kind == 1:
        return with_attrs(given, "window below 1", window=int(rng.choice([0, -1, -(2**31)])))
    if kind == 2:
        return with_attrs(given, "pool even or below 1", pool=int(rng.choice([0, -1, -3, 2, 100])))
    if kind == 3:
        return heads_not_a_multiple(given)
    return unreal_floats(rng, given, 0, 1)


def budget(rng: Rng) -> Request:
    b, h, s = int(rng.choice([0, 1, 2, 3])), int(rng.integers(1, 10)), size(rng, 100)
    window = int(rng.choice([1, 2, 8, 32, 128]))
    lengths = rng.integers(0, s + 1, b)
    mass = np.exp(rng.standard_normal((b, h, s)) * rng.choice([0.0, 0.5, 2.0, 4.0]))
    mass *= np.arange(s) < lengths[:, None, None]
    mass = (mass / np.maximum(mass.sum(-1, keepdims=True), 1e-9) * window).astype(np.float32)
    draw = rng.random()
    if draw < 0.15:
        mass = np.zeros_like(mass)
    elif draw < 0.3:
        mass = some(rng, mass, np.nan, -np.inf, -1.0, 0.0)
    for row, length in zip(mass, lengths, strict=True):
        row[:, length:] = rng.choice([np.nan, np.inf, 0.0, 3.0])  # padding is not looked at
    attrs = {
        "coverage_ppm": int(rng.choice([0, 1, 5000, 100_000, 500_000, 999_999])),
        "window": window,
        "min_tokens": int(rng.choice([0, 1, 16, 100, 1024])),
        "prefix": int(rng.integers(2)),
    }
    return Request([mass, int32(lengths)], attrs)


def wrong_budget(rng: Rng, given: Request) -> Request:
    kind = rng.integers(4)
    if kind == 0:
        tokens = given.inputs[0].shape[2]
        return replaced(given, 1, some(rng, given.inputs[1], tokens + 1, *FAR), "lengths out of range")
    if kind == 1:
        return with_attrs(given, "coverage out of range", coverage_ppm=int(rng.choice([-1, 10**6, 2**31 - 1])))
    if kind == 2:
        wrong = {"window": int(rng.choice([0, -1]))} if rng.random() < 0.5 else {"min_tokens": -1}
        return with_attrs(given, "window or min_tokens too small", **wrong)
    mass = some(rng, given.inputs[0], np.inf, 1e30, share=0.9)
    return replaced(given, 0, mass, "far more mass than the window has", True)


def select(rng: Rng) -> Request:
    """Ties, NaN, infinities and the largest floats; padding is poison."""
    b, n, s = int(rng.choice([0, 1, 2, 3])), int(rng.integers(1, 5)), size(rng, 100)
    score = rng.standard_normal((b, n, s)).astype(np.float32)
    draw = rng.random()
    if draw < 0.3:
        score = np.round(score * rng.choice([0.0, 1.0, 3.0])).astype(np.float32)
    if 0.2 < draw < 0.6:
        score = some(rng, score, np.nan, np.inf, -np.inf, 3e38, -3e38, 1.7e38, 0.0, -0.0, 1e-45, share=0.3)
    lengths = rng.integers(0, s + 1, b)
    for row, length in zip(score, lengths, strict=True):
        row[:, length:] = rng.choice([np.nan, np.inf, 1e9])
    keep = rng.integers(-1, s + 3, b)
    permille = 1000 if rng.random() < 0.4 else int(rng.integers(1, 1001))
    window = int(rng.choice([0, 0, 1, 5, 32, s + 2]))
    return Request([score, int32(keep), int32(lengths)], {"window": window, "max_keep_permille": permille})


def wrong_select(rng: Rng, given: Request) -> Request:
    kind = rng.integers(4)
    if kind == 0:
        tokens = given.inputs[0].shape[2]
        return replaced(given, 2, some(rng, given.inputs[2], tokens + 1, *FAR), "lengths out of range")
    if kind == 1:
        return with_attrs(given, "permille out of range", max_keep_permille=int(rng.choice([0, -1, 1001, 2**31 - 1])))
    if kind == 2:
        return with_attrs(given, "window below 0", window=int(rng.choice([-1, -(2**31)])))
    return replaced(given, 1, some(rng, given.inputs[1], *FAR, share=0.8), "keep far out")

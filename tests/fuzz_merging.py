"""Random inputs of the merging operators; decisions are kept away from their thresholds, where a kernel may differ."""

from __future__ import annotations

import numpy as np
from fuzz_values import (
    FAR,
    Request,
    Rng,
    floating,
    normal,
    replaced,
    size,
    some,
    unreal_floats,
    width,
    with_attrs,
)

from plugins._cases import int32
from plugins.bipartite_match import cases as matching
from plugins.connected_components import cases as directions


def components(rng: Rng) -> Request:
    """Directions at multiples of 10 degrees, tau half way between two of them; or a chain."""
    batch, s, e = int(rng.choice([0, 1, 2, 3])), size(rng), width(rng)
    made = directions.arcs
    if rng.random() < 0.4:
        made = directions.without_direction(np.nan, np.inf, -np.inf, 1e-22)
    tau = float(np.cos(np.deg2rad(10 * rng.integers(18) + 5)))
    if rng.random() < 0.15:
        e, tau, made = s + 1, 0.4, directions.chain(lambda rng, tokens: rng.permutation(tokens))
    elif rng.random() < 0.1:
        tau = float(rng.choice([2.0, -2.0]))
    lengths = rng.integers(-2, s + 3, batch)  # clipped to [0, S]
    x = np.full((batch, s, e), rng.choice([np.nan, 1.0]))
    for row, length in zip(x, np.clip(lengths, 0, s), strict=True):
        if made is directions.arcs or e != s + 1 or length == s:
            row[:length] = made(rng, int(length), e)
        else:
            row[:length] = 0.0
            row[:length, : int(length) + 1] = made(rng, int(length), int(length) + 1)
    return Request([x.astype(floating(rng)), int32(lengths)], {"tau": tau})


def wrong_components(rng: Rng, given: Request) -> Request:
    if rng.random() < 0.5:
        return with_attrs(given, "tau is NaN", tau=float("nan"))
    return replaced(given, 1, some(rng, given.inputs[1], *FAR, share=0.6), "lengths far out")


def match(rng: Rng) -> Request:
    """Rows at right angles and noise about them, or ties that are exact in any order of summing."""
    batch, s = int(rng.choice([0, 1, 2, 3])), size(rng)
    if rng.random() < 0.5:
        pair, e, rows = matching.ties, int(rng.choice([1, 4, 16, 64])), size(rng)
    else:
        pair, e = matching.planted, width(rng)
        rows = int(rng.integers(e + 1))
    if rng.random() < 0.4:
        pair = matching.without_direction(pair, np.nan, np.inf, 1e-22)
    lengths = rng.integers(-2, rows + 3, batch)  # clipped to [0, R]
    a, b = np.zeros((batch, s, e)), np.full((batch, rows, e), rng.choice([np.nan, 1.0]))
    for n, length in enumerate(np.clip(lengths, 0, rows)):
        if length:
            a[n], b[n, :length] = pair(rng, s, int(length), e)
    dtype = floating(rng)
    return Request([a.astype(dtype), b.astype(dtype), int32(lengths)])


def wrong_match(rng: Rng, given: Request) -> Request:
    return replaced(given, 2, some(rng, given.inputs[2], *FAR, share=0.6), "lengths far out")


def mean(rng: Rng) -> Request:
    batch, s, e, dtype = int(rng.choice([0, 1, 2, 3])), size(rng), width(rng), floating(rng)
    x = normal(rng, dtype, batch, s, e)
    label = rng.integers(-2, max(1, int(s * rng.choice([0.1, 0.5, 1.2]))), (batch, s)).astype(np.int32)
    permille = 1000 if rng.random() < 0.5 else int(rng.integers(1, 1001))
    capacity = (s * permille + 999) // 1000
    if rng.random() < 0.2:
        x = some(rng, x, np.nan, np.inf, -np.inf, share=0.02)
    x[(label < 0) | (label >= capacity)] = np.nan
    return Request([x, label], {"max_segments_permille": permille})


def wrong_mean(rng: Rng, given: Request) -> Request:
    if rng.random() < 0.5:
        wrong = int(rng.choice([0, -1, 1001, 2**31 - 1]))
        return with_attrs(given, "permille out of range", max_segments_permille=wrong)
    return replaced(given, 1, some(rng, given.inputs[1], *FAR, share=0.4), "labels far out")


def merge(rng: Rng) -> Request:
    batch, s, rows, e, dtype = int(rng.choice([0, 1, 2, 3])), size(rng), size(rng), width(rng), floating(rng)
    base, x = normal(rng, dtype, batch, rows, e), normal(rng, dtype, batch, s, e)
    sizes = [np.exp(rng.standard_normal((batch, n))).astype(np.float32) for n in (rows, s)]
    if rng.random() < 0.4:
        sizes = [rng.integers(0, 3, x.shape).astype(np.float32) for x in sizes]
    target = rng.integers(-2, rows + 2, (batch, s)).astype(np.int32)
    if rng.random() < 0.2:
        x = some(rng, x, np.nan, np.inf, -np.inf, share=0.02)
    x[(target < 0) | (target >= rows)] = np.nan
    return Request([base, sizes[0], x, sizes[1], target])


def wrong_merge(rng: Rng, given: Request) -> Request:
    kind = rng.integers(3)
    if kind == 0:
        return replaced(given, 4, some(rng, given.inputs[4], *FAR, share=0.4), "targets far out")
    if kind == 1:
        return unreal_floats(rng, given, 0, 1, 3)
    whole = [np.round(np.nan_to_num(x)) for x in given.inputs[:3]]  # exact sums, that may cancel
    size_of_x = (-np.ones_like(given.inputs[3])).astype(np.float32)
    return Request([*whole, size_of_x, given.inputs[4]], given.attrs, "sizes below 0", True)

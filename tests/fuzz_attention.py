"""Random inputs of the attention operators; what they may not read is NaN."""

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
)

from plugins.ragged_attention.cases import paged


def causal(rng: Rng) -> Request:
    (b, h, g), s, d, dv, dtype = groups(rng), size(rng), width(rng), width(rng), floating(rng)
    inputs = [normal(rng, dtype, b, h, s, d), normal(rng, dtype, b, g, s, d), normal(rng, dtype, b, g, s, dv)]
    return Request(inputs, {"scale": scale(rng)})


def wrong_causal(rng: Rng, given: Request) -> Request:
    if rng.random() < 0.4:
        return heads_not_a_multiple(given)
    return unreal_floats(rng, given, 0, 1, 2)


def encoder(rng: Rng) -> Request:
    """Biases are small, or hide a key; at least one key of a row stays."""
    given = causal(rng)
    batch, _, tokens, _ = given.inputs[0].shape
    bias = rng.normal(size=(batch, tokens))
    bias[:, 1:][rng.random((batch, max(tokens - 1, 0))) < 0.2] = -1e30
    return Request([*given.inputs, bias.astype(np.float32)], given.attrs)


def sparse(rng: Rng) -> Request:
    """What no set selects is NaN: it must not be read."""
    (q, k, v), attrs = causal(rng).inputs, {"scale": scale(rng)}
    batch, heads, tokens, _ = q.shape
    sets = int(rng.choice([heads, k.shape[1]]))
    capacity = max(int(rng.integers(tokens + 1)) if rng.random() < 0.5 else tokens, 1)
    index = np.full((batch, sets, capacity), tokens, np.int32)
    count = rng.integers(0, min(capacity, tokens) + 1, (batch, sets)).astype(np.int32)
    seen = [np.zeros(x.shape[:3], bool) for x in (q, k, v)]
    for b, n in np.ndindex(batch, sets):
        chosen = np.sort(rng.permutation(tokens)[: count[b, n]])
        index[b, n, : len(chosen)] = chosen
        for mask in seen:
            mask[
                b,
                n * mask.shape[1] // sets : max((n + 1) * mask.shape[1] // sets, n * mask.shape[1] // sets + 1),
                chosen,
            ] = True
    for x, mask in zip((q, k, v), seen, strict=True):
        x[~mask] = np.nan
    return Request([q, k, v, index, count], attrs)


def wrong_sparse(rng: Rng, given: Request) -> Request:
    index, count = given.inputs[3:]
    kind = rng.integers(7)
    if kind == 6:  # counted slots that hold S
        return replaced(given, 4, np.full_like(count, index.shape[2]), "count above the positions in index")
    if kind == 0:
        return replaced(given, 4, some(rng, count, -1, -(2**31), index.shape[2] + 1, 2**31 - 1), "count out of range")
    if kind == 1:
        return replaced(given, 3, some(rng, index, *FAR, given.inputs[0].shape[2]), "index out of range")
    if kind == 2:
        return replaced(given, 3, index[..., ::-1].copy(), "index descending")
    if kind == 3:
        return replaced(given, 3, np.repeat(index, 2, 2)[..., : index.shape[2]], "index twice")
    if kind == 4:
        more = [np.concatenate([x, x[:, :1], x], 1) for x in (index, count)]
        return Request([*given.inputs[:3], *more], given.attrs, "N is neither H nor Hkv")
    return unreal_floats(rng, given, 0, 1, 2)


def ragged(rng: Rng) -> Request:
    """All that is not held is NaN, all table entries behind the pages in use are no pages."""
    batch, owners, page = int(rng.integers(1, 4)), int(rng.integers(1, 4)), int(rng.choice([1, 2, 3, 8, 16, 24]))
    most = int(rng.choice([0, 1, page, 40, 90], p=[0.1, 0.1, 0.2, 0.5, 0.1]))
    lengths = rng.integers(0, most + 1, (batch, owners))
    lengths[rng.random(lengths.shape) < 0.1] = 0
    dtype, tokens = floating(rng), int(rng.choice([1, 1, 2, 7, 13, 100], p=[0.3, 0.2, 0.2, 0.15, 0.1, 0.05]))
    extra = int(rng.integers(3))
    wide = (width(rng), width(rng))
    shared = bool(rng.random() < 0.2)
    pools = paged(int(rng.integers(2**31)), lengths.tolist(), page, wide, dtype, extra, int(rng.integers(3)), shared)
    q = normal(rng, dtype, batch, owners * int(rng.integers(1, 4)), tokens, wide[0])
    queries = rng.integers(0, tokens + 1, batch).astype(np.int32)
    for b, asked in enumerate(queries):
        q[b, :, asked:] = np.nan
    return Request([q, *pools, queries], {"scale": scale(rng)})


def wrong_ragged(rng: Rng, given: Request) -> Request:
    q, keys, _, table, lengths, queries = given.inputs
    kind = rng.integers(6)
    if kind == 0:
        wrong = some(rng, lengths, -1, -(2**31), table.shape[2] * keys.shape[1] + 1, 2**31 - 1)
        return replaced(given, 4, wrong, "lengths out of range")
    if kind == 1:
        return replaced(given, 5, some(rng, queries, -1, -(2**31), q.shape[2] + 1, 2**31 - 1), "queries out of range")
    if kind == 2:
        return replaced(given, 3, some(rng, table, *FAR, keys.shape[0], share=0.3), "a page out of the pool")
    if kind == 3:
        return Request([q, *(x[:0] for x in given.inputs[1:3]), *given.inputs[3:]], given.attrs, "an empty pool")
    if kind == 4:
        return heads_not_a_multiple(given)
    return unreal_floats(rng, given, 0, 1, 2)

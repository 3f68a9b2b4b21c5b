"""Random inputs of the operators that keep a paged cache: no two rows of a call go to one place."""

from __future__ import annotations

import numpy as np
from fuzz_values import FAR, Request, Rng, floating, normal, replaced, size, some, width

from plugins._cases import int32


def write(rng: Rng) -> Request:
    """Slots of an owner are distinct and in any order, its pages its own; rows that go nowhere are NaN."""
    batch, owners, tokens, page = int(rng.choice([0, 1, 2, 3])), int(rng.integers(1, 4)), size(rng), size(rng, 24, 1)
    slots = tokens + int(rng.integers(0, 2 * page))
    entries = -(-slots // page)
    slot = np.stack([rng.permutation(entries * page)[:tokens] for _ in range(batch * owners)] or [np.zeros(0)])
    slot = slot.reshape(batch, owners, tokens) if batch else np.zeros((0, owners, tokens))
    gone = rng.random(slot.shape) < rng.choice([0.0, 0.3, 1.0])
    pool = batch * owners * entries + int(rng.integers(3))
    table = rng.permutation(pool)[: batch * owners * entries].reshape(batch, owners, entries)
    dtype, wide = floating(rng), width(rng)
    new = normal(rng, dtype, batch, owners, tokens, wide)
    new[gone] = np.nan
    pages = some(rng, normal(rng, dtype, pool, page, wide), np.nan, np.inf, 0.0)
    return Request([pages, new, np.where(gone, -1, slot).astype(np.int32), table.astype(np.int32)])


def wrong_write(rng: Rng, given: Request) -> Request:
    """Slots and pages that are none: such rows go nowhere."""
    kind = rng.integers(3)
    if kind == 0:
        return replaced(given, 2, some(rng, given.inputs[2], *FAR, share=0.4), "slots out of range")
    if kind == 1:
        pool = len(given.inputs[0])
        return replaced(given, 3, some(rng, given.inputs[3], *FAR, pool, share=0.4), "pages out of the pool")
    return replaced(given, 0, given.inputs[0][:0], "an empty pool")


def compact(rng: Rng) -> Request:
    """Any number but 0 keeps a token; padding holds anything."""
    batch, owners, tokens = int(rng.choice([0, 1, 2, 3])), int(rng.integers(1, 4)), size(rng, 100)
    shape = (batch, owners, tokens)
    keep = np.where(rng.random(shape) < rng.choice([0.0, 0.3, 1.0]), rng.choice([1, *FAR], shape), 0)
    held, lengths = rng.integers(0, 1000, shape[:2]), rng.integers(0, tokens + 1, batch)
    return Request([keep.astype(np.int32), held.astype(np.int32), int32(lengths)])


def wrong_compact(rng: Rng, given: Request) -> Request:
    """Lengths are clipped; a count beyond the largest integer wraps."""
    if rng.random() < 0.5:
        return replaced(given, 2, some(rng, given.inputs[2], *FAR, share=0.6), "lengths out of range")
    return replaced(given, 1, some(rng, given.inputs[1], *FAR, share=0.6), "held far out")

"""Makers of inputs that the cases of several operators share. Numpy only; every array is fixed by its seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def normal(seed: int, *shape: int, scale: float = 1.5, dtype: str = "float32") -> Array:
    """Normal values; at 1.5 the softmax of a D = 16 score is peaked but not saturated."""
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(dtype)


def int32(values: Sequence[int]) -> Array:
    return np.array(values, dtype=np.int32)


def mass(seed: int, heads: int, tokens: int, lengths: Sequence[int], window: int = 128) -> Array:
    """Heavy-tailed column mass `[B, H, S]`: each head's valid columns sum to ``window``, padding is zero."""
    weight = np.exp(np.random.default_rng(seed).standard_normal((len(lengths), heads, tokens)) * 2)
    weight *= np.arange(tokens) < np.array(lengths)[:, None, None]
    return (weight / weight.sum(-1, keepdims=True) * window).astype(np.float32)


def selection(seed: int, tokens: int, capacity: int, counts: Sequence[Sequence[int]]) -> tuple[Array, Array]:
    """Random selections: index `[B, N, C]` ascending and padded with S, count `[B, N]`."""
    rng = np.random.default_rng(seed)
    count = np.array(counts, dtype=np.int32)
    index = np.full((*count.shape, capacity), tokens, dtype=np.int32)
    for row in np.ndindex(*count.shape):
        index[row][: count[row]] = np.sort(rng.permutation(tokens)[: count[row]])
    return index, count

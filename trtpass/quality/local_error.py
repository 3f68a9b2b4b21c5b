"""The local error of one sparse attention, measured: dropped mass m, the bound 2 m max|v|, and how far outputs moved.

For a kept query whose dropped visible keys hold softmax mass m under full attention, ``|o' - o| <= 2 m max|v|``, the
maximum over all visible keys (docs/error_bound.md has the proof and what it does not cover).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

QUANTILES = (0.5, 0.9, 0.99, 1.0)
_ROWS = 256  # queries at a time: scores are [256, S]


@dataclass(frozen=True)
class Heads:
    """One row of a batch in one sparse layer.

    Args:
        q: ``[H, S, D]``, after rotary embedding, as attention gets it.
        k: ``[Hkv, S, D]``. v: ``[Hkv, S, Dv]``.
        sets: ascending kept positions of each of the N selections; N is H or Hkv.
        scale: of the scores.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    sets: Sequence[np.ndarray]
    scale: float


@dataclass(frozen=True)
class LocalError:
    """Per kept query and head, flat ``[sum of kept]``: dropped mass m, bound 2 m max|v|, moved |o' - o|, size |o|."""

    mass: np.ndarray
    bound: np.ndarray
    moved: np.ndarray
    size: np.ndarray


def local_error(layer: Heads) -> LocalError:
    """Full and sparse attention of every kept query, in float32, a block of queries at a time."""
    parts: list[tuple[np.ndarray, ...]] = []
    heads, sets, kv = len(layer.q), len(layer.sets), len(layer.k)
    for head in range(heads):
        keep, group = layer.sets[head * sets // heads], head * kv // heads
        k, v = layer.k[group].astype(np.float32), layer.v[group].astype(np.float32)
        kept = np.zeros(len(k), bool)
        kept[keep] = True
        largest = np.maximum.accumulate(np.linalg.norm(v, axis=-1))  # max|v| over the keys up to each position
        for start in range(0, len(keep), _ROWS):
            rows = keep[start : start + _ROWS]
            parts.append(_block(layer.q[head, rows].astype(np.float32), k, v, kept, rows, layer.scale, largest))
    mass, bound, moved, size = (np.concatenate(column) for column in zip(*parts, strict=True))
    return LocalError(mass, bound, moved, size)


def _block(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, kept: np.ndarray, rows: np.ndarray, scale: float, largest: np.ndarray
) -> tuple[np.ndarray, ...]:
    """``(m, bound, moved, size)``, each ``[R]``, of the queries ``q [R, D]`` at ascending positions ``rows [R]``."""
    end = int(rows[-1]) + 1
    k, v, kept = k[:end], v[:end], kept[:end]
    scores = (q @ k.T) * np.float32(scale)
    scores[np.arange(end)[None, :] > rows[:, None]] = -np.inf
    full = _softmax(scores)
    mass = full[:, ~kept].sum(-1, dtype=np.float64)
    output = full @ v
    sparse = _softmax(scores[:, kept]) @ v[kept]
    return mass, 2 * mass * largest[rows], np.linalg.norm(sparse - output, axis=-1), np.linalg.norm(output, axis=-1)


def _softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def summarize(errors: Mapping[int, LocalError], kept: Mapping[int, float]) -> list[dict[str, object]]:
    """By layer: kept fraction, quantiles (median, 90%, 99%, largest) of m, bound, movement and movement over |o|."""
    rows: list[dict[str, object]] = []
    for layer, e in sorted(errors.items()):
        relative = e.moved / np.maximum(e.size, np.finfo(np.float32).tiny)
        row: dict[str, object] = {"layer": layer, "kept": kept[layer], "queries": len(e.mass)}
        for name, values in (("mass", e.mass), ("bound", e.bound), ("moved", e.moved), ("relative", relative)):
            row[name] = [float(x) for x in np.quantile(values, QUANTILES)]
        rows.append(row)
    return rows

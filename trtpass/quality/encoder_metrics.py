"""Numbers that compare an encoder that carries fewer tokens with the same encoder unchanged; all in float64."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

HALF = 0.5  # a heat map of 0 to 1 says "yes" from here on


def correlation(left: np.ndarray, right: np.ndarray) -> float:
    """Pearson correlation of two arrays of one shape; 0 where one is constant and the other is not, 1 where they are
    equal."""
    a, b = left.ravel().astype(np.float64), right.ravel().astype(np.float64)
    if np.array_equal(a, b):
        return 1.0
    a, b = a - a.mean(), b - b.mean()
    spread = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / spread if spread > 0 else 0.0


def iou(left: np.ndarray, right: np.ndarray, at: float = HALF) -> float:
    """Intersection over union of where two arrays are at least ``at``; 1 where neither is anywhere."""
    a, b = left >= at, right >= at
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0


def words(text: str) -> list[str]:
    """Words in lower case, without punctuation; an apostrophe is part of one."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower().replace("’", "'"))


def edit_distance(left: Sequence[str], right: Sequence[str]) -> int:
    """Fewest insertions, deletions and substitutions that turn ``left`` into ``right`` (Levenshtein)."""
    row = list(range(len(right) + 1))
    for i, mine in enumerate(left, 1):
        above, row[0] = row[0], i
        for j, other in enumerate(right, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (mine != other))
    return row[-1]


def word_difference(reference: str, said: str) -> float:
    """Edits of words per word of the reference; above 1 where ``said`` goes on and on. An empty reference: 0 or 1."""
    expected, got = words(reference), words(said)
    return edit_distance(expected, got) / len(expected) if expected else float(bool(got))


def kept_fraction(width: int, after: Mapping[int, int], layers: int) -> float:
    """Tokens carried, mean over the blocks, as a share of the ``width`` that the stream has without a reduction.

    Args:
        after: tokens after the site of each layer that has one; a block counts with what leaves its attention.
    """
    carried, now = [], width
    for layer in range(layers):
        now = after.get(layer, now)
        carried.append(now)
    return float(np.mean(carried)) / width

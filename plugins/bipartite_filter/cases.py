"""Cases of BipartiteFilter: sizes, protected tokens, no candidates, vectors without a direction, both floats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from plugins._cases import int32, normal
from trtpass.op import Case


def _case(
    name: str,
    lengths: Sequence[int],
    width: int = 16,
    protected: float = 0.0,
    tokens: int | None = None,
    dtype: str = "float32",
    poison: Sequence[float] = (),
) -> Case:
    """``protected`` is the share of protected tokens, of which the first is one unless it is 0; a sixth of the vectors
    is zero or holds one of ``poison`` where there is any."""
    size = tokens or max(lengths)

    def make(seed: int) -> Sequence[Any]:
        rng = np.random.default_rng(seed)
        metric = normal(seed, len(lengths), size, width) * np.exp(rng.standard_normal((len(lengths), size, 1)))
        marked = rng.random(metric.shape[:2]) < protected
        marked[:, 0] |= protected > 0
        for at in np.argwhere(rng.random(metric.shape[:2]) < (1 / 6 if poison else 0)):
            value = rng.choice([0.0, *poison])
            metric[*at] = value if abs(value) < 1e-19 else np.where(np.arange(width) == 0, value, metric[*at])
        for row, length in zip(metric, lengths, strict=True):
            row[max(length, 0) :] = np.nan  # padding may hold anything
        some = rng.choice(int32([1, -1, 2**31 - 1]), marked.shape)
        return metric.astype(dtype), np.where(marked, some, 0).astype(np.int32), int32(lengths)

    return Case(name, make)


CASES = [
    *(_case(f"{n}-tokens", [n], e) for n, e in ((1, 7), (2, 7), (3, 16), (63, 7), (127, 33), (128, 64), (129, 96))),
    _case("1000-tokens", [1000], 8, protected=0.1),
    *(_case(f"{n}-tokens-protected", [n], protected=0.1) for n in (2, 63, 129)),
    _case("batch", [50, 49, 7], protected=0.2),
    _case("ragged", [65, 2, 1, 0], protected=0.1),
    _case("padding", [30, 5, 17], tokens=40),
    _case("lengths-out-of-range", [90, -3, 40], tokens=40),
    _case("everything-protected", [33, 8], protected=1.0),
    _case("one-wide", [40, 9], 1),
    _case("without-direction", [100, 40, 3], 33, poison=(np.nan, np.inf, -np.inf, 1e-22)),
    _case("tiny-vectors", [30], 7, poison=(1e-25,), tokens=31),
    _case("float16", [129, 40, 3], 33, protected=0.1, dtype="float16"),
    _case("float16-without-direction", [100, 7], 7, poison=(np.nan, np.inf), dtype="float16"),
]

"""Cases of SegmentMean: sizes, capacity, empty segments, labels that are none, values that are not finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from plugins._cases import normal
from trtpass.op import Case


def _case(
    name: str,
    tokens: int,
    segments: int,
    width: int,
    batch: int = 1,
    lowest: int = 0,
    dtype: str = "float32",
    poison: Sequence[float] = (),
    slow: bool = False,
    **attrs: Any,
) -> Case:
    """Labels are drawn from [lowest, segments); tokens with a label below 0 hold NaN, a few others hold ``poison``."""

    def make(seed: int) -> Sequence[Any]:
        rng = np.random.default_rng(seed)
        x = normal(seed, batch, tokens, width, dtype=dtype)
        label = rng.integers(lowest, segments, (batch, tokens)).astype(np.int32)
        for value in poison:
            x[rng.integers(batch), rng.integers(tokens), rng.integers(width)] = value
        x[label < 0] = np.nan
        return x, label

    return Case(name, make, attrs, slow)


CASES = [
    *(_case(f"{n}-tokens", n, max(1, n // 4), e) for n, e in ((1, 1), (63, 7), (127, 33), (128, 64), (129, 33))),
    _case("1000-tokens", 1000, 300, 64, slow=True),
    _case("1000-tokens-one-segment", 1000, 1, 33),
    _case("one-wide", 40, 10, 1),
    _case("one-segment-each", 63, 63, 7),
    _case("batch", 50, 20, 7, batch=3),
    _case("half-capacity", 63, 32, 7, batch=3, max_segments_permille=500),
    _case("labels-above-capacity", 128, 128, 33, max_segments_permille=250),
    _case("capacity-1", 129, 3, 7, max_segments_permille=1),
    _case("labels-below-0", 100, 20, 7, batch=3, lowest=-10),
    _case("labels-far-away", 100, 2**31 - 1, 7, lowest=-(2**31)),
    _case("no-labels", 40, 0, 7, lowest=-3),
    _case("float16", 129, 40, 33, batch=3, lowest=-5, dtype="float16"),
    _case("float16-one-segment", 1000, 1, 7, dtype="float16"),
    _case("not-finite", 100, 20, 7, batch=3, lowest=-5, poison=(np.nan, np.inf, np.inf, -np.inf)),
    _case("not-finite-float16", 63, 20, 33, poison=(np.nan, np.inf, -np.inf), dtype="float16"),
]

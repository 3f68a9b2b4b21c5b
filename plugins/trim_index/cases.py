"""Cases of TrimIndex: counts within and beyond the list, none at all, and all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trtpass.op import Case


def _case(name: str, places: int, counts: Sequence[int]) -> Case:
    def make(seed: int) -> Sequence[Any]:
        index = np.random.default_rng(seed).integers(0, max(places, 1), (len(counts), places))
        return index.astype(np.int32), np.array(counts, np.int32)

    return Case(name, make)


CASES = [
    *(_case(f"{n}-places", n, [n // 2]) for n in (1, 2, 63, 127, 128, 129, 1000)),
    _case("ragged", 70, [70, 3, 0]),
    _case("all", 33, [33, 33]),
    _case("none", 33, [0, 0]),
    _case("out-of-range", 33, [-5, 12, 2**31 - 1]),
]

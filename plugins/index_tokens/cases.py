"""Cases of IndexTokens: as many kept as there is room for, fewer, more; ragged rows; any number that is not 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from plugins._budget import kept
from plugins._cases import int32
from trtpass.op import Case


def _case(name: str, lengths: Sequence[int], tokens: int | None = None, share: float = -1, **attrs: int) -> Case:
    """``share`` of all places is kept; by default each row keeps just as many valid tokens as KeepTokens would."""
    size = tokens or max(lengths)

    def make(seed: int) -> Sequence[Any]:
        rng = np.random.default_rng(seed)
        keep = (rng.random((len(lengths), size)) < share).astype(np.int32)
        for row, length in zip(keep, np.clip(lengths, 0, size), strict=True):
            if share < 0:
                row[rng.permutation(length)[: kept(int(length), **attrs)]] = 1
            row[length:] = rng.integers(2)  # padding may hold anything
        return keep * rng.choice(int32([1, -1, 7, -(2**31), 2**31 - 1]), keep.shape), int32(lengths)

    return Case(name, make, attrs)


CASES = [
    *(_case(f"{n}-tokens", [n], permille=500) for n in (1, 63, 127, 128, 129, 1000)),
    *(_case(f"rounding-{r}", [50, 49, 48], permille=333, rounding=r) for r in (0, 500)),
    _case("nothing-dropped", [40, 13, 1]),
    _case("drop", [50, 31, 9], drop=8),
    _case("drop-everything", [20, 7], drop=20),
    _case("nothing-kept", [20, 7], permille=0, rounding=0),
    _case("fixed", [50, 6, 4, 1], fixed=5, permille=250),
    _case("fixed-drop", [50, 20, 4], fixed=3, permille=500, rounding=500, drop=2),
    _case("padding", [30, 20, 0], tokens=64, permille=400),
    _case("lengths-out-of-range", [90, -3, 40], tokens=40, permille=500),
    _case("more-kept-than-room", [65, 64, 20], share=0.8, permille=400),
    _case("fewer-kept-than-room", [65, 64, 20], share=0.2, permille=600),
    _case("all-wanted", [33, 20], share=1.0, permille=300),
    _case("none-wanted", [33, 20], share=0.0, permille=300),
    _case("any-length", [90, 70, 50], share=0.5),
]

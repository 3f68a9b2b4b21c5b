"""Cases of CompactSlots: shares kept, rows of different lengths, owners that hold something already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from plugins._cases import int32
from trtpass.op import Case


def _case(name: str, tokens: int, lengths: Sequence[int], owners: int = 2, share: float = 0.5, most: int = 0) -> Case:
    """``share`` of all tokens is kept, by any number but 0; owners hold up to ``most`` slots before."""

    def make(seed: int) -> Sequence[Any]:
        rng = np.random.default_rng(seed)
        shape = (len(lengths), owners, tokens)
        keep = np.where(rng.random(shape) < share, rng.choice([1, -1, 7, -(2**31), 2**31 - 1], shape), 0)
        return keep.astype(np.int32), rng.integers(0, most + 1, shape[:2]).astype(np.int32), int32(lengths)

    return Case(name, make)


CASES = [
    *(_case(f"{n}-tokens", n, [n]) for n in (1, 63, 127, 128, 129)),
    _case("1000-tokens", 1000, [1000], owners=3, share=0.1),
    _case("5000-tokens", 5000, [5000, 4097], owners=1),
    _case("20000-tokens", 20000, [20000, 16385], owners=1),  # more than one block of the kernel
    _case("everything", 65, [65], share=1.0),
    _case("nothing", 65, [65], share=0.0, most=9),
    _case("ragged", 130, [130, 1, 64], owners=3, most=1000),
    _case("empty-row", 40, [0, 40, 7], most=5),
    _case("lengths-out-of-range", 40, [-3, 50, 40], most=5),
    _case("one-owner", 33, [20], owners=1, most=100),
]

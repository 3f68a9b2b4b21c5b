"""Cases of WritePages: compaction and decode, page sizes, slots and pages that are none, rows of anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from plugins._cases import normal
from trtpass.op import Case


def _case(
    name: str,
    tokens: int,
    batch: int = 1,
    owners: int = 2,
    page_size: int = 16,
    width: int = 16,
    kept: float = 0.5,
    held: int = 3,
    lost: bool = False,
    dtype: str = "float32",
    slow: bool = False,
) -> Case:
    """A share ``kept`` of the tokens goes behind ``held`` slots, others hold NaN; ``lost``: wild slots and pages."""

    def make(seed: int) -> Sequence[Any]:
        rng = np.random.default_rng(seed)
        keep = rng.random((batch, owners, tokens)) < kept
        slot = np.where(keep, held + keep.cumsum(-1) - keep, -1)
        entries = -(-(held + tokens) // page_size)
        pool = batch * owners * entries + 2  # two pages belong to nobody
        table = rng.permutation(pool)[: batch * owners * entries].reshape(batch, owners, entries)
        new = normal(seed, batch, owners, tokens, width, dtype=dtype)
        new[~keep] = np.nan
        if lost:
            wild = rng.random(slot.shape) < 0.3
            slot = np.where(wild, rng.choice([-(2**31), -7, 2**31 - 1, entries * page_size], slot.shape), slot)
            table = np.where(rng.random(table.shape) < 0.3, rng.choice([-1, pool, 2**31 - 1], table.shape), table)
        pages = normal(seed + 1, pool, page_size, width, dtype=dtype)
        return pages, new, slot.astype(np.int32), table.astype(np.int32)

    return Case(name, make, {}, slow)


def _nothing(seed: int) -> Sequence[Any]:
    """A pool without pages, and tables without entries."""
    new = normal(seed, 2, 1, 5, 8)
    return np.zeros((0, 4, 8), np.float32), new, np.zeros((2, 1, 5), np.int32), np.zeros((2, 1, 0), np.int32)


CASES = [
    *(_case(f"compaction-{n}", n) for n in (1, 63, 127, 128, 129)),
    _case("compaction-1000", 1000, owners=3, kept=0.25, slow=True),
    _case("everything", 65, kept=1.0, held=0),
    _case("nothing-kept", 65, kept=0.0),
    _case("batch", 40, batch=3, owners=3),
    _case("decode", 1, batch=3, owners=3, kept=1.0, held=37),
    *(_case(f"pages-of-{z}", 50, batch=2, page_size=z) for z in (1, 24, 128)),
    _case("odd-width", 40, width=5),
    _case("width-64", 70, width=64, batch=2),
    _case("lost", 100, batch=3, owners=2, lost=True),
    Case("no-pages", _nothing),
    _case("float16", 90, batch=2, owners=3, dtype="float16"),
    _case("float16-lost", 90, batch=2, width=24, lost=True, dtype="float16"),
]

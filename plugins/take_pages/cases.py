"""Cases of TakePages: owners that need all, some and no pages, lists that are too short or hold none, page sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from plugins._cases import int32
from trtpass.op import Case


def _case(
    name: str,
    tokens: int,
    batch: int = 1,
    owners: int = 2,
    page_size: int = 16,
    share: float = 1.0,
    free: int | None = None,
    holes: float = 0.0,
    wild: bool = False,
) -> Case:
    """Owners keep up to a ``share`` of the tokens; ``free`` pages (None: enough), of which ``holes`` are negative.

    ``wild``: what is kept may be any number.
    """

    def make(seed: int) -> Sequence[Any]:
        rng = np.random.default_rng(seed)
        kept = rng.integers(0, int(tokens * share) + 1, (batch, owners))
        if wild:
            far = [-(2**31), -1, 0, tokens + 1, 2**31 - 1]
            kept = np.where(rng.random(kept.shape) < 0.5, rng.choice(far, kept.shape), kept)
        count = batch * owners * -(-tokens // page_size) + 3 if free is None else free
        pages = rng.permutation(2 * count)[:count]
        pages = np.where(rng.random(count) < holes, rng.choice([-1, -7, -(2**31)], count), pages)
        slot = rng.integers(-1, tokens, (batch, owners, tokens))  # its values are not read
        return kept.astype(np.int32), pages.astype(np.int32), slot.astype(np.int32)

    return Case(name, make, {"page_size": page_size})


def _full(seed: int) -> Sequence[Any]:
    """Every owner needs all of its entries, and the pages come in an order of their own."""
    return np.full((2, 3), 100, np.int32), int32([41, *range(40, 5, -1), 3, 2, 0]), np.zeros((2, 3, 100), np.int32)


CASES = [
    *(_case(f"{n}-tokens", n) for n in (1, 63, 127, 128, 129)),
    _case("1000-tokens", 1000, owners=3, share=0.4),
    *(_case(f"pages-of-{z}", 130, batch=2, page_size=z) for z in (1, 24, 64, 2**31 - 1)),
    Case("all-entries", _full, {"page_size": 16}),
    _case("batch", 70, batch=3, owners=3),
    _case("nothing-kept", 70, share=0.0),
    _case("too-few", 100, batch=3, owners=2, free=9),
    _case("no-pages", 40, free=0),
    _case("holes", 100, batch=2, owners=3, holes=0.4),
    _case("wild", 100, batch=3, owners=3, holes=0.2, free=20, wild=True),
]

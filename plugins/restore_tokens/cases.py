"""Cases of RestoreTokens: merged and pruned tokens, grids and lines, class tokens, rows without any source, NaN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from plugins._cases import normal
from trtpass.op import Case


def _case(
    name: str,
    tokens: int,
    rows: int,
    wide: int = 7,
    batch: int = 1,
    pruned: float = 0.4,
    fixed: int = 0,
    width: int = 0,
    dtype: str = "float32",
    poison: bool = False,
    wild: bool = False,
) -> Case:
    """A share ``pruned`` of the originals has no owner; ``poison``: one row of each batch row is NaN."""

    def make(seed: int) -> Sequence[Any]:
        rng = np.random.default_rng(seed)
        x = normal(seed, batch, rows, wide, dtype=dtype)
        owner = rng.integers(0, max(rows, 1), (batch, tokens))
        none = rng.choice([-1, -(2**31), rows, 2**31 - 1] if wild else [-1], owner.shape)
        owner = np.where(rng.random(owner.shape) < (pruned if rows else 1.0), none, owner)
        if poison:
            x[:, rng.integers(rows)] = np.nan
        return x, owner.astype(np.int32)

    return Case(name, make, {"fixed": fixed, "width": width})


CASES = [
    *(_case(f"{n}-tokens", n, (n + 1) // 2) for n in (1, 2, 63, 127, 128, 129)),
    _case("1000-tokens", 1000, 300, wide=16, fixed=1, width=37),
    _case("nothing-pruned", 65, 20, pruned=0.0, fixed=1, width=8),
    _case("everything-pruned", 65, 20, pruned=1.0, batch=3),
    _case("few-left", 145, 30, pruned=0.97, batch=3, fixed=1, width=12),
    _case("line", 100, 40, pruned=0.8, batch=3),
    _case("one-column", 60, 20, pruned=0.8, width=1),
    _case("wider-than-the-line", 60, 20, pruned=0.8, width=1000, fixed=2),
    _case("ragged-last-row", 61, 20, pruned=0.8, width=9, fixed=3),
    _case("all-fixed", 20, 9, batch=3, fixed=30, width=4),
    _case("none-to-restore", 30, 0, batch=2, fixed=1),
    _case("outside", 100, 40, batch=3, fixed=1, width=10, wild=True),
    _case("not-finite", 100, 20, batch=3, fixed=1, width=10, poison=True),
    _case("float16", 129, 40, wide=33, batch=3, fixed=1, width=16, dtype="float16"),
]

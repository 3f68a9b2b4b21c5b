"""Cases of GatherTokens: sizes, repeated rows, an index that names none, values that are not finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from plugins._cases import normal
from trtpass.op import Case


def _case(
    name: str,
    tokens: int,
    taken: int,
    width: int = 7,
    batch: int = 1,
    span: tuple[int, int] | None = None,
    dtype: str = "float32",
    poison: bool = False,
) -> Case:
    """``taken`` rows drawn from ``span``, by default [0, S); half of the batch rows have them in ascending order."""

    def make(seed: int) -> Sequence[Any]:
        rng = np.random.default_rng(seed)
        x = normal(seed, batch, tokens, width, dtype=dtype)
        index = rng.integers(*(span or (0, tokens)), (batch, taken)).astype(np.int32)
        index[::2].sort(axis=1)
        if poison:
            x[rng.random(x.shape) < 0.1] = np.nan
            x[rng.random(x.shape) < 0.1] = -np.inf
        return x, index

    return Case(name, make)


CASES = [
    *(_case(f"{n}-tokens", n, (n + 1) // 2, e) for n, e in ((1, 1), (63, 7), (127, 33), (128, 64), (129, 16))),
    _case("1000-tokens", 1000, 400, 5, batch=2),
    _case("more-than-there-are", 5, 40, batch=2),
    _case("batch", 50, 20, batch=3),
    _case("none", 20, 0, batch=2),
    _case("outside", 40, 30, batch=3, span=(-20, 60)),
    _case("padding", 40, 9, batch=2, span=(40, 41)),
    _case("far-away", 40, 30, span=(-(2**31), 2**31 - 1)),
    _case("float16", 129, 65, 33, batch=3, span=(-3, 133), dtype="float16"),
    _case("not-finite", 63, 40, batch=3, span=(-3, 66), poison=True),
    _case("not-finite-float16", 63, 40, batch=3, span=(-3, 66), poison=True, dtype="float16"),
]

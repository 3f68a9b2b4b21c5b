"""Cases of EncoderAttention: odd lengths, sizes as biases, hidden keys, grouped heads, odd widths, both floats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from plugins._cases import normal
from trtpass.op import Case


def _case(
    name: str,
    tokens: int,
    heads: tuple[int, int] = (2, 2),
    width: tuple[int, int] = (16, 16),
    batch: int = 1,
    dtype: str = "float32",
    hidden: int = 0,
    slow: bool = False,
    **attrs: Any,
) -> Case:
    """Biases are logarithms of sizes from 1 to 8, and -1e30 for the last ``hidden`` keys."""

    def make(seed: int) -> Sequence[Any]:
        q = normal(seed, batch, heads[0], tokens, width[0], scale=1.0, dtype=dtype)
        k = normal(seed + 1, batch, heads[1], tokens, width[0], scale=1.0, dtype=dtype)
        bias = np.log(np.random.default_rng(seed + 3).integers(1, 9, (batch, tokens))).astype(np.float32)
        bias[:, tokens - hidden :] = -1e30
        return q, k, normal(seed + 2, batch, heads[1], tokens, width[1], scale=1.0, dtype=dtype), bias

    return Case(name, make, attrs, slow)


CASES = [
    *(_case(f"{n}-tokens", n) for n in (1, 63, 127, 128, 129, 385)),
    _case("1000-tokens", 1000, heads=(3, 1), width=(64, 64), slow=True),
    _case("groups", 40, heads=(6, 2)),
    _case("batch", 33, heads=(6, 2), batch=3),
    _case("hidden", 50, batch=2, hidden=17),
    _case("odd-widths", 50, heads=(2, 1), width=(5, 7)),
    _case("wide", 100, heads=(2, 1), width=(128, 80)),
    _case("own-scale", 40, scale=0.7),
    _case("float16", 65, heads=(6, 2), dtype="float16"),
    _case("float16-hidden", 130, width=(72, 64), dtype="float16", hidden=9),
]

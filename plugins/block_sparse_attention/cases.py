"""Cases of BlockSparseAttention: block sizes, everything and the diagonal alone, lists that are short or wild."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from plugins._cases import normal
from trtpass.op import Case


def _case(
    name: str,
    tokens: int,
    block: int = 16,
    heads: tuple[int, int] = (2, 2),
    width: tuple[int, int] = (16, 16),
    batch: int = 1,
    share: float = 0.5,
    diagonal: bool = True,
    wild: bool = False,
    below: int = 0,
    capacity: int = 0,
    dtype: str = "float32",
    slow: bool = False,
    **attrs: Any,
) -> Case:
    """A share of the blocks below the diagonal, with it or without; ``wild`` adds blocks above it and out of range.

    ``below`` numbers out of range come before all of them.
    """

    def make(seed: int) -> Sequence[Any]:
        rng = np.random.default_rng(seed)
        q = normal(seed, batch, heads[0], tokens, width[0], scale=1.0, dtype=dtype)
        k = normal(seed + 1, batch, heads[1], tokens, width[0], scale=1.0, dtype=dtype)
        v = normal(seed + 2, batch, heads[1], tokens, width[1], scale=1.0, dtype=dtype)
        rows = -(-tokens // block)
        slots = capacity or rows
        blocks = rng.integers(-(2**31), 2**31 - 1, (batch, heads[0], rows, slots)).astype(np.int32)
        count = np.zeros((batch, heads[0], rows), np.int32)
        for place in np.ndindex(*count.shape):
            i = place[-1]
            chosen = [j for j in range(i) if rng.random() < share] + [i] * diagonal
            if wild:
                chosen = sorted({-5, *chosen, *(j for j in range(i + 1, rows) if rng.random() < 0.5), rows, 2**31 - 1})
            chosen = [*range(-below, 0), *chosen][-slots:]
            blocks[place][: len(chosen)] = chosen
            count[place] = len(chosen)
        return q, k, v, blocks, count

    return Case(name, make, {"block": block, **attrs}, slow)


CASES = [
    *(_case(f"{n}-tokens", n) for n in (1, 63, 127, 128, 129)),
    _case("1000-tokens", 1000, block=128, heads=(2, 1), width=(64, 64), slow=True),
    _case("default-block", 200, block=128),
    _case("everything", 100, block=32, share=1.0),
    _case("diagonal", 100, block=32, share=0.0),
    _case("nothing", 70, share=0.0, diagonal=False),
    _case("without-diagonal", 130, block=32, diagonal=False),  # the first block sees nothing
    _case("wild", 150, wild=True, capacity=16),
    _case("short-lists", 150, capacity=2),
    _case("long-lists", 100, below=200, capacity=220),
    _case("groups", 80, heads=(6, 2), batch=3),
    _case("odd-widths", 50, heads=(2, 1), width=(5, 7)),
    _case("own-scale", 80, scale=0.7),
    _case("float16", 129, block=64, heads=(6, 2), batch=2, dtype="float16"),
    _case("float16-wild", 150, block=32, wild=True, capacity=12, width=(64, 64), dtype="float16"),
    _case("float16-wide", 300, block=128, heads=(2, 1), width=(64, 64), dtype="float16"),
    _case("float16-wide-wild", 200, block=64, wild=True, capacity=9, width=(64, 128), dtype="float16"),
    _case("float16-wide-short", 700, block=128, heads=(2, 1), capacity=3, width=(128, 64), dtype="float16"),
    _case("float16-wide-everything", 290, block=128, share=1.0, width=(64, 64), dtype="float16"),
]

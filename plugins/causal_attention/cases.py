"""Cases of CausalAttention: odd lengths, grouped heads, odd widths, a scale of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from plugins._cases import normal
from trtpass.op import Case


def _case(
    name: str,
    tokens: int,
    heads: tuple[int, int] = (2, 2),
    width: tuple[int, int] = (16, 16),
    batch: int = 1,
    dtype: str = "float32",
    slow: bool = False,
    **attrs: Any,
) -> Case:
    def make(seed: int) -> Sequence[Any]:
        q = normal(seed, batch, heads[0], tokens, width[0], scale=1.0, dtype=dtype)
        k = normal(seed + 1, batch, heads[1], tokens, width[0], scale=1.0, dtype=dtype)
        return q, k, normal(seed + 2, batch, heads[1], tokens, width[1], scale=1.0, dtype=dtype)

    return Case(name, make, attrs, slow)


CASES = [
    *(_case(f"{n}-tokens", n) for n in (1, 63, 127, 128, 129)),
    _case("1000-tokens", 1000, heads=(3, 1), width=(64, 64), slow=True),
    _case("groups", 40, heads=(6, 2)),
    _case("batch", 33, heads=(6, 2), batch=3),
    _case("odd-widths", 50, heads=(2, 1), width=(5, 7)),
    _case("wide", 100, heads=(2, 1), width=(128, 80)),
    _case("own-scale", 40, scale=0.7),
    _case("float16", 65, heads=(6, 2), dtype="float16"),
    _case("float16-wide", 130, heads=(2, 2), width=(72, 64), dtype="float16"),
]

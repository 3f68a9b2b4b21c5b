"""Cases of ColumnMass: sizes around the window and around powers of two, ragged batches, groups, both floats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from plugins._cases import int32, normal
from trtpass.op import Case


def _case(
    name: str,
    lengths: Sequence[int],
    tokens: int | None = None,
    heads: tuple[int, int] = (2, 2),
    dtype: str = "float32",
    spread: float = 1.5,
    slow: bool = False,
    **attrs: Any,
) -> Case:
    size = tokens or max(lengths)

    def make(seed: int) -> Sequence[Any]:
        q = normal(seed, len(lengths), heads[0], size, 16, scale=spread, dtype=dtype)
        k = normal(seed + 1, len(lengths), heads[1], size, 16, scale=spread, dtype=dtype)
        return q, k, int32(lengths)

    return Case(name, make, attrs, slow)


CASES = [
    *(_case(f"{n}-tokens", [n]) for n in (1, 63, 127, 128, 129)),
    *(_case(f"{n}-tokens-prefix", [n], prefix=1) for n in (1, 127, 128, 129)),
    *(_case(f"window-{d:+d}", [16 + d], window=16, pool=3, prefix=p) for d, p in ((-1, 0), (0, 1), (1, 1))),
    _case("1000-tokens", [1000], heads=(6, 2), prefix=1, slow=True),
    _case("ragged-batch", [40, 7, 1], window=8, heads=(6, 2)),
    _case("ragged-batch-prefix", [40, 7, 33], window=8, heads=(6, 2), prefix=1),
    _case("padding-only-tail", [5, 9], tokens=50, window=4),
    _case("float16", [65, 20], window=16, heads=(6, 2), dtype="float16", prefix=1),
    _case("no-pooling", [50], window=8, pool=1),
    _case("pool-wider-than-row", [5], window=2, pool=15),
    _case("last-row-only", [50], window=1, pool=1),
    _case("own-scale", [50], window=8, scale=0.5),
    _case("scores-far-apart", [64], window=8, spread=6.0),
    _case("window-of-tiles", [300, 150], window=200, pool=5),
    _case("2100-tokens", [2100], window=16, heads=(1, 1), prefix=1),
    # Three in a row, so that each tactic of a kernel is tried in float16, which has tiles of its own.
    _case("float16-tiles", [300, 150], window=200, pool=5, heads=(2, 1), dtype="float16"),
    _case("float16-prefix", [300, 90], window=100, pool=9, heads=(4, 2), dtype="float16", prefix=1),
    _case("float16-many-keys", [700], window=40, pool=1, heads=(3, 1), dtype="float16"),
]

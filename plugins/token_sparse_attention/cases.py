"""Cases of TokenSparseAttention: a set for each head or for each group, ragged counts, all and nothing selected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from plugins._cases import normal, selection
from trtpass.op import Case


def _case(
    name: str,
    tokens: int,
    counts: Sequence[Sequence[int]],
    heads: tuple[int, int] = (2, 2),
    capacity: int | None = None,
    width: tuple[int, int] = (16, 16),
    dtype: str = "float32",
    slow: bool = False,
    **attrs: Any,
) -> Case:
    """``counts`` is `[B][N]`: its inner length says whether sets belong to query heads or to groups."""

    def make(seed: int) -> Sequence[Any]:
        batch = len(counts)
        q = normal(seed, batch, heads[0], tokens, width[0], scale=1.0, dtype=dtype)
        k = normal(seed + 1, batch, heads[1], tokens, width[0], scale=1.0, dtype=dtype)
        v = normal(seed + 2, batch, heads[1], tokens, width[1], scale=1.0, dtype=dtype)
        return q, k, v, *selection(seed + 3, tokens, capacity or tokens, counts)

    return Case(name, make, attrs, slow)


CASES = [
    *(_case(f"{n}-tokens", n, [[(n + 1) // 2] * 2], capacity=(n + 1) // 2) for n in (1, 63, 127, 128, 129)),
    _case("1000-tokens", 1000, [[500] * 6], heads=(6, 2), slow=True),
    _case("set-for-each-head", 40, [[20, 13, 40, 1, 7, 30]], heads=(6, 2)),
    _case("set-for-each-group", 40, [[20, 13]], heads=(6, 2)),
    _case("one-key-head", 40, [[20]], heads=(3, 1)),
    _case("ragged-batch", 40, [[20] * 6, [3] * 6, [40] * 6], heads=(6, 2)),
    _case("ragged-batch-groups", 40, [[20, 20], [3, 5], [40, 40]], heads=(6, 2)),
    _case("capacity-above-count", 40, [[9] * 2], capacity=25),
    _case("everything", 40, [[40] * 6] * 2, heads=(6, 2)),
    _case("everything-groups", 40, [[40] * 2] * 2, heads=(6, 2)),
    _case("nothing", 40, [[0, 0]]),
    _case("nothing-in-one-head", 40, [[0, 11]]),
    _case("value-width", 40, [[20, 13]], heads=(4, 2), width=(16, 24)),
    _case("own-scale", 40, [[20, 13]], scale=0.7),
    _case("own-scale-everything", 40, [[40, 40]], scale=0.7),
    _case("float16", 65, [[30] * 6, [65] * 6], heads=(6, 2), dtype="float16"),
    _case("float16-groups", 65, [[30] * 2], heads=(6, 2), dtype="float16"),
    _case(
        "float16-long-gaps",
        150,
        [[64, 65, 1, 0, 128, 150], [150, 2, 63, 127, 129, 32]],
        heads=(6, 2),
        width=(24, 16),
        dtype="float16",
    ),
    _case("float16-wide", 300, [[290, 65]], heads=(2, 1), width=(64, 72), dtype="float16"),
    _case("float16-everything", 65, [[65] * 6], heads=(6, 2), dtype="float16"),
    _case("float16-wide-groups", 200, [[131]], heads=(2, 1), width=(128, 64), dtype="float16"),
    _case("float16-wide-ragged", 150, [[129, 64], [0, 150]], heads=(2, 1), width=(40, 64), dtype="float16"),
]

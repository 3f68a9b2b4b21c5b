"""Cases of RaggedAttention: prefill, decode and later turns over shuffled pages; all that is not held is poison.

Slots and pages that nobody holds are NaN, as are query rows behind the valid ones; unused table entries are no pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from plugins._cases import Array, int32, normal
from trtpass.op import Case

GARBAGE = (-1, 10**6, -(2**31), 2**31 - 1)


def paged(
    seed: int,
    lengths: Sequence[Sequence[int]],
    page_size: int,
    width: tuple[int, int],
    dtype: str = "float32",
    room: int = 1,
    spare: int = 2,
    shared: bool = False,
) -> tuple[Array, Array, Array, Array]:
    """A pool whose pages are handed out in random order: `[P, Z, D]`, `[P, Z, Dv]`, table `[B, Hkv, M]`, lengths.

    ``room`` is how many entries the table has beyond what the longest owner needs, ``spare`` how many pages are unused.
    ``shared``: all owners begin with the same pages, as many as the shortest of them fills.
    """
    rng = np.random.default_rng(seed)
    held = np.array(lengths, np.int32)
    need = -(-held // page_size)
    prefix = int(held.min()) // page_size if shared else 0
    pages = int((need - prefix).sum()) + prefix + spare
    pools = [np.full((pages, page_size, n), np.nan, dtype) for n in width]
    table = rng.choice(np.array(GARBAGE, np.int32), (*held.shape, int(need.max()) + room))
    order = rng.permutation(pages)
    common, free = order[:prefix], iter(order[prefix:])
    for owner in np.ndindex(*held.shape):
        own = [*common, *(next(free) for _ in range(need[owner] - prefix))]
        table[owner][: len(own)] = own
        for slot in range(held[owner]):
            for pool in pools:
                pool[own[slot // page_size], slot % page_size] = rng.standard_normal(pool.shape[-1])
    return pools[0], pools[1], table, held


def _case(
    name: str,
    lengths: Sequence[Sequence[int]],
    queries: Sequence[int],
    tokens: int | None = None,
    page_size: int = 16,
    group: int = 1,
    width: tuple[int, int] = (16, 16),
    dtype: str = "float32",
    slow: bool = False,
    pool: dict[str, Any] | None = None,
    **attrs: Any,
) -> Case:
    """``lengths`` is `[B][Hkv]`; S is ``tokens``, else the most queries of a row."""

    def make(seed: int) -> Sequence[Any]:
        keys, values, table, held = paged(seed + 1, lengths, page_size, width, dtype, **(pool or {}))
        heads = group * held.shape[1]
        q = normal(seed, len(lengths), heads, tokens or max(queries), width[0], scale=1.0, dtype=dtype)
        for b, asked in enumerate(queries):
            q[b, :, asked:] = np.nan
        return q, keys, values, table, held, int32(queries)

    return Case(name, make, attrs, slow)


def _prefill(tokens: int, **options: Any) -> Case:
    return _case(f"prefill-{tokens}", [[tokens] * 2], [tokens], **options)


NO_PAGES = {"spare": 0, "room": 0}
EDGES = [[0, 1, 15], [16, 17, 64], [63, 33, 2]]  # around pages of 16, and a full table where it has no room

CASES = [
    *(_prefill(n) for n in (1, 63, 127, 128, 129)),
    _case("prefill-1000", [[1000]], [1000], slow=True),
    _case("prefill-batch", [[40, 40], [7, 7], [33, 33]], [40, 7, 33], group=3),
    _case("decode", EDGES, [1, 1, 1], pool={"room": 0}),
    _case("decode-32900", [[32900]], [1], page_size=128, group=2, width=(8, 8), slow=True),  # more than 128 parts
    _case("decode-groups", EDGES, [1, 1, 1], group=3),
    _case("decode-finished", EDGES, [1, 0, 1]),
    _case("decode-all-finished", EDGES, [0, 0, 0], tokens=1),
    *(
        _case(f"decode-pages-of-{z}", [[0, 1], [z - 1, z], [z + 1, 3 * z]], [1] * 3, page_size=z, group=3, width=(8, 8))
        for z in (1, 16, 24, 128)
    ),
    _case("chunk", [[50, 23], [31, 40], [9, 12]], [9, 4, 0], group=3),
    _case("chunk-pages-of-1", [[50, 23], [31, 40]], [9, 4], page_size=1),
    _case("chunk-padded", [[50, 23], [31, 40]], [5, 3], tokens=12),
    _case("chunk-above-held", [[3, 12], [0, 7], [8, 9]], [8, 8, 8], group=3),  # the first queries see nothing
    _case("pages-shared", [[40, 37], [55, 33]], [3, 1], pool={"shared": True}),
    _case("one-key-head", [[40], [21]], [2, 1], group=3),
    _case("value-width", [[40, 21]], [5], group=2, width=(16, 24)),
    _case("odd-width", [[40, 21], [5, 18]], [5, 2], page_size=24, group=3, width=(5, 7)),
    _case("width-24", [[40, 21]], [1], page_size=24, width=(24, 24)),
    _case("own-scale", [[40, 21]], [5], scale=0.7),
    _case("no-pages", [[0, 0]] * 3, [2, 1, 0], group=3, pool=NO_PAGES),
    _case("no-pages-table", [[0, 0]], [2], pool={"spare": 0, "room": 3}),
    _case("no-table", [[0, 0]], [2], pool={"spare": 2, "room": 0}),
    _case("float16-prefill", [[65, 65], [30, 30]], [65, 30], group=3, dtype="float16"),
    _case("float16-decode", EDGES, [1, 1, 0], group=3, dtype="float16"),
    _case("float16-chunk", [[150, 23], [131, 4]], [9, 6], group=3, page_size=24, width=(24, 16), dtype="float16"),
    _case("float16-own-scale", [[40, 21]], [5], dtype="float16", scale=0.4),
    _case("float16-wide-prefill", [[150], [200]], [150, 33], group=2, width=(64, 128), dtype="float16"),
    _case("float16-wide-chunk", [[300, 40], [129, 200]], [5, 3], group=4, width=(64, 64), dtype="float16"),
    _case("float16-wide-turn", [[170, 9], [64, 260]], [90, 64], group=2, width=(128, 64), dtype="float16"),
    _case(
        "float16-decode-long",
        [[700, 1], [256, 257], [0, 513]],
        [1, 1, 1],
        page_size=24,
        group=4,
        width=(64, 64),
        dtype="float16",
    ),
]

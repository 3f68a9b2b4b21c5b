"""Cases of TrackTokens: streams that lose some, all and no tokens, several targets each, owners and targets of none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from plugins._cases import Array, int32
from trtpass.op import Case

FAR = [-(2**31), -7, 10**6, 2**31 - 1]


def stream(rng: np.random.Generator, tokens: int, capacity: int, lengths: Sequence[int]) -> tuple[Array, Array, Array]:
    """slot `[B, S]`, rest `[B, M]` and count `[B]` of random tokens that stay, `capacity` at most."""
    slot = np.full((len(lengths), tokens), -1, np.int32)
    rest = np.full((len(lengths), tokens - capacity), tokens, np.int32)
    count = int32([min(capacity, n) for n in lengths])
    for b, length in enumerate(lengths):
        kept = np.sort(rng.permutation(length)[: count[b]])
        slot[b, kept] = np.arange(len(kept))
        gone = np.setdiff1d(np.arange(length), kept)
        rest[b, : len(gone)] = gone
    return slot, rest, count


def _case(
    name: str,
    tokens: int,
    capacity: int,
    lengths: Sequence[int] | None = None,
    each: int = 1,
    original: int | None = None,
    wild: bool = False,
) -> Case:
    """``each`` targets for a dropped token, some of them none; ``wild``: a part of each input is far outside."""
    rows = lengths or [tokens]

    def make(seed: int) -> Sequence[Any]:
        rng = np.random.default_rng(seed)
        slot, rest, count = stream(rng, tokens, capacity, rows)
        owner = rng.integers(-1, tokens, (len(rows), original or tokens + 9)).astype(np.int32)
        target = rng.integers(-1, capacity + 2, (len(rows), (tokens - capacity) * each)).astype(np.int32)
        if wild:
            for x in (owner, slot, rest, target):
                chosen = rng.random(x.shape) < 0.2
                x[chosen] = rng.choice(FAR, x.shape)[chosen]
        return owner, slot, rest, target, count

    return Case(name, make)


CASES = [
    *(_case(f"{n}-tokens", n, (n + 1) // 2) for n in (1, 2, 63, 127, 128, 129)),
    _case("1000-tokens", 1000, 700, each=2),
    _case("nothing-dropped", 65, 65),
    _case("one-kept", 65, 1, each=3),
    _case("ragged", 64, 40, [64, 50, 1], each=2),
    _case("empty-row", 40, 20, [0, 40, 15]),
    _case("fewer-originals", 129, 60, original=7),
    _case("wild", 100, 60, [100, 70, 30], each=2, wild=True),
]

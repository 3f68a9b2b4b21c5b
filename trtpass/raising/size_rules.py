"""Rules of shape arithmetic on sizes that may be names; see ``trtpass.raising.sizes``."""

from __future__ import annotations

import math

Size = int | str | None
"""A number, the name of a size that is only known when the graph runs (never negative), or unknown."""


def reshaped(x: list[Size] | None, target: tuple[Size, ...], allowzero: int) -> list[Size] | None:
    """The shape after Reshape: 0 copies, -1 is what is left."""
    out: list[Size] = []
    for i, size in enumerate(target):
        if size == 0 and not allowzero:
            if x is None or i >= len(x):
                return None
            size = x[i]
        out.append(size)
    if -1 not in out:
        return out
    at = out.index(-1)
    out[at] = None
    rest = [s for i, s in enumerate(out) if i != at]
    if x is None or None in rest or None in x:
        return out
    left = list(x)
    for size in rest:  # the same name on both sides cancels
        if isinstance(size, str):
            if size not in left:
                return out
            left.remove(size)
    names = [s for s in left if isinstance(s, str)]
    above, below = (math.prod(s for s in side if isinstance(s, int)) for side in (left, rest))
    if below > 0 and above % below == 0 and (not names or (len(names) == 1 and above == below)):
        out[at] = names[0] if names else above // below
    return out


def broadcast(x: list[Size], target: tuple[Size, ...]) -> list[Size]:
    """The shape after Expand: sizes of 1 take the other side's."""
    rank = max(len(x), len(target))
    pairs = zip([1] * (rank - len(x)) + x, [1] * (rank - len(target)) + list(target), strict=True)
    return [b if a == 1 else a if b == 1 or a == b or isinstance(a, int) else None for a, b in pairs]


def sliced(first: tuple[Size, ...], rest: list[tuple[Size, ...]]) -> tuple[Size, ...] | None:
    numbers = [[e for e in part if isinstance(e, int)] for part in rest]
    if any(len(n) != 1 or len(n) != len(p) for n, p in zip(numbers, rest, strict=True)):
        return None
    step = numbers[3][0] if len(numbers) > 3 else 1
    return first[numbers[0][0] : numbers[1][0] : step] if step > 0 else None


def element(op: str, a: Size, b: Size, c: Size = None) -> Size:
    """One element; a name is a number that is not negative."""
    if op == "Where":
        return (b if a else c) if isinstance(a, int) else None
    if op == "Equal":
        if isinstance(a, int) and isinstance(b, int):
            return int(a == b)
        below = any(isinstance(x, int) and x < 0 for x in (a, b))
        return 0 if below and any(isinstance(x, str) for x in (a, b)) else None if a is None or a != b else 1
    if isinstance(a, int) and isinstance(b, int):
        if op == "Div":
            return None if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
        return a + b if op == "Add" else a - b if op == "Sub" else a * b
    neutral = 0 if op in ("Add", "Sub") else 1
    if b == neutral:
        return a
    return b if a == neutral and op in ("Add", "Mul") else None

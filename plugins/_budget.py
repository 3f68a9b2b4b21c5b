"""How many tokens of a row stay: one rule in whole numbers for operators, passes and counts of operations.

``kept(L) = clamp(min(L, fixed) + (max(L - fixed, 0) * permille + rounding) // 1000 - drop, 0, L)``
"""

from __future__ import annotations

from typing import Any

from trtpass.errors import InputError

MOST = 2**20  # of fixed and drop: with fewer than 2^21 tokens everything fits into int32, which bodies compute in


def check_budget(name: str, fixed: int, permille: int, rounding: int, drop: int) -> None:
    """Raises:
    InputError: an attribute of operator ``name`` is out of range.
    """
    limits = {"fixed": (fixed, MOST), "permille": (permille, 1000), "rounding": (rounding, 999), "drop": (drop, MOST)}
    for attribute, (value, most) in limits.items():
        if not 0 <= value <= most:
            raise InputError(f"{name}.{attribute} is {value}", f"0 to {most}")


def kept(length: Any, fixed: int = 0, permille: int = 1000, rounding: int = 999, drop: int = 0) -> Any:
    """Tokens that stay of ``length``: all of the first ``fixed``, a share of the others, ``drop`` fewer.

    Args:
        length: a number of tokens; or a symbol, for which it is assumed that no limit is reached: at least ``fixed``
            tokens, and enough of them to drop ``drop``.
        fixed: tokens that the share does not count, 0 or more.
        permille: share of the others in thousandths, 0 to 1000.
        rounding: 999 rounds that share up, 500 to the nearest (half up), 0 down.
        drop: how many fewer, 0 or more.
    """
    if not isinstance(length, int):
        share = length if permille == 1000 else ((length - fixed) * permille + rounding) // 1000 + fixed
        return share if drop == 0 else share - drop
    length = max(length, 0)
    share = (max(length - fixed, 0) * permille + rounding) // 1000
    return min(max(min(length, fixed) + share - drop, 0), length)

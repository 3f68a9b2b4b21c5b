"""CoverageBudget's two Triton launches.

``mass_share`` reads the mass once: a program owns 128 columns of one row and adds up all their heads, 16 at a time, so
that enough loads are under way. It is bound by memory.

``share_budget``: one program of up to 1024 threads for each row, because every round needs the sum over the whole row,
and a round within one program is far cheaper than a launch. It finds the value at which the lowest columns hold the
target by bisection: first which power of two it is below, 5 rounds, then its digits, which for a long row are few: a
column's share is about 2^30 / S. Rows up to about 50 000 columns stay in the program's first-level cache.
"""

from __future__ import annotations

from types import SimpleNamespace

import triton
import triton.language as tl

from plugins.coverage_budget.steps import MILLION
from trtpass.kernel import Example, Kernel, Launch

HEADS = 16  # of a tile
COLUMNS = 128


@triton.jit
def mass_share(  # type: ignore[no-untyped-def]
    mass,  # [B, H, S]
    lengths,  # [B]
    heads,  # H
    tokens,  # S
    share,  # [B, S]
    WINDOW: tl.constexpr,
    PREFIX: tl.constexpr,
    HEADS: tl.constexpr,  # of a tile
    COLUMNS: tl.constexpr,
):
    block, batch = tl.program_id(0), tl.program_id(1)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    end = tl.minimum(tl.load(lengths + batch), tokens)
    if PREFIX:
        end -= WINDOW
    unit = tl.div_rn(1073741824.0, (heads * WINDOW).to(tl.float32))
    total = tl.zeros([HEADS, COLUMNS], tl.int32)
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)
        row = mass + (batch * heads + head).to(tl.int64)[:, None] * tokens
        x = tl.load(row + column, mask=(head < heads)[:, None] & (column < end), other=0.0)
        x = tl.minimum(tl.maximum(tl.where(x == x, x, 0.0), 0.0), WINDOW)
        # Half to even, by comparisons alone: a difference with the product could be fused into it, unrounded.
        product = x * unit
        whole = product.to(tl.int32)
        half = whole.to(tl.float32) + 0.5  # from 2^23 on every float is even or whole, and the half is lost
        up = (product > half) | ((product == half) & (whole % 2 == 1))
        total += whole + up.to(tl.int32)
    tl.store(share + batch.to(tl.int64) * tokens + column, tl.sum(total, 0), mask=column < tokens)


@triton.jit
def _held(share, end, most, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum of the columns that are at most ``most``, int64."""
    total = tl.zeros([BLOCK], tl.int64)
    for start in range(0, end, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(share + column, mask=column < end, other=0)
        total += tl.where(x <= most, x, 0)
    return tl.sum(total)


@triton.jit
def share_budget(  # type: ignore[no-untyped-def]
    share,  # [B, S]
    lengths,  # [B]
    tokens,  # S
    keep,  # [B]
    COVERAGE: tl.constexpr,  # millionths
    WINDOW: tl.constexpr,
    MIN_TOKENS: tl.constexpr,
    PREFIX: tl.constexpr,
    MILLION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    batch = tl.program_id(0)
    length = tl.load(lengths + batch)
    if length <= MIN_TOKENS + WINDOW:
        tl.store(keep + batch, length)
        return
    share += batch.to(tl.int64) * tokens
    end = tl.minimum(length, tokens)
    if PREFIX:
        end -= WINDOW

    # The target, rounded up, in two parts so that no product passes 2^63.
    total = _held(share, end, 2147483647, BLOCK)
    rest = total % MILLION * COVERAGE
    target = total // MILLION * COVERAGE + (rest + MILLION - 1) // MILLION
    pruned = tl.full([], 0, tl.int64)
    if target > 0:
        # Columns up to `low` hold less than the target, columns up to `high` at least that.
        bits, enough = 0, 31
        below = tl.full([], 0, tl.int64)  # what the columns up to `low` hold
        while bits + 1 < enough:
            middle = (bits + enough) // 2
            held = _held(share, end, (1 << middle) - 1, BLOCK)
            short = held < target
            bits = tl.where(short, middle, bits)
            enough = tl.where(short, enough, middle)
            below = tl.where(short, held, below)
        low = (1 << bits) - 1
        high = low + (1 << bits)
        while low + 1 < high:
            middle = low + (high - low) // 2
            held = _held(share, end, middle, BLOCK)
            short = held < target
            low = tl.where(short, middle, low)
            high = tl.where(short, high, middle)
            below = tl.where(short, held, below)
        lower = tl.zeros([BLOCK], tl.int32)
        for start in range(0, end, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(share + column, mask=column < end, other=2147483647)
            lower += (x <= low).to(tl.int32)
        pruned = tl.sum(lower) + (target - below + high - 1) // high  # and as many columns of `high` as it takes
    kept = length - pruned.to(tl.int32)
    if PREFIX:
        floored = tl.minimum(length, tl.maximum(kept, MIN_TOKENS + WINDOW))
        tl.store(keep + batch, tl.where(pruned <= 1, length, floored))
    else:
        tl.store(keep + batch, tl.maximum(kept, 1))


def _share(d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace) -> Launch:
    constexprs = {"WINDOW": a.window, "PREFIX": a.prefix, "HEADS": HEADS, "COLUMNS": COLUMNS}
    return Launch(((d.S + (COLUMNS - 1)) // COLUMNS, d.B, 1), (d.H, d.S), constexprs)


def _budget(d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace) -> Launch:
    constexprs = {
        "COVERAGE": a.coverage_ppm,
        "WINDOW": a.window,
        "MIN_TOKENS": min(a.min_tokens, 2**31 - 1 - a.window),  # added to the window in int32: no row is longer
        "PREFIX": a.prefix,
        "MILLION": MILLION,
        "BLOCK": tactic.block,
    }
    return Launch((d.B, 1, 1), (d.S,), constexprs, tactic.warps)


def _share_example(tokens: int) -> Example:
    heads = 32
    return Example(
        sizes={"B": 1, "H": heads, "S": tokens},
        flops=2 * heads * tokens,  # a multiplication and an addition
        bytes=4 * heads * tokens + 4 * tokens,
        tensor=False,
        attrs={},
    )


def _budget_example(tokens: int) -> Example:
    return Example(
        sizes={"B": 1, "S": tokens},
        flops=2 * tokens,  # a comparison and an addition, once
        bytes=4 * tokens,
        tensor=False,
        attrs={},
        note="one pass over the shares; to find the value takes about 20",
    )


SHARE = Kernel(
    function=mass_share,
    fixed=(),
    extras=("heads", "tokens"),
    geometry=_share,
    example=_share_example,
)
BUDGET = Kernel(
    function=share_budget,
    fixed=(),
    extras=("tokens",),
    geometry=_budget,
    example=_budget_example,
    tactics=({"block": 8192, "warps": 32}, {"block": 2048, "warps": 8}),
)

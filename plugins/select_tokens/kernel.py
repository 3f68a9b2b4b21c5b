"""SelectTokens as one Triton launch: one program of up to 1024 threads for each set, which needs all of its scores.

The threshold is found by bisection over the floats themselves, in their order as integers: four parts a round, so that
three counts share a read of the row. It ends where a threshold has exactly the tokens wanted above it, which takes
about log4(S) + 4 rounds, or at two neighbouring floats, where ties go to the lowest positions. Rows up to about 50 000
tokens stay in the program's first-level cache. A last pass writes the selected tokens: one running sum numbers both
those above the threshold and those at it.
"""

from __future__ import annotations

from types import SimpleNamespace

import triton
import triton.language as tl

from trtpass.kernel import Example, Kernel, Launch

LARGEST = tl.constexpr(1.7014117331926443e38)  # half of the largest float32: what scores are clipped to
TOP = tl.constexpr(0x7F000000)  # integer behind that of LARGEST in the order of floats; -TOP is that of -LARGEST


@triton.jit
def _float_of(order):  # type: ignore[no-untyped-def]
    """The float whose place among all floats is ``order``: its bits, where they are a positive number."""
    order = order.to(tl.int32)
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def select_tokens(  # type: ignore[no-untyped-def]
    score,  # [B, N, S]
    keep,  # [B]
    lengths,  # [B]
    tokens,  # S
    slots,  # C
    index,  # [B, N, C]
    count,  # [B, N]
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chosen, batch = tl.program_id(0), tl.program_id(1)
    chosen += batch * tl.num_programs(0)
    score += chosen.to(tl.int64) * tokens
    index += chosen.to(tl.int64) * slots
    length = tl.minimum(tl.load(lengths + batch), tokens)
    kept = tl.maximum(tl.minimum(tl.minimum(tl.load(keep + batch), length), slots), 0)
    tl.store(count + chosen, kept)

    # Candidates are all but the protected, which are kept; where not even those fit, the candidates are the protected.
    protected = tl.minimum(length, WINDOW)
    scarce = kept < protected
    begin = tl.where(scarce, length - protected, 0)
    end = tl.where(scarce, length, length - protected)
    need = tl.where(scarce, kept, kept - protected)

    # At least `need` candidates reach `low`, and `sure` of them, no more than that, reach `high`.
    low = tl.full([], -TOP, tl.int64)
    high = tl.full([], TOP, tl.int64)
    sure = need * 0
    while (low + 1 < high) & (sure < need) & (need < end - begin):
        gap = high - low
        first, second = low + (gap + 3) // 4, low + gap // 2  # above low, so that -LARGEST is never tried
        third = second + gap // 4
        reach1, reach2, reach3 = _float_of(first), _float_of(second), _float_of(third)
        count1 = tl.zeros([BLOCK], tl.int32)
        count2 = tl.zeros([BLOCK], tl.int32)
        count3 = tl.zeros([BLOCK], tl.int32)
        for start in range(begin, end, BLOCK):
            position = start + tl.arange(0, BLOCK)
            # NaN reaches nothing, as the lowest score: every threshold that is tried is above -LARGEST, and none is
            # above LARGEST, so that scores need not be clipped.
            x = tl.load(score + position, mask=position < end, other=float("nan"))
            count1 += (x >= reach1).to(tl.int32)
            count2 += (x >= reach2).to(tl.int32)
            count3 += (x >= reach3).to(tl.int32)
        found1, found2, found3 = tl.sum(count1), tl.sum(count2), tl.sum(count3)
        if found2 > need:
            low = tl.where(found3 > need, third, second)
            sure = tl.where(found3 > need, sure, found3)
            high = tl.where(found3 > need, high, third)
        else:
            low = tl.where(found1 > need, first, low)
            sure = tl.where(found1 > need, found2, found1)
            high = tl.where(found1 > need, second, first)

    # Selected before a position: those above the threshold, and of those at it as many as are wanted.
    reach, tie = _float_of(high), _float_of(low)
    wanted = need - sure
    above_before = 0
    ties_before = 0
    for start in range(0, length, BLOCK):
        position = start + tl.arange(0, BLOCK)
        candidate = (position >= begin) & (position < end)
        x = tl.load(score + position, mask=candidate, other=0.0)
        x = tl.minimum(tl.maximum(tl.where(x == x, x, -LARGEST), -LARGEST), LARGEST)
        above = (candidate & (x >= reach)) | ((position >= end) & (position < length))
        equal = candidate & (x >= tie) & (x < reach)
        here = above.to(tl.int32) + (equal.to(tl.int32) << 16)
        before = tl.cumsum(here) - here  # two counts in one: a block has fewer than 2^16 tokens
        ties = ties_before + (before >> 16)
        slot = above_before + (before & 0xFFFF) + tl.minimum(ties, wanted)
        tl.store(index + slot, position, mask=above | (equal & (ties < wanted)))
        found = tl.sum(here)
        above_before += found & 0xFFFF
        ties_before += found >> 16
    for start in range(kept, slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        tl.store(index + slot, tl.full([BLOCK], 0, tl.int32) + tokens, mask=slot < slots)


def _geometry(d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace) -> Launch:
    slots = (d.S * a.max_keep_permille + 999) // 1000
    return Launch((d.N, d.B, 1), (d.S, slots), {"WINDOW": a.window, "BLOCK": tactic.block}, tactic.warps)


def _example(tokens: int) -> Example:
    sets = 32
    return Example(
        sizes={"B": 1, "N": sets, "S": tokens},
        flops=2 * sets * tokens,  # a comparison and an addition, once
        bytes=4 * sets * tokens + 4 * sets * tokens,  # scores; the index, whose capacity is S
        tensor=False,
        attrs={"window": 128},
        note="one pass over the scores; to find the threshold takes about 12",
    )


KERNEL = Kernel(
    function=select_tokens,
    fixed=(),
    extras=("tokens", "slots"),
    geometry=_geometry,
    example=_example,
    tactics=({"block": 8192, "warps": 32}, {"block": 2048, "warps": 8}),
)

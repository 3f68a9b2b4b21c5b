"""Sums of rows by label for Triton kernels, without atomics: tokens are put in the order of their labels first.

``token_order`` counts, for each token, how many come before it: all pairs of labels are compared, two instructions each
and no memory to speak of, which for 8192 tokens takes a few microseconds of a whole GPU, and no more than one launch. A
program owns ``BLOCK`` tokens; its threads each hold all of them, and go through other labels side by side.

The members of a segment then lie together. A program owns ``GROUP`` segments by ``BLOCK_E`` columns: it finds where
their members begin and end, and reads ``WINDOW`` of each at a time, two such tiles under way. Columns are split because
one segment may have most of the tokens (the background of a video), and its rows then come through one multiprocessor
for each block of columns. Rows are added in an order that depends on labels alone, and reach their own segment only:
nothing is multiplied by 0.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import triton
import triton.language as tl

from trtpass.kernel import Example, Kernel, Launch

LARGEST = tl.constexpr(2**31 - 1)
NO_LIMIT = 2**31 - 1  # segments, where their number is not known


@triton.jit
def token_order(  # type: ignore[no-untyped-def]
    label,  # [B, S]
    tokens,  # S
    segments,
    order,  # [B, S]
    ordered,  # [B, S]
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    label += batch * tokens
    first = tl.program_id(0) * BLOCK
    token = first + tl.arange(0, BLOCK)
    own = tl.load(label + token, mask=token < tokens, other=0)
    own = tl.where((own >= 0) & (own < segments), own, -1)
    before = tl.zeros([BLOCK, STEP], tl.int32)
    near = first // STEP * STEP  # the steps around it hold both earlier and later tokens
    for start in range(0, near, STEP):
        earlier = tl.load(label + start + tl.arange(0, STEP))
        earlier = tl.where((earlier >= 0) & (earlier < segments), earlier, -1)
        before += (earlier[None, :] <= own[:, None]).to(tl.int32)
    for start in range(near, tl.minimum(first + BLOCK, tokens), STEP):
        place = start + tl.arange(0, STEP)
        other = tl.load(label + place, mask=place < tokens, other=0)
        other = tl.where((other >= 0) & (other < segments), other, -1)
        other = tl.where(place < tokens, other, LARGEST)
        tied = (other[None, :] == own[:, None]) & (place[None, :] < token[:, None])
        before += ((other[None, :] < own[:, None]) | tied).to(tl.int32)
    for start in range(tl.cdiv(first + BLOCK, STEP) * STEP, tokens, STEP):
        place = start + tl.arange(0, STEP)
        later = tl.load(label + place, mask=place < tokens, other=0)
        later = tl.where((later >= 0) & (later < segments), later, -1)
        before += (tl.where(place < tokens, later, LARGEST)[None, :] < own[:, None]).to(tl.int32)
    out = batch * tokens + tl.sum(before, 1)
    tl.store(order + out, token, mask=token < tokens)
    tl.store(ordered + out, own, mask=token < tokens)


@triton.jit
def members_of(first, ordered, tokens, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the members of ``GROUP`` segments begin and end among the ascending labels `[S]`: binary search.

    The loop has a length, and no branch is around it: beside a ``while``, or an ``if`` with a loop in it, Triton 3.9 no
    longer knows which pointers are aligned, and reads rows of float16 two bytes at a time.
    """
    segment = first + tl.arange(0, GROUP)
    levels = (tokens.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126  # the exponent of S, and one
    last = tl.load(ordered + tokens - 1, mask=tokens > 0, other=-1)
    levels = tl.where(last < first, 0, levels)  # no label from here on
    begin = tl.full([GROUP], 0, tl.int32)
    end = begin
    for level in range(levels):
        step = 1 << (levels - 1 - level)
        value = tl.load(ordered + begin + step - 1, mask=begin + step <= tokens, other=LARGEST)
        begin = tl.where(value < segment, begin + step, begin)
        value = tl.load(ordered + end + step - 1, mask=end + step <= tokens, other=LARGEST)
        end = tl.where(value <= segment, end + step, end)
    return begin, end


@triton.jit
def sums_of_members(  # type: ignore[no-untyped-def]
    x,  # of the batch row: [S, E]
    weight,  # of the batch row: [S], or anything
    order,  # of the batch row: [S]
    begin,  # [GROUP]: of the members of each segment in `order`
    end,  # [GROUP]
    column,  # [BLOCK_E]
    E: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_E: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Sums in float32 of the rows of each segment, weighted or not `[GROUP, BLOCK_E]`, and of the weights `[GROUP]`."""
    sums = tl.full([GROUP, WINDOW, BLOCK_E], 0, tl.float32)
    sizes = tl.full([GROUP, WINDOW], 0, tl.float32)
    for start in tl.range(0, tl.max(end - begin, 0), WINDOW, num_stages=3):
        place = begin[:, None] + (start + tl.arange(0, WINDOW))[None, :]
        real = place < end[:, None]
        token = tl.load(order + place, mask=real, other=0)
        row = x + token.to(tl.int64)[:, :, None] * E + column[None, None, :]
        value = tl.load(row, mask=real[:, :, None] & (column < E)[None, None, :], other=0.0).to(tl.float32)
        if WEIGHTED:
            scale = tl.load(weight + token, mask=real, other=0.0)
            value = value * scale[:, :, None]
            sizes += scale
        sums += value
    return tl.sum(sums, 1), tl.sum(sizes, 1)


def order_kernel(limit: Any) -> Kernel:
    """The kernel of ``label [B, S] -> order [B, S], ordered [B, S]``.

    Args:
        limit: how many segments there are, from the dimensions and the attributes; labels from there on are none.
    """

    def geometry(d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace) -> Launch:
        grid = ((d.S + (tactic.block - 1)) // tactic.block, d.B, 1)
        return Launch(grid, (d.S, limit(d, a)), {"BLOCK": tactic.block, "STEP": 32 * tactic.warps}, tactic.warps, 1)

    def example(tokens: int) -> Example:
        tokens = min(tokens, 25088)  # a video of 128 frames with 196 tokens each
        return Example(
            sizes={"B": 1, "S": tokens},
            flops=tokens * tokens.bit_length(),
            bytes=12 * tokens,
            tensor=False,
            attrs={},
            note="of a sort; all pairs are compared",
        )

    tactics = ({"block": 32, "warps": 8}, {"block": 32, "warps": 4})
    return Kernel(token_order, (), ("tokens", "segments"), geometry, example, tactics)


def constexprs(width: int, tactic: SimpleNamespace) -> dict[str, int | float | str]:
    """What kernels that add rows of ``width`` values are compiled for."""
    block = min(tactic.block_e, max(16, 1 << (width - 1).bit_length()))
    return {"E": width, "GROUP": tactic.group, "BLOCK_E": block, "WINDOW": tactic.window}


# Small segments leave little of a larger window; more programs of fewer columns where one segment has most tokens.
TACTICS = ({"group": 4, "block_e": 128, "window": 8}, {"group": 4, "block_e": 64, "window": 16})

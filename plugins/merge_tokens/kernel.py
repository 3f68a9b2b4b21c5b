"""Rows of base and the tokens that join them, which lie together in the order of their targets.

A program owns ``GROUP`` rows, and ``plugins._triton_segments`` says how it reads the tokens that join them.
"""

from __future__ import annotations

from types import SimpleNamespace

import triton
import triton.language as tl

from plugins._triton_segments import (
    NO_LIMIT,
    TACTICS,
    constexprs,
    members_of,
    order_kernel,
    sums_of_members,
)
from trtpass.kernel import Example, Kernel, Launch


@triton.jit
def merge_rows(  # type: ignore[no-untyped-def]
    base,  # [B, R, E]
    base_size,  # [B, R]
    x,  # [B, S, E]
    size,  # [B, S]
    order,  # [B, S]
    ordered,  # [B, S]
    rows,  # R
    tokens,  # S
    merged,  # [B, R, E]
    merged_size,  # [B, R]
    E: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_E: tl.constexpr,
    WINDOW: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    x += batch * tokens * E
    size += batch * tokens
    order += batch * tokens
    ordered += batch * tokens
    column = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    first = tl.program_id(0) * GROUP
    row = first + tl.arange(0, GROUP)
    begin, end = members_of(first, ordered, tokens, GROUP)
    sums, sizes = sums_of_members(x, size, order, begin, end, column, E, GROUP, BLOCK_E, True, WINDOW)
    out = batch * rows + row
    place = out[:, None] * E + column[None, :]
    inside = (row < rows)[:, None] & (column < E)[None, :]
    own = tl.load(base_size + out, mask=row < rows, other=0.0)
    total = own[:, None] * tl.load(base + place, mask=inside, other=0.0).to(tl.float32) + sums
    weight = own + sizes
    empty = weight == 0.0
    value = tl.where(empty[:, None], 0.0, total / tl.where(empty, 1.0, weight)[:, None])
    tl.store(merged + place, value.to(merged.dtype.element_ty), mask=inside)
    if tl.program_id(1) == 0:
        tl.store(merged_size + out, weight, mask=row < rows)


def _geometry(d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace) -> Launch:
    known = constexprs(d.E, tactic)
    grid = ((d.R + (tactic.group - 1)) // tactic.group, -(-d.E // known["BLOCK_E"]), d.B)
    return Launch(grid, (d.R, d.S), known, stages=1)


def _supports(
    d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace, cc: int
) -> bool | str:
    if cc == 120 and tactic.window > 8:
        return f"windows of {tactic.window} tokens spill registers of SM120"
    return True


def _example(tokens: int) -> Example:
    tokens, width = min(tokens, 25088), 896  # a video of 128 frames with 196 tokens each
    rows = tokens // 8
    return Example(
        sizes={"B": 1, "R": rows, "E": width, "S": tokens},
        flops=2 * (tokens + rows) * width,
        bytes=2 * width * (tokens + 2 * rows) + 4 * (3 * tokens + 2 * rows),
        tensor=False,
        attrs={},
        note="all tokens join an eighth of them",
    )


def _no_limit(d: SimpleNamespace, a: SimpleNamespace) -> int:
    return NO_LIMIT


ORDER = order_kernel(_no_limit)
MERGE = Kernel(
    function=merge_rows,
    fixed=("E",),
    extras=("rows", "tokens"),
    geometry=_geometry,
    supports=_supports,
    example=_example,
    tactics=TACTICS,
)

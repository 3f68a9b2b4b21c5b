"""Means of segments whose members lie together; ``plugins._triton_segments`` says how the work is divided."""

from __future__ import annotations

from types import SimpleNamespace

import triton
import triton.language as tl

from plugins._triton_segments import TACTICS, constexprs, members_of, order_kernel, sums_of_members
from plugins.segment_mean import capacity
from trtpass.kernel import Example, Kernel, Launch


@triton.jit
def segment_means(  # type: ignore[no-untyped-def]
    x,  # [B, S, E]
    order,  # [B, S]
    ordered,  # [B, S]
    tokens,  # S
    segments,  # C
    mean,  # [B, C, E]
    size,  # [B, C]
    E: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_E: tl.constexpr,
    WINDOW: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    x += batch * tokens * E
    order += batch * tokens
    ordered += batch * tokens
    column = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    first = tl.program_id(0) * GROUP
    segment = first + tl.arange(0, GROUP)
    begin, end = members_of(first, ordered, tokens, GROUP)
    sums, _ = sums_of_members(x, x, order, begin, end, column, E, GROUP, BLOCK_E, False, WINDOW)
    value = sums / tl.maximum(end - begin, 1).to(tl.float32)[:, None]
    out = batch * segments + segment
    real = segment < segments
    place = mean + out[:, None] * E + column[None, :]
    tl.store(place, value.to(mean.dtype.element_ty), mask=real[:, None] & (column < E)[None, :])
    if tl.program_id(1) == 0:
        tl.store(size + out, end - begin, mask=real)


def _geometry(d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace) -> Launch:
    known, segments = constexprs(d.E, tactic), capacity(d, a)
    grid = ((segments + (tactic.group - 1)) // tactic.group, -(-d.E // known["BLOCK_E"]), d.B)
    return Launch(grid, (d.S, segments), known, stages=1)


def _example(tokens: int) -> Example:
    tokens, width = min(tokens, 25088), 896  # a video of 128 frames with 196 tokens each
    return Example(
        sizes={"B": 1, "S": tokens, "E": width},
        flops=tokens * width,
        bytes=2 * width * (tokens + tokens) + 4 * (2 * tokens + tokens),
        tensor=False,
        attrs={},
        note="room for as many segments as tokens",
    )


ORDER = order_kernel(capacity)
MEANS = Kernel(
    function=segment_means,
    fixed=("E",),
    extras=("tokens", "segments"),
    geometry=_geometry,
    example=_example,
    tactics=TACTICS,
)

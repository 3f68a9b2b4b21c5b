"""CompactSlots as one Triton launch: a program for each owner, which walks its tokens with a running sum.

The sum before a token needs all tokens before it. A long row is 32 blocks of 4096 tokens, read once and written once by
one multiprocessor; owners (KV heads of all rows) run side by side. What it takes is bound by the latency of the blocks,
some tens of microseconds at 128K tokens, beside a prefill of seconds.
"""

from __future__ import annotations

from types import SimpleNamespace

import triton
import triton.language as tl

from trtpass.kernel import Example, Kernel, Launch


@triton.jit
def compact_slots(  # type: ignore[no-untyped-def]
    keep,  # [B, Hkv, S]
    held,  # [B, Hkv]
    lengths,  # [B]
    tokens,  # S
    slot,  # [B, Hkv, S]
    kept,  # [B, Hkv]
    BLOCK: tl.constexpr,
):
    owner, batch = tl.program_id(0), tl.program_id(1)
    owner += batch * tl.num_programs(0)
    length = tl.minimum(tl.load(lengths + batch), tokens)
    keep += owner.to(tl.int64) * tokens
    slot += owner.to(tl.int64) * tokens
    used = tl.load(held + owner)
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = tl.load(keep + token, mask=token < length, other=0)
        count = (x != 0).to(tl.int32)
        before = tl.cumsum(count) - count
        tl.store(slot + token, tl.where(count == 1, used + before, -1), mask=token < tokens)
        used += tl.sum(count)
    tl.store(kept + owner, used)


def _geometry(d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace) -> Launch:
    return Launch((d.Hkv, d.B, 1), (d.S,), {"BLOCK": tactic.block}, tactic.warps)


def _example(tokens: int) -> Example:
    owners = 8
    return Example(
        sizes={"B": 1, "Hkv": owners, "S": tokens},
        flops=2 * owners * tokens,  # a comparison and an addition
        bytes=8 * owners * tokens,
        tensor=False,
        attrs={},
        note="one layer; a program for each of 8 KV heads",
    )


KERNEL = Kernel(
    function=compact_slots,
    fixed=(),
    extras=("tokens",),
    geometry=_geometry,
    example=_example,
    tactics=({"block": 4096, "warps": 16}, {"block": 1024, "warps": 4}),
)

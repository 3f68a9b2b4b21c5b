"""WritePages as one Triton launch: each program carries a block of one owner's rows to their places in the pool.

Rows are read once, where they are kept, and written once: the launch is bound by memory. The pool itself is not read;
its pointer arrives twice, as the input and as the output that shares its memory.
"""

from __future__ import annotations

from types import SimpleNamespace

import triton
import triton.language as tl

from trtpass.kernel import Example, Kernel, Launch

MAX_WIDTH = 512  # of a row: a tile of 32 rows lies in registers


@triton.jit
def write_pages(  # type: ignore[no-untyped-def]
    pages,  # [P, Z, D], the memory of `written`
    new,  # [B, Hkv, S, D]
    slot,  # [B, Hkv, S]
    page_table,  # [B, Hkv, M]
    tokens,  # S
    entries,  # M
    pool,  # P
    page_size,  # Z
    written,  # [P, Z, D]
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,  # D, rounded up to a power of two
    ROWS: tl.constexpr,
):
    block, owner, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    owner += batch * tl.num_programs(1)
    token = block * ROWS + tl.arange(0, ROWS)
    here = owner.to(tl.int64) * tokens + token
    at = tl.load(slot + here, mask=token < tokens, other=-1)
    entry = at // page_size  # [0, M) is asked of the quotient: M Z may pass 2^31
    inside = (at >= 0) & (entry < entries)
    page = tl.load(page_table + owner.to(tl.int64) * entries + entry, mask=inside, other=-1)
    goes = inside & (page >= 0) & (page < pool)
    d = tl.arange(0, BLOCK_D)
    mask = goes[:, None] & (d < D)
    rows = tl.load(new + here[:, None] * D + d, mask=mask)
    place = page.to(tl.int64) * page_size + at % page_size
    tl.store(written + place[:, None] * D + d, rows, mask=mask)


def _geometry(d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace) -> Launch:
    constexprs = {"D": d.D, "BLOCK_D": max(16, 1 << (d.D - 1).bit_length()), "ROWS": tactic.rows}
    grid = ((d.S + (tactic.rows - 1)) // tactic.rows, d.Hkv, d.B)
    return Launch(grid, (d.S, d.M, d.P, d.Z), constexprs)


def _supports(
    d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace, cc: int
) -> bool | str:
    if d.D > MAX_WIDTH:
        return f"rows of {d.D} elements are wider than {MAX_WIDTH}"
    return True


def _example(tokens: int) -> Example:
    owners, width, page_size = 8, 128, 64
    entries = tokens // page_size
    return Example(
        sizes={
            "P": owners * entries, "Z": page_size, "D": width, "B": 1, "Hkv": owners, "S": tokens, "M": entries
        },
        flops=4 * owners * tokens,  # the place of each row
        bytes=owners * (tokens * 4 + tokens // 4 * 2 * 2 * width + entries * 4),
        tensor=False,
        attrs={},
        note="keys or values of one layer, a quarter of the tokens kept",
    )  # fmt: skip


KERNEL = Kernel(
    function=write_pages,
    fixed=("D",),
    extras=("tokens", "entries", "pool", "page_size"),
    geometry=_geometry,
    supports=_supports,
    example=_example,
    tactics=({"rows": 32}, {"rows": 8}),
)

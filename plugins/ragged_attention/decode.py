"""RaggedAttention of few queries, two launches: every part of the slots by a program, then an average over the parts.

Decode reads each key once and does little with it, so what counts is how many bytes are under way: a program serves
one part (256 slots) of one owner, for the G queries of its group together, packed as in ``kernel.py`` and padded to 16
rows; parts times Hkv times B programs, several in each multiprocessor, each with two tiles on their way to shared
memory. At 8192 slots and 8 KV heads these are 256 programs on 132 multiprocessors. Parts behind the end of an owner
only write their zeros.

The average has one program for each row of ``out``, which reads the parts that hold anything, 128 at once.
"""

from __future__ import annotations

from types import SimpleNamespace

import triton
import triton.language as tl

from plugins._triton_attention import (
    CHAINED_STAGES,
    LOG2_E,
    average,
    float32_blocks,
    load_rows,
    padded,
    reason_against,
    reason_for_first_tactic,
    shared_constexprs,
    store_rows,
)
from plugins.ragged_attention.kernel import attend_slots, visible_slots
from plugins.ragged_attention.steps import PART
from trtpass.kernel import Example, Kernel, Launch

PARTIAL_TACTICS = (
    {"rows": 16, "keys": 64, "warps": 4},
    {"rows": 16, "keys": 128, "warps": 8},
    {"rows": 32, "keys": 64, "warps": 4},
)


@triton.jit
def attend_part(  # type: ignore[no-untyped-def]
    q,  # [B, H, S, D]
    k_pages,  # [P, Z, D]
    v_pages,  # [P, Z, Dv]
    page_table,  # [B, Hkv, M]
    lengths,  # [B, Hkv]
    queries,  # [B]
    tokens,  # S
    entries,  # M
    owners,  # Hkv
    group,  # H / Hkv
    partial,  # [B, H, S, N, Dv]
    largest,  # [B, H, S, N]
    total,  # [B, H, S, N]
    Z: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    SCALE: tl.constexpr,  # of the scores, times log2(e): the softmax is in powers of two
    PRECISION: tl.constexpr,  # of the matrix products of float32 inputs
    BLOCK_D: tl.constexpr,  # D and Dv, rounded up to a power of two
    BLOCK_DV: tl.constexpr,
    PART: tl.constexpr,  # slots of a part
    ROWS: tl.constexpr,  # packed rows of a program
    KEYS: tl.constexpr,  # slots of a tile
):
    part, parts = tl.program_id(0), tl.num_programs(0)
    owner = tl.program_id(2) * owners + tl.program_id(1) % owners
    first = tl.program_id(1) // owners * ROWS
    held, asked = tl.load(lengths + owner), tl.load(queries + tl.program_id(2))
    packed = first + tl.arange(0, ROWS)
    real = packed // group < asked
    visible = visible_slots(packed, group, held, asked)
    stop = (part + 1) * PART
    # Of the first row and of the last one that is no padding; where all is padding both are 0.
    common = tl.minimum(tl.max(tl.where(packed == first, visible, 0)), stop)
    end = tl.minimum(tl.max(visible), stop)

    row = (owner * group + packed % group).to(tl.int64) * tokens + packed // group
    query = load_rows(q, row, real, D, BLOCK_D)
    table = page_table + owner.to(tl.int64) * entries
    top, whole, weighted = attend_slots(
        query, visible, part * PART, common, end, k_pages, v_pages, table,
        Z, D, DV, SCALE, PRECISION, BLOCK_D, BLOCK_DV, ROWS, KEYS,
    )  # fmt: skip
    # Rows of padding took part where no mask was needed.
    whole = tl.where(real, whole, 0.0)
    own = packed // group < tokens
    row = row * parts + part
    store_rows(partial, row, own, tl.where(real[:, None], average(whole, weighted), 0.0), DV, BLOCK_DV)
    tl.store(largest + row, tl.where(whole > 0, top * 0.6931471805599453, 0.0), mask=own)  # ln(2)
    tl.store(total + row, whole, mask=own)


@triton.jit
def average_parts(  # type: ignore[no-untyped-def]
    partial,  # [B, H, S, N, Dv]
    largest,  # [B, H, S, N]
    total,  # [B, H, S, N]
    parts,  # N
    out,  # [B, H, S, Dv]
    DV: tl.constexpr,
    LOG2: tl.constexpr,  # of e
    PARTS: tl.constexpr,  # parts of a tile
    BLOCK_DV: tl.constexpr,  # Dv, rounded up to a power of two
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_DV)
    top = -3.0e38  # finite: parts that count for nothing must not make a NaN
    whole = 0.0
    weighted = tl.zeros([BLOCK_DV], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        sums = tl.load(total + row * parts + part, mask=part < parts, other=0.0)
        some = sums > 0
        score = tl.load(largest + row * parts + part, mask=some, other=-3.0e38) * LOG2
        mean = tl.load(
            partial + (row * parts + part)[:, None] * DV + column, mask=some[:, None] & (column < DV), other=0.0
        )
        higher = tl.maximum(top, tl.max(tl.where(some, score, -3.0e38), 0))
        weight = tl.where(some, sums * tl.exp2(score - higher), 0.0)
        shrink = tl.exp2(top - higher)
        weighted = weighted * shrink + tl.sum(weight[:, None] * mean.to(tl.float32), 0)
        whole = whole * shrink + tl.sum(weight, 0)
        top = higher
    result = weighted / tl.where(whole > 0, whole, 1.0)
    tl.store(out + row * DV + column, result.to(out.dtype.element_ty), mask=column < DV)


def _partial_geometry(
    d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace
) -> Launch:
    constexprs = shared_constexprs(d, a, dtypes.q)
    if dtypes.q == "float32":
        rows, keys, warps, stages = float32_blocks(d)
    else:
        rows, keys, warps, stages = tactic.rows, tactic.keys, tactic.warps, CHAINED_STAGES
    group = d.H // d.Hkv
    tiles = (d.S * group + (rows - 1)) // rows
    grid = ((d.M * d.Z + (PART - 1)) // PART, tiles * d.Hkv, d.B)
    blocks = {"Z": d.Z, **constexprs, "PART": PART, "ROWS": rows, "KEYS": keys}
    return Launch(grid, (d.S, d.M, d.Hkv, group), blocks, warps, stages)


def _partial_supports(
    d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace, cc: int
) -> bool | str:
    if reason := reason_against(d, a):
        return reason
    if tactic != SimpleNamespace(**PARTIAL_TACTICS[0]):
        if reason := reason_for_first_tactic(d, dtypes.q):
            return reason
        if d.Dv != d.D or d.D not in (64, 128):
            return f"widths of {d.D} and {d.Dv} have the first tactic alone: the others spill registers"
    if tactic.keys > 64 and max(d.D, d.Dv) > 64 and cc in (86, 89, 120):
        return f"{tactic.keys} slots of width {max(d.D, d.Dv)} outgrow the 99 KiB of shared memory of SM{cc}"
    return True


def _partial_example(tokens: int) -> Example:
    heads, key_heads, width, page_size = 32, 8, 128, 16
    pages, parts = tokens // page_size, -(-tokens // PART)
    return Example(
        sizes={"B": 1, "H": heads, "Hkv": key_heads, "S": 1, "D": width, "Dv": width,
               "P": key_heads * pages, "Z": page_size, "M": pages},
        flops=heads * tokens * 4 * width,
        bytes=2 * width * (heads + 2 * key_heads * tokens + heads * parts) + 8 * heads * parts + 4 * key_heads * pages,
        tensor=True,
        attrs={},
        note="one query over a full cache",
    )  # fmt: skip


def _reduce_geometry(
    d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace
) -> Launch:
    constexprs = {"DV": d.Dv, "LOG2": LOG2_E, "PARTS": 128, "BLOCK_DV": padded(d.Dv)}
    return Launch((d.B * d.H * d.S, 1, 1), (d.N,), constexprs, warps=8)


def _reduce_supports(
    d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace, cc: int
) -> bool | str:
    return True if d.Dv <= 256 else f"width {d.Dv} is above 256"


def _reduce_example(tokens: int) -> Example:
    heads, width = 32, 128
    parts = -(-tokens // PART)
    return Example(
        sizes={"B": 1, "H": heads, "S": 1, "N": parts, "Dv": width},
        flops=heads * parts * 2 * width,
        bytes=heads * (parts * (2 * width + 8) + 2 * width),
        tensor=False,
        attrs={},
        note="one query over a full cache",
    )


PARTIAL_KERNEL = Kernel(
    function=attend_part,
    fixed=("D", "Dv", "Z"),
    extras=("tokens", "entries", "owners", "group"),
    geometry=_partial_geometry,
    supports=_partial_supports,
    example=_partial_example,
    tactics=PARTIAL_TACTICS,
)
REDUCE_KERNEL = Kernel(
    function=average_parts,
    fixed=("Dv",),
    extras=("parts",),
    geometry=_reduce_geometry,
    supports=_reduce_supports,
    example=_reduce_example,
)

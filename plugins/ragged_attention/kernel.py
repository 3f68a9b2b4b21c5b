"""RaggedAttention over more than one query: prefill, later turns and chunks, walking the pages of each owner.

A program serves one owner (batch row, KV head) and ``ROWS`` rows of queries. The G query heads of a group are packed
beside each other, token by token: rows ``t G .. t G + G - 1`` are query t in every head of the group. So a page is read
once for all of them, short chunks fill tiles, and a tile spans few tokens: little of its diagonal is masked. Programs
number S G / ROWS times B Hkv, those with the most keys first; they run side by side and meet each other's pages in L2.

Slots that every row sees need no mask, and are copied to shared memory two tiles ahead of the products. The page of
each slot comes from the table, slot by slot, so that pages may have any size.
"""

from __future__ import annotations

from types import SimpleNamespace

import triton
import triton.language as tl

from plugins._triton_attention import (
    CHAINED_STAGES,
    attend_tile,
    average,
    empty_state,
    float32_blocks,
    keys_of,
    load_all_rows,
    load_rows,
    reason_against,
    reason_for_first_tactic,
    shared_constexprs,
    store_rows,
)
from trtpass.kernel import Example, Kernel, Launch

TACTICS = (
    {"rows": 64, "keys": 64, "warps": 4},
    {"rows": 128, "keys": 64, "warps": 8},
    {"rows": 128, "keys": 32, "warps": 8},
)


@triton.jit
def visible_slots(row, group, held, asked):  # type: ignore[no-untyped-def]
    """How many slots each packed row of an owner sees; 0 or less where none, and in rows of padding."""
    token = row // group
    return tl.where(token < asked, held - asked + token + 1, 0)


@triton.jit
def visible_range(first, group, held, asked, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many slots the first row of a program sees, and how many its last one that is no padding; 0 where none is."""
    token = first // group
    last = tl.minimum((first + ROWS - 1) // group, asked - 1)
    past = held - asked + 1
    return tl.where(token < asked, past + token, 0), tl.where(token < asked, past + last, 0)


@triton.jit
def attend_slots(  # type: ignore[no-untyped-def]
    query,  # [ROWS, BLOCK_D]
    visible,  # [ROWS]: slots that each row sees
    begin,  # the first slot
    common,  # slots that every row sees, except those of padding
    end,  # slots that any row sees
    k_pages,
    v_pages,
    table,  # of this owner
    Z: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The softmax state after slots ``begin`` to ``end``."""
    largest, total, weighted = empty_state(ROWS, BLOCK_DV)
    # In float32 two loops of unrolled products would spill registers: all tiles take the masks.
    masked = begin if PRECISION == "ieee" else begin + tl.maximum(common - begin, 0) // KEYS * KEYS
    for start in range(begin, masked, KEYS):
        slot = start + tl.arange(0, KEYS)
        page = tl.load(table + slot // Z)
        row = page.to(tl.int64) * Z + slot % Z
        key = load_all_rows(k_pages, row, D, BLOCK_D)
        value = load_all_rows(v_pages, row, DV, BLOCK_DV)
        score = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        largest, total, weighted = attend_tile(score, value, largest, total, weighted, SCALE, PRECISION)
    for start in tl.range(masked, end, KEYS, num_stages=1):
        slot = start + tl.arange(0, KEYS)
        page = tl.load(table + slot // Z, mask=slot < end, other=0)
        row = page.to(tl.int64) * Z + slot % Z
        key = load_rows(k_pages, row, slot < end, D, BLOCK_D)
        value = load_rows(v_pages, row, slot < end, DV, BLOCK_DV)
        score = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        score = tl.where(slot[None, :] < visible[:, None], score, float("-inf"))
        largest, total, weighted = attend_tile(score, value, largest, total, weighted, SCALE, PRECISION)
    return largest, total, weighted


@triton.jit
def attend_pages(  # type: ignore[no-untyped-def]
    q,  # [B, H, S, D]
    k_pages,  # [P, Z, D]
    v_pages,  # [P, Z, Dv]
    page_table,  # [B, Hkv, M]
    lengths,  # [B, Hkv]
    queries,  # [B]
    tokens,  # S
    entries,  # M
    group,  # H / Hkv
    out,  # [B, H, S, Dv]
    Z: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    SCALE: tl.constexpr,  # of the scores, times log2(e): the softmax is in powers of two
    PRECISION: tl.constexpr,  # of the matrix products of float32 inputs
    BLOCK_D: tl.constexpr,  # D and Dv, rounded up to a power of two
    BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr,  # packed rows of a program
    KEYS: tl.constexpr,  # slots of a tile
):
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last rows see the most: they start first
    owner = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    held, asked = tl.load(lengths + owner), tl.load(queries + tl.program_id(2))
    packed = block * ROWS + tl.arange(0, ROWS)
    visible = visible_slots(packed, group, held, asked)
    real = packed // group < asked
    common, end = visible_range(block * ROWS, group, held, asked, ROWS)

    # Row of the whole tensor; one group can pass 2^31 elements.
    row = (owner * group + packed % group).to(tl.int64) * tokens + packed // group
    query = load_rows(q, row, real, D, BLOCK_D)
    table = page_table + owner.to(tl.int64) * entries
    _, total, weighted = attend_slots(
        query, visible, 0, common, end, k_pages, v_pages, table,
        Z, D, DV, SCALE, PRECISION, BLOCK_D, BLOCK_DV, ROWS, KEYS,
    )  # fmt: skip
    # Rows of padding took part where no mask was needed.
    attended = tl.where(real[:, None], average(total, weighted), 0.0)
    store_rows(out, row, packed // group < tokens, attended, DV, BLOCK_DV)


def _geometry(d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace) -> Launch:
    constexprs = shared_constexprs(d, a, dtypes.q)
    if dtypes.q == "float32":
        rows, keys, warps, stages = float32_blocks(d)
    else:
        rows, keys, warps, stages = tactic.rows, keys_of(d, tactic.keys), tactic.warps, CHAINED_STAGES
    group = d.H // d.Hkv
    grid = ((d.S * group + (rows - 1)) // rows, d.Hkv, d.B)
    return Launch(grid, (d.S, d.M, group), {"Z": d.Z, **constexprs, "ROWS": rows, "KEYS": keys}, warps, stages)


def _supports(
    d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace, cc: int
) -> bool | str:
    if isinstance(getattr(d, "S", None), int) and d.S == 1:
        return "one query: too few programs, use the steps"
    if reason := reason_against(d, a):
        return reason
    if tactic != SimpleNamespace(**TACTICS[0]) and (reason := reason_for_first_tactic(d, dtypes.q)):
        return reason
    if tactic.rows * tactic.keys > 64 * 64 and max(d.D, d.Dv) > 64 and cc not in (90, 100):
        return f"{tactic.rows} x {tactic.keys} tiles of width {max(d.D, d.Dv)} spill registers of SM{cc}"
    return True


def _example(tokens: int) -> Example:
    heads, key_heads, width, page_size = 32, 8, 128, 16
    chunk, pages = min(tokens, 2048), tokens // page_size
    seen = chunk * (tokens - chunk) + chunk * (chunk + 1) / 2  # pairs of a query and a slot, in one head
    return Example(
        sizes={"B": 1, "H": heads, "Hkv": key_heads, "S": chunk, "D": width, "Dv": width,
               "P": key_heads * pages, "Z": page_size, "M": pages},
        flops=heads * seen * 4 * width,
        bytes=2 * width * (2 * heads * chunk + 2 * key_heads * tokens) + 4 * key_heads * pages,
        tensor=True,
        attrs={},
        note="the last 2048 tokens as one chunk",
    )  # fmt: skip


KERNEL = Kernel(
    function=attend_pages,
    fixed=("D", "Dv", "Z"),
    extras=("tokens", "entries", "group"),
    geometry=_geometry,
    supports=_supports,
    example=_example,
    tactics=TACTICS,
)

"""BlockSparseAttention as one Triton launch: a tile of queries walks the blocks that are listed for it, and no other.

A program serves ``QUERIES`` rows of one query block and head, with the online softmax of FlashAttention-2 (arXiv
2307.08691, section 3.1). Programs number S / QUERIES times B H, the last query blocks, which may list the most, first.
What is not listed is not read: time goes with the number of listed blocks. A look through the list, 128 numbers at
once, finds where it passes the diagonal: tiles before it need no mask, and are copied to shared memory two tiles ahead
of the products; those on the diagonal come last, as far as the program's own rows. Heads share nothing, as each has
lists of its own; query blocks side by side meet the keys of a head in L2.
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

LEAST, MOST = 16, 128  # tokens of a block: what a matrix product takes, and what a tile holds
SPILLS = ((64, 120, 64), (128, 120, 128), (128, 86, 128), (128, 89, 128))  # queries, compute capability, width
LISTED = 128  # numbers of a list that are read at once
TACTICS = (
    {"queries": 64, "keys": 64, "warps": 4},
    {"queries": 128, "keys": 64, "warps": 8},
    {"queries": 64, "keys": 32, "warps": 4},
)


@triton.jit
def attend_blocks(  # type: ignore[no-untyped-def]
    q,  # [B, H, S, D]
    k,  # [B, Hkv, S, D]
    v,  # [B, Hkv, S, Dv]
    blocks,  # [B, H, Q, C]
    count,  # [B, H, Q]
    tokens,  # S
    rows,  # Q
    slots,  # C
    key_heads,  # Hkv
    out,  # [B, H, S, Dv]
    D: tl.constexpr,
    DV: tl.constexpr,
    SCALE: tl.constexpr,  # of the scores, times log2(e): the softmax is in powers of two
    PRECISION: tl.constexpr,  # of the matrix products of float32 inputs
    BLOCK_D: tl.constexpr,  # D and Dv, rounded up to a power of two
    BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr,  # tokens of a block
    QUERIES: tl.constexpr,  # of a program; divides BLOCK
    KEYS: tl.constexpr,  # of a tile; divides BLOCK
    LISTED: tl.constexpr,  # numbers of the list read at once
):
    head, batch = tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    own = first // BLOCK
    position = first + tl.arange(0, QUERIES)
    real = position < tokens

    # Whole heads lie more than 2^31 elements apart before the rows of one do.
    query_head = (batch * heads + head).to(tl.int64)
    key_head = (batch * key_heads + head * key_heads // heads).to(tl.int64) * tokens
    q += query_head * tokens * D
    k += key_head * D
    v += key_head * DV
    out += query_head * tokens * DV
    listed = query_head * rows + own
    blocks += listed * slots
    query = load_rows(q, position, real, D, BLOCK_D)
    largest, total, weighted = empty_state(QUERIES, BLOCK_DV)
    # The list is ascending: numbers below 0, then the blocks before this one, then this one, and what lies behind it.
    amount = tl.load(count + listed)
    none, before, diagonal = 0, 0, 0
    for start in range(0, amount, LISTED):
        slot = start + tl.arange(0, LISTED)
        block = tl.load(blocks + slot, mask=slot < amount, other=2147483647)
        none += tl.sum((block < 0).to(tl.int32), 0)
        before += tl.sum((block < own).to(tl.int32), 0)
        diagonal += tl.sum((block == own).to(tl.int32), 0)

    # Every query sees all of a block before its own. In float32 two loops of unrolled products would spill registers:
    # all tiles take the masks.
    tiles: tl.constexpr = BLOCK // KEYS
    masked = (none if PRECISION == "ieee" else before) * tiles
    end = before * tiles + diagonal * tl.cdiv(first % BLOCK + QUERIES, KEYS)
    for step in range(none * tiles, masked):
        block = tl.load(blocks + step // tiles)
        row = block * BLOCK + step % tiles * KEYS + tl.arange(0, KEYS)
        key = load_all_rows(k, row, D, BLOCK_D)
        value = load_all_rows(v, row, DV, BLOCK_DV)
        score = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        largest, total, weighted = attend_tile(score, value, largest, total, weighted, SCALE, PRECISION)
    for step in tl.range(masked, end, num_stages=1):
        block = tl.load(blocks + step // tiles)
        row = block * BLOCK + step % tiles * KEYS + tl.arange(0, KEYS)
        key = load_rows(k, row, row < tokens, D, BLOCK_D)
        value = load_rows(v, row, row < tokens, DV, BLOCK_DV)
        score = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        score = tl.where(row[None, :] <= position[:, None], score, float("-inf"))
        largest, total, weighted = attend_tile(score, value, largest, total, weighted, SCALE, PRECISION)
    store_rows(out, position, real, average(total, weighted), DV, BLOCK_DV)


def _geometry(d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace) -> Launch:
    constexprs = shared_constexprs(d, a, dtypes.q)
    if dtypes.q == "float32":
        queries, keys, warps, stages = float32_blocks(d)
    else:
        queries, keys, warps, stages = tactic.queries, keys_of(d, tactic.keys), tactic.warps, CHAINED_STAGES
    queries, keys = min(queries, a.block), min(keys, a.block)
    grid = ((d.S + (queries - 1)) // queries, d.H, d.B)
    own = {"BLOCK": a.block, "QUERIES": queries, "KEYS": keys, "LISTED": LISTED}
    return Launch(grid, (d.S, d.Q, d.C, d.Hkv), {**constexprs, **own}, warps, stages)


def _supports(
    d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace, cc: int
) -> bool | str:
    if reason := reason_against(d, a):
        return reason
    if not LEAST <= a.block <= MOST or a.block & (a.block - 1):
        return f"blocks of {a.block} tokens are not a power of two from {LEAST} to {MOST}"
    if tactic != SimpleNamespace(**TACTICS[0]):
        if reason := reason_for_first_tactic(d, dtypes.q):
            return reason
        if tactic.queries > a.block or a.block < 64:
            return f"blocks of {a.block} tokens have tactics of fewer queries"
    spills = (tactic.queries, cc, max(d.D, d.Dv)) in SPILLS and tactic.keys == 64 and dtypes.q != "float32"
    if spills and {d.D, d.Dv} <= {64, 128}:
        return f"{tactic.queries} x {tactic.keys} tiles of width {max(d.D, d.Dv)} spill registers of SM{cc}"
    return True


def _example(tokens: int) -> Example:
    heads, key_heads, width, block = 32, 8, 128, 128
    rows = tokens // block
    kept = max(1, rows // 8)  # listed blocks of a query block, the diagonal among them; the first ones have not as many
    listed = rows * kept - kept * (kept - 1) / 2
    return Example(
        sizes={
            "B": 1, "H": heads, "Hkv": key_heads, "S": tokens, "D": width, "Dv": width, "Q": rows, "C": kept,
        },
        flops=heads * (listed * block * block - rows * block * (block - 1) / 2) * 4 * width,
        bytes=2 * width * (2 * heads * tokens + 2 * key_heads * tokens) + 4 * heads * rows * (kept + 1),
        tensor=True,
        attrs={"block": block},
        note="an eighth of all blocks for each block of queries",
    )  # fmt: skip


KERNEL = Kernel(
    function=attend_blocks,
    fixed=("D", "Dv"),
    extras=("tokens", "rows", "slots", "key_heads"),
    geometry=_geometry,
    supports=_supports,
    example=_example,
    tactics=TACTICS,
)

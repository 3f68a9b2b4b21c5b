"""TokenSparseAttention as one Triton launch: rows are read and written through the index, nothing is gathered first.

A program serves one head and ``QUERIES`` slots of its selection: it attends their queries to the keys of all slots up
to them, with the online softmax of FlashAttention-2 (arXiv 2307.08691, section 3.1), and it owns the rows of ``out``
from behind the selected token before its first slot up to its last one; the program of the last selected slot owns the
rest. Every row has one owner, which writes it once: the attended value where the row is selected, zeros elsewhere.

Programs number C / QUERIES times B H, those with the most keys first. Tiles of keys before the first own slot need no
mask, and their rows are copied to shared memory two tiles ahead of the products; the tiles on the diagonal come last.
Blocks of one head run side by side and meet each other's keys in L2; 128 queries read them half as often as 64, which
leave room for two programs in a multiprocessor, so that the softmax of one hides behind the products of the other.
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
    {"queries": 64, "keys": 64, "warps": 4},
    {"queries": 128, "keys": 64, "warps": 8},
    {"queries": 128, "keys": 32, "warps": 8},
)


@triton.jit
def attend_selected(  # type: ignore[no-untyped-def]
    q,  # [B, H, S, D]
    k,  # [B, Hkv, S, D]
    v,  # [B, Hkv, S, Dv]
    index,  # [B, N, C]
    count,  # [B, N]
    tokens,  # S
    slots,  # C
    sets,  # N
    key_heads,  # Hkv
    out,  # [B, H, S, Dv]
    D: tl.constexpr,
    DV: tl.constexpr,
    SCALE: tl.constexpr,  # of the scores, times log2(e): the softmax is in powers of two
    PRECISION: tl.constexpr,  # of the matrix products of float32 inputs
    BLOCK_D: tl.constexpr,  # D and Dv, rounded up to a power of two
    BLOCK_DV: tl.constexpr,
    QUERIES: tl.constexpr,  # slots of a program
    KEYS: tl.constexpr,  # slots of a tile of keys
    GAP: tl.constexpr,  # rows of zeros written at once
):
    head, batch = tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last blocks have the most keys: they start first
    chosen = batch * sets + head * sets // heads
    kept = tl.load(count + chosen)
    first = block * QUERIES
    if first >= kept and block > 0:  # the first block stays, to write zeros where nothing is selected
        return

    # Whole heads lie more than 2^31 elements apart before the rows of one do.
    query_head = (batch * heads + head).to(tl.int64) * tokens
    key_head = (batch * key_heads + head * key_heads // heads).to(tl.int64) * tokens
    q += query_head * D
    k += key_head * D
    v += key_head * DV
    out += query_head * DV
    index += chosen.to(tl.int64) * slots
    slot = first + tl.arange(0, QUERIES)
    position = tl.load(index + slot, mask=slot < kept, other=-1)  # -1 is no row
    own = position >= 0

    # Zeros in the gaps between the selected rows, and behind the last one.
    begin = tl.load(index + first - 1, mask=first > 0, other=-1) + 1
    end = tl.load(index + first + QUERIES - 1, mask=first + QUERIES < kept, other=tokens - 1) + 1
    for start in range(begin, end, GAP):
        row = start + tl.arange(0, GAP)
        selected = tl.max((row[:, None] == position[None, :]).to(tl.int32), 1)
        gap = (row < end) & (selected == 0)
        store_rows(out, row, gap, tl.zeros([GAP, BLOCK_DV], out.dtype.element_ty), DV, BLOCK_DV)

    query = load_rows(q, position, own, D, BLOCK_D)
    largest, total, weighted = empty_state(QUERIES, BLOCK_DV)
    # Slots are in the order of positions. Those up to the first own one are selected, and seen by every query here.
    # In float32 two loops of unrolled products would spill registers: all tiles take the masks.
    diagonal = 0 if PRECISION == "ieee" else (first + 1) // KEYS * KEYS
    for start in range(0, diagonal, KEYS):
        row = tl.load(index + start + tl.arange(0, KEYS))
        key = load_all_rows(k, row, D, BLOCK_D)
        value = load_all_rows(v, row, DV, BLOCK_DV)
        score = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        largest, total, weighted = attend_tile(score, value, largest, total, weighted, SCALE, PRECISION)
    for start in tl.range(diagonal, tl.minimum(first + QUERIES, kept), KEYS, num_stages=1):
        key_slot = start + tl.arange(0, KEYS)
        row = tl.load(index + key_slot, mask=key_slot < kept, other=-1)
        key = load_rows(k, row, row >= 0, D, BLOCK_D)
        value = load_rows(v, row, row >= 0, DV, BLOCK_DV)
        score = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        # A padded key comes after every query of the selection.
        score = tl.where(key_slot[None, :] <= slot[:, None], score, float("-inf"))
        largest, total, weighted = attend_tile(score, value, largest, total, weighted, SCALE, PRECISION)
    store_rows(out, position, own, average(total, weighted), DV, BLOCK_DV)


def _geometry(d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace) -> Launch:
    constexprs = shared_constexprs(d, a, dtypes.q)
    if dtypes.q == "float32":
        queries, keys, warps, stages = float32_blocks(d)
    else:
        queries, keys, warps, stages = tactic.queries, keys_of(d, tactic.keys), tactic.warps, CHAINED_STAGES
    grid = ((d.C + (queries - 1)) // queries, d.H, d.B)
    blocks = {"QUERIES": queries, "KEYS": keys, "GAP": 32}
    return Launch(grid, (d.S, d.C, d.N, d.Hkv), {**constexprs, **blocks}, warps, stages)


def _supports(
    d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace, cc: int
) -> bool | str:
    if reason := reason_against(d, a):
        return reason
    if tactic != SimpleNamespace(**TACTICS[0]) and (reason := reason_for_first_tactic(d, dtypes.q)):
        return reason
    if tactic.queries * tactic.keys > 64 * 64 and max(d.D, d.Dv) > 64 and cc not in (90, 100):
        return f"{tactic.queries} x {tactic.keys} tiles of width {max(d.D, d.Dv)} spill registers of SM{cc}"
    return True


def _example(tokens: int) -> Example:
    kept, heads, key_heads, width = tokens // 2, 32, 8, 128
    return Example(
        sizes={"B": 1, "H": heads, "Hkv": key_heads, "S": tokens, "D": width, "Dv": width, "N": heads, "C": kept},
        flops=heads * kept * (kept + 1) / 2 * 4 * width,
        bytes=2 * width * (heads * kept + 2 * key_heads * tokens + heads * tokens) + 4 * heads * kept,
        tensor=True,
        attrs={},
        note="half of the tokens kept",
    )


KERNEL = Kernel(
    function=attend_selected,
    fixed=("D", "Dv"),
    extras=("tokens", "slots", "sets", "key_heads"),
    geometry=_geometry,
    supports=_supports,
    example=_example,
    tactics=TACTICS,
)

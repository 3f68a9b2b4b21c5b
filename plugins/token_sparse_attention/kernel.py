"""TokenSparseAttention as one Triton launch: rows are read and written through the index, nothing is gathered first.

A program serves one head and ``BLOCK`` slots of its selection: it attends their queries to the keys of all slots up to
them, with the online softmax of FlashAttention (arXiv 2205.14135, section 3.1), and it owns the rows of ``out`` from
behind the selected token before its first slot up to its last one; the program of the last selected slot owns the rest.
Every row has one owner, which writes it once: the attended value where the row is selected, zeros elsewhere.
"""

from __future__ import annotations

from types import SimpleNamespace

import triton
import triton.language as tl

from trtpass.kernel import Example, Kernel, Launch

MAX_WIDTH = 128  # of q and of v: wider tiles spill registers or outgrow the 99 KiB of shared memory of SM86, 89 and 120


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
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,  # D and Dv, rounded up to a power of two
    BLOCK_DV: tl.constexpr,
):
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    chosen = batch * sets + head * sets // heads
    kept = tl.load(count + chosen)
    first = block * BLOCK
    if first >= kept and block > 0:  # the first block stays, to write zeros where nothing is selected
        return

    # Offsets to whole heads pass 2^31 elements before sequences do anything of the kind.
    query_head = (batch * heads + head).to(tl.int64) * tokens
    key_head = (batch * key_heads + head * key_heads // heads).to(tl.int64) * tokens
    index += chosen.to(tl.int64) * slots
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    slot = first + tl.arange(0, BLOCK)
    position = tl.load(index + slot, mask=slot < kept, other=-1)  # -1 is no row
    own = position >= 0

    # Zeros in the gaps between the selected rows, and behind the last one.
    begin = tl.load(index + first - 1, mask=first > 0, other=-1) + 1
    end = tl.load(index + first + BLOCK - 1, mask=first + BLOCK < kept, other=tokens - 1) + 1
    nothing = tl.zeros([BLOCK, BLOCK_DV], out.dtype.element_ty)
    for start in range(begin, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        selected = tl.max((row[:, None] == position[None, :]).to(tl.int32), 1)
        gap = (row < end) & (selected == 0)
        tl.store(out + (query_head + row)[:, None] * DV + dv, nothing, mask=gap[:, None] & (dv < DV))

    query = tl.load(q + (query_head + position)[:, None] * D + d, mask=own[:, None] & (d < D), other=0.0)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK, BLOCK_DV], tl.float32)
    for start in range(0, tl.minimum(first + BLOCK, kept), BLOCK):
        key_slot = start + tl.arange(0, BLOCK)
        key_row = tl.load(index + key_slot, mask=key_slot < kept, other=-1)
        real = (key_row >= 0)[:, None]
        key = tl.load(k + (key_head + key_row)[:, None] * D + d, mask=real & (d < D), other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * SCALE
        # Slots are in the order of positions. A padded key comes after every query of the selection. Slot 0 is visible
        # to all, so that no row of the first tile is without a maximum.
        score = tl.where(key_slot[None, :] <= slot[:, None], score, float("-inf"))
        larger = tl.maximum(largest, tl.max(score, 1))
        weight = tl.exp2(score - larger[:, None])  # [BLOCK, BLOCK]
        shrink = tl.exp2(largest - larger)
        value = tl.load(v + (key_head + key_row)[:, None] * DV + dv, mask=real & (dv < DV), other=0.0)
        weighted = tl.dot(weight.to(value.dtype), value, weighted * shrink[:, None], input_precision=PRECISION)
        total = total * shrink + tl.sum(weight, 1)
        largest = larger
    # A sum is at least 1, the weight of its largest score, except where nothing is selected and nothing is stored.
    attended = (weighted / tl.maximum(total, 1.0)[:, None]).to(out.dtype.element_ty)
    tl.store(out + (query_head + position)[:, None] * DV + dv, attended, mask=own[:, None] & (dv < DV))


def _geometry(d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace) -> Launch:
    wide = dtypes.q == "float32"
    block = 32 if wide else tactic.block
    constexprs = {
        "D": d.D,
        "DV": d.Dv,
        "SCALE": (a.scale or d.D**-0.5) * 1.4426950408889634,
        "PRECISION": "ieee" if wide else "tf32",
        "BLOCK": block,
        "BLOCK_D": max(32, 1 << (d.D - 1).bit_length()),
        "BLOCK_DV": max(32, 1 << (d.Dv - 1).bit_length()),
    }
    # Other warps and stages make ptxas spill registers on one compute capability or another.
    large = max(d.D, d.Dv) > 64
    grid = ((d.C + (block - 1)) // block, d.H, d.B)
    extras = (d.S, d.C, d.N, d.Hkv)
    return Launch(grid, extras, constexprs, warps=8 if large else 4, stages=1 if large and wide else 2)


def _supports(
    d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace, cc: int
) -> bool | str:
    if cc < 80:
        return f"compute capability {cc} is below 80"
    if max(d.D, d.Dv) > MAX_WIDTH:
        return f"head width {max(d.D, d.Dv)} is above {MAX_WIDTH}"
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
    tactics=({"block": 64}, {"block": 128}),
)

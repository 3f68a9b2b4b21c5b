"""What Triton attention kernels share: one step of the online softmax, and the numbers that depend on widths.

The running state of a tile of R rows, as in FlashAttention-2 (arXiv 2307.08691, section 3.1), in powers of two:
``largest`` score so far, times scale times log2(e) `[R]`; ``total`` of the weights relative to it `[R]`; the
``weighted`` sum of values `[R, BLOCK_DV]`. ``largest`` begins at a finite floor instead of -inf, so that rows which see
nothing keep a total of 0 and never make a NaN.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
CHAINED_STAGES = 5  # where a load names the rows of others: Triton halves the stages, rows are two tiles ahead
MAX_WIDTH = 128  # of q and of v: wider tiles spill registers or outgrow the 99 KiB of shared memory of SM86, 89 and 120


@triton.jit
def empty_state(ROWS: tl.constexpr, BLOCK_DV: tl.constexpr):  # type: ignore[no-untyped-def]
    """The state before the first tile of keys."""
    largest = tl.full([ROWS], -3.0e38, tl.float32)
    return largest, tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, BLOCK_DV], tl.float32)


@triton.jit
def attend_tile(  # type: ignore[no-untyped-def]
    score,  # [R, K] in float32: q k^T, -inf where a row does not see a key
    value,  # [K, BLOCK_DV], 0 where a key is none: a weight of 0 times NaN is NaN
    largest,
    total,
    weighted,
    SCALE: tl.constexpr,  # above 0, times log2(e)
    PRECISION: tl.constexpr,  # of the matrix products of float32 inputs
):
    """The state with one more tile of keys."""
    larger = tl.maximum(largest, tl.max(score, 1) * SCALE)
    weight = tl.exp2(score * SCALE - larger[:, None])  # [R, K], one fused multiply-add and one exponential each
    shrink = tl.exp2(largest - larger)
    weighted = tl.dot(weight.to(value.dtype), value, weighted * shrink[:, None], input_precision=PRECISION)
    return larger, total * shrink + tl.sum(weight, 1), weighted


@triton.jit
def load_rows(  # type: ignore[no-untyped-def]
    start,  # pointer to row 0
    row,  # [R], int32 where all rows lie within 2^31 elements of the start, else int64
    real,  # [R] bool: others are not read and give 0
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,  # WIDTH, rounded up to a power of two
):
    """Rows of a matrix `[R, BLOCK]`."""
    column = tl.arange(0, BLOCK)
    mask = real[:, None] if WIDTH == BLOCK else real[:, None] & (column < WIDTH)
    return tl.load(start + row[:, None] * WIDTH + column, mask=mask, other=0.0)


@triton.jit
def load_all_rows(start, row, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """As ``load_rows`` where every row is real: no mask where the width is a power of two."""
    column = tl.arange(0, BLOCK)
    if WIDTH == BLOCK:
        rows = tl.load(start + row[:, None] * WIDTH + column)
    else:
        rows = tl.load(start + row[:, None] * WIDTH + column, mask=column < WIDTH, other=0.0)
    return rows


@triton.jit
def store_rows(start, row, real, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write those of ``rows`` `[R, BLOCK]` that are ``real``."""
    column = tl.arange(0, BLOCK)
    mask = real[:, None] if WIDTH == BLOCK else real[:, None] & (column < WIDTH)
    tl.store(start + row[:, None] * WIDTH + column, rows.to(start.dtype.element_ty), mask=mask)


@triton.jit
def average(total, weighted):  # type: ignore[no-untyped-def]
    """Rows of the output `[R, BLOCK_DV]`: exactly 0 where a row saw nothing."""
    return weighted / tl.where(total > 0, total, 1.0)[:, None]


def padded(width: int) -> int:
    """A head width as a side of tiles: a power of two, at least 32: narrower ones spill registers on SM100."""
    return max(32, 1 << (width - 1).bit_length())


def shared_constexprs(d: SimpleNamespace, a: SimpleNamespace, floating: str) -> dict[str, Any]:
    """What every attention kernel here is compiled for: widths, scale, precision."""
    return {
        "D": d.D,
        "DV": d.Dv,
        "SCALE": (a.scale or d.D**-0.5) * LOG2_E,
        "PRECISION": "ieee" if floating == "float32" else "tf32",
        "BLOCK_D": padded(d.D),
        "BLOCK_DV": padded(d.Dv),
    }


def float32_blocks(d: SimpleNamespace) -> tuple[int, int, int, int]:
    """Rows and keys of a tile, warps and stages in float32: products are on no tensor cores, and unrolled."""
    width = max(d.D, d.Dv)
    if width > 64:
        return 16, 16, 8, 1
    return (32, 32, 4, 1) if width > 32 else (32, 64, 4, 1)


def keys_of(d: SimpleNamespace, keys: int) -> int:
    """Keys of a tile where a tactic says ``keys``: other widths than 64 and 128 need masks, which take registers."""
    return keys if {d.D, d.Dv} <= {64, 128} else 32


def reason_against(d: SimpleNamespace, a: SimpleNamespace) -> str:
    """Why no attention kernel here applies, whatever its tactic; empty where they do."""
    if max(d.D, d.Dv) > MAX_WIDTH:
        return f"head width {max(d.D, d.Dv)} is above {MAX_WIDTH}"
    if a.scale < 0:
        return f"scale {a.scale} is negative"
    return ""


def reason_for_first_tactic(d: SimpleNamespace, floating: str) -> str:
    """Why a call takes the first tactic and no other; empty where it may take any."""
    if floating == "float32":
        return "float32 has the first tactic alone"
    if d.D % 8 or d.Dv % 8:
        return f"rows of {d.D} and {d.Dv} elements are not aligned to 16 bytes: the first tactic alone"
    return ""

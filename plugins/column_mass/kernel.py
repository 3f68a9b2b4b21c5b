"""ColumnMass's two Triton launches: scores of the window rows against all keys, once for each, never stored.

``window_statistics``: a program holds up to 128 window rows of one head and streams the keys of one part past them,
with the running maximum of FlashAttention (arXiv 2205.14135, section 3.1). All heads of a part start next to each
other, so that a group's heads and row tiles read their keys from memory once and then from L2.

``window_mass``: a program holds a block of keys and goes through the rows of every head of their group, adding up
columns; rows, not keys, are re-read, which are few and stay in L2. The product is keys x rows, so that a column is
summed within four lanes. Blocks overlap by ``pool - 1`` keys: each makes the sums that its pooling needs.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import triton
import triton.language as tl

from plugins.column_mass.steps import GRAIN, LOG2E, PARTS
from trtpass.kernel import Example, Kernel, Launch

MAX_WIDTH = 128  # of heads: wider tiles outgrow the 99 KiB of shared memory of SM86, 89 and 120


@triton.jit
def _tile(x, row, real, depth, D: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of ``x`` `[tokens, D]`, their elements from ``depth`` on: `[rows, BLOCK_D]`, zeros where there are none."""
    d = depth + tl.arange(0, BLOCK_D)
    return tl.load(x + row[:, None] * D + d, mask=real[:, None] & (d < D), other=0.0)


@triton.jit
def _part_size(length, PARTS: tl.constexpr, GRAIN: tl.constexpr):  # type: ignore[no-untyped-def]
    return (length + PARTS * GRAIN - 1) // (PARTS * GRAIN) * GRAIN


@triton.jit
def window_statistics(  # type: ignore[no-untyped-def]
    q,  # [B, H, S, D]
    k,  # [B, Hkv, S, D]
    lengths,  # [B]
    tokens,  # S
    heads,  # H
    key_heads,  # Hkv
    log_sum,  # [B, H, P, W]
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,  # of the scores, times log2(e): the softmax is in powers of two
    PRECISION: tl.constexpr,  # of the matrix products of float32 inputs
    PARTS: tl.constexpr,
    GRAIN: tl.constexpr,
    BLOCK_D: tl.constexpr,  # D, rounded up to a power of two; of float32, what is multiplied at a time
    ROWS: tl.constexpr,  # of a tile of the window
    KEYS: tl.constexpr,  # of a tile; divides GRAIN
):
    tiles: tl.constexpr = (WINDOW + ROWS - 1) // ROWS
    program, batch = tl.program_id(0), tl.program_id(1)
    tile = program % tiles
    head = program // tiles % heads
    part = program // tiles // heads
    length = tl.minimum(tl.load(lengths + batch), tokens)
    row = tile * ROWS + tl.arange(0, ROWS)
    position = tl.maximum(length - WINDOW, 0) + row
    real = (row < WINDOW) & (position < length)

    # Offsets to whole heads pass 2^31 elements, those within a head do not.
    q += (batch * heads + head).to(tl.int64) * tokens * D
    k += (batch * key_heads + head * key_heads // heads).to(tl.int64) * tokens * D
    log_sum += ((batch * heads + head).to(tl.int64) * PARTS + part) * WINDOW
    query = _tile(q, position, real, 0, D, BLOCK_D)
    # Lower than any score, and finite: a row may see no key of this part.
    largest = tl.full([ROWS], -3.4e38, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    size = _part_size(length, PARTS, GRAIN)
    for start in range(part * size, tl.minimum(part * size + size, length), KEYS):
        key_row = start + tl.arange(0, KEYS)
        key = _tile(k, key_row, key_row < length, 0, D, BLOCK_D)
        score = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        for depth in tl.static_range(BLOCK_D, D, BLOCK_D):
            more = _tile(q, position, real, depth, D, BLOCK_D)
            key = _tile(k, key_row, key_row < length, depth, D, BLOCK_D)
            score = tl.dot(more, tl.trans(key), score, input_precision=PRECISION)
        score = tl.where(key_row[None, :] <= position[:, None], score * SCALE, float("-inf"))
        larger = tl.maximum(largest, tl.max(score, 1))
        total = total * tl.exp2(largest - larger) + tl.sum(tl.exp2(score - larger[:, None]), 1)
        largest = larger
    seen = real & (part * size <= position)
    found = tl.where(seen, largest + tl.log2(tl.where(seen, total, 1.0)), 0.0)
    tl.store(log_sum + row, found, mask=row < WINDOW)


@triton.jit
def _later(x, by: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """``x[i + by]``, and anything behind the end."""
    return tl.gather(x, tl.minimum(tl.arange(0, SIZE) + by, SIZE - 1), 0)


@triton.jit
def _sums_from(x, WIDTH: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """``sum(x[i : i + WIDTH])`` for the i of which that many elements are there, by doubling: 2 log2(WIDTH) shifts."""
    found = tl.zeros([SIZE], tl.float32)
    for bit in tl.static_range(8):  # x is the sum of 2^bit elements
        if (WIDTH >> bit) % 2 == 1:
            found += _later(x, WIDTH % (1 << bit), SIZE)
        if (WIDTH >> bit) > 1:
            x += _later(x, 1 << bit, SIZE)
    return found


@triton.jit
def window_mass(  # type: ignore[no-untyped-def]
    q,  # [B, H, S, D]
    k,  # [B, Hkv, S, D]
    lengths,  # [B]
    log_sum,  # [B, H, P, W]
    tokens,  # S
    heads,  # H
    key_heads,  # Hkv
    mass,  # [B, H, S]
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,  # of the scores, times log2(e)
    PRECISION: tl.constexpr,  # of the matrix products of float32 inputs
    PARTS: tl.constexpr,
    GRAIN: tl.constexpr,
    BLOCK_D: tl.constexpr,  # D, rounded up to a power of two; of float32, what is multiplied at a time
    POOL: tl.constexpr,
    PREFIX: tl.constexpr,
    ROWS: tl.constexpr,  # of a tile of the window
    COLUMNS: tl.constexpr,  # of which COLUMNS - POOL + 1 are the program's own
):
    program, batch = tl.program_id(0), tl.program_id(1)
    group = heads // key_heads
    key_head = program % key_heads
    own: tl.constexpr = COLUMNS - POOL + 1
    start = program // key_heads * own
    length = tl.minimum(tl.load(lengths + batch), tokens)
    first = tl.maximum(length - WINDOW, 0)
    end = length
    if PREFIX:
        end = first

    # Offsets to whole heads pass 2^31 elements, those within a head do not.
    head = batch * heads + key_head * group
    k += (batch * key_heads + key_head).to(tl.int64) * tokens * D
    lane = tl.arange(0, COLUMNS)
    column = start + lane  # of mass: its pool begins at key_row
    owned = (lane < own) & (column < tokens)
    if start >= end:
        for member in range(group):
            here = mass + (head + member).to(tl.int64) * tokens
            tl.store(here + column, tl.zeros([COLUMNS], tl.float32), mask=owned)
        return

    key_row = column - POOL // 2
    counted = (key_row >= 0) & (key_row < end)
    key = _tile(k, key_row, counted, 0, D, BLOCK_D)
    part = tl.arange(0, PARTS)
    size = _part_size(length, PARTS, GRAIN)
    tiles = (length - first + ROWS - 1) // ROWS
    columns = tl.zeros([COLUMNS], tl.float32)
    # One loop over heads and their row tiles, so that the rows of the next head are on their way while one ends.
    for step in tl.range(0, group * tiles, num_stages=2):
        here = (head + step // tiles).to(tl.int64)
        row = step % tiles * ROWS + tl.arange(0, ROWS)
        position = first + row
        real = position < length
        rows_of_head = q + here * tokens * D
        query = _tile(rows_of_head, position, real, 0, D, BLOCK_D)
        sums = log_sum + here * (PARTS * WINDOW) + part[:, None] * WINDOW + row  # [PARTS, ROWS]
        sums = tl.load(sums, mask=real[None, :], other=0.0)
        sums = tl.where(part[:, None] * size <= position[None, :], sums, float("-inf"))  # all rows see the first part
        largest = tl.max(sums, 0)
        denominator = largest + tl.log2(tl.sum(tl.exp2(sums - largest[None, :]), 0))
        denominator = tl.where(real, denominator, float("inf"))  # rows that are not there weigh nothing
        score = tl.dot(key, tl.trans(query), input_precision=PRECISION)
        for depth in tl.static_range(BLOCK_D, D, BLOCK_D):
            more = _tile(k, key_row, counted, depth, D, BLOCK_D)
            query = _tile(rows_of_head, position, real, depth, D, BLOCK_D)
            score = tl.dot(more, tl.trans(query), score, input_precision=PRECISION)
        weight = tl.exp2(score * SCALE - denominator[None, :])
        columns += tl.sum(tl.where(key_row[:, None] <= position[None, :], weight, 0.0), 1)
        if step % tiles == tiles - 1:
            pooled = _sums_from(tl.where(counted, columns, 0.0), POOL, COLUMNS) / POOL
            tl.store(mass + here * tokens + column, tl.where(column < end, pooled, 0.0), mask=owned)
            columns = tl.zeros([COLUMNS], tl.float32)


def _common(d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace) -> dict[str, Any]:
    wide = dtypes.q == "float32"
    return {
        "D": d.D,
        "WINDOW": a.window,
        "SCALE": (a.scale or d.D**-0.5) * LOG2E,
        "PRECISION": "ieee" if wide else "tf32",
        "PARTS": PARTS,
        "GRAIN": GRAIN,
        "BLOCK_D": 32 if wide else max(32, 1 << (d.D - 1).bit_length()),
    }


def _rows(window: int, least: int, most: int) -> int:
    """Rows of a tile of the window: no more than there are."""
    return min(most, max(least, 1 << (window - 1).bit_length()))


def _statistics(d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace) -> Launch:
    wide = dtypes.q == "float32"
    rows = _rows(a.window, 16, 64) if wide else _rows(a.window, 64, tactic.rows)  # wgmma takes 64 and more
    tiles = (a.window + rows - 1) // rows
    constexprs = {**_common(d, a, dtypes), "ROWS": rows, "KEYS": 64 if wide else tactic.keys}
    warps = 8 if wide or rows > 64 else 4
    return Launch((d.H * (tiles * PARTS), d.B, 1), (d.S, d.H, d.Hkv), constexprs, warps)


def _columns(dtypes: SimpleNamespace, tactic: SimpleNamespace) -> int:
    return 64 if dtypes.q == "float32" else int(tactic.columns)


def _mass(d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace) -> Launch:
    wide, columns = dtypes.q == "float32", _columns(dtypes, tactic)
    own = columns - a.pool + 1
    constexprs = {
        **_common(d, a, dtypes),
        "POOL": a.pool,
        "PREFIX": a.prefix,
        "ROWS": _rows(a.window, 16, 32 if wide else 64),
        "COLUMNS": columns,
    }
    grid = ((d.S + (own - 1)) // own * d.Hkv, d.B, 1)
    return Launch(grid, (d.S, d.H, d.Hkv), constexprs, warps=8 if wide or columns > 64 else 4)


def _supports(
    d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace, cc: int
) -> bool | str:
    if cc < 80:
        return f"compute capability {cc} is below 80"
    if d.D > MAX_WIDTH:
        return f"head width {d.D} is above {MAX_WIDTH}"
    return True


def _pools(
    d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace, cc: int
) -> bool | str:
    columns = _columns(dtypes, tactic)
    if a.pool > columns // 2:
        return f"a pool of {a.pool} columns is above half of a block of {columns}"
    if columns > 128 and not 90 <= cc < 120:  # elsewhere products take both operands from registers
        return f"blocks of {columns} columns spill registers on SM{cc}"
    return _supports(d, a, dtypes, tactic, cc)


def _sizes(tokens: int) -> dict[str, int]:
    return {"B": 1, "H": 32, "Hkv": 8, "S": tokens, "D": 128}


WINDOW = 128  # of the examples: the default of the operator


def _statistics_example(tokens: int) -> Example:
    heads, key_heads, width = 32, 8, 128
    return Example(
        sizes=_sizes(tokens),
        flops=heads * WINDOW * tokens * (2 * width + 4),  # a product; scale, maximum, exponential, sum
        bytes=2 * width * (key_heads * tokens + heads * WINDOW) + 4 * heads * PARTS * WINDOW,
        tensor=True,
        attrs={"window": WINDOW},
    )


def _mass_example(tokens: int) -> Example:
    heads, key_heads, width, pool = 32, 8, 128, 7
    return Example(
        sizes={**_sizes(tokens), "P": PARTS, "W": WINDOW},
        flops=heads * tokens * (WINDOW * (2 * width + 3) + pool),  # a product; scale, exponential, sum; the pool
        bytes=2 * width * (key_heads * tokens + heads * WINDOW) + 4 * heads * (PARTS * WINDOW + tokens),
        tensor=True,
        attrs={"window": WINDOW, "pool": pool, "prefix": 1},
    )


EXTRAS = ("tokens", "heads", "key_heads")
STATISTICS = Kernel(
    function=window_statistics,
    fixed=("D",),
    extras=EXTRAS,
    geometry=_statistics,
    supports=_supports,
    example=_statistics_example,
    tactics=({"rows": 128, "keys": 128}, {"rows": 64, "keys": 128}, {"rows": 128, "keys": 64}),
)
MASS = Kernel(
    function=window_mass,
    fixed=("D",),
    extras=EXTRAS,
    geometry=_mass,
    supports=_pools,
    example=_mass_example,
    tactics=({"columns": 128}, {"columns": 256}, {"columns": 64}),
)

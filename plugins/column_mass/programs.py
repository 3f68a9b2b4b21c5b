"""What ColumnMass's two launches execute; ``kernel.py`` declares them and says how the work is divided."""

from __future__ import annotations

import triton
import triton.language as tl


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

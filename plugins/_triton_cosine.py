"""Norms for Triton kernels that compare tokens by cosine, as in ``plugins._cosine``; a launch of its own.

A program reduces ``ROWS`` rows of E values, so there are as many programs as an H100 holds from a few thousand rows on;
each value is read once, which is all the work there is. Kernels that multiply tiles of rows would otherwise take every
tile through registers a second time, to sum its squares, once for each tile that it is multiplied with.
"""

from __future__ import annotations

from types import SimpleNamespace

import triton
import triton.language as tl

from trtpass.kernel import Example, Kernel, Launch

SMALLEST = tl.constexpr(1.1754943508222875e-38)  # normal number of float32
LARGEST = tl.constexpr(3.4028234663852886e38)  # of float32
ROWS = 16


@triton.jit
def inverse_norm(square):  # type: ignore[no-untyped-def]
    """1 / sqrt(square), and 0 for a row without a direction: a sum of squares that is not a finite normal float32.

    Exactly rounded, so that vectors whose norms are powers of two have exact cosines, and exact ties.
    """
    directed = (square >= SMALLEST) & (square <= LARGEST)  # False for NaN
    return tl.where(directed, tl.div_rn(1.0, tl.sqrt_rn(tl.where(directed, square, 1.0))), 0.0)


@triton.jit
def squared_norms(x, valid, E: tl.constexpr, BLOCK_E: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums of squares in float32 of the rows that ``x`` points at, 0 where a row is not valid: `[rows]` of each."""
    e = tl.arange(0, BLOCK_E)
    total = tl.zeros(x.shape, tl.float32)
    for start in tl.range(0, E, BLOCK_E, num_stages=3):
        value = tl.load(x[:, None] + (start + e), mask=valid[:, None] & (e < E - start), other=0.0).to(tl.float32)
        total += tl.sum(value * value, 1)
    return total


@triton.jit
def row_directions(  # type: ignore[no-untyped-def]
    x,  # [B, rows, E]
    lengths,  # [B]
    rows,
    inverse,  # [B, rows]
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = row < tl.minimum(tl.load(lengths + batch), rows)
    square = squared_norms(x + (batch * rows + row) * E, real, E, BLOCK_E)
    tl.store(inverse + batch * rows + row, inverse_norm(square), mask=row < rows)


def directions(axis: str) -> Kernel:
    """The kernel of ``(x [B, axis, E], lengths [B]) -> inverse [B, axis]``."""

    def geometry(d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace) -> Launch:
        rows = getattr(d, axis)
        constexprs = {"E": d.E, "BLOCK": ROWS, "BLOCK_E": min(256, max(16, 1 << (d.E - 1).bit_length()))}
        return Launch(((rows + (ROWS - 1)) // ROWS, d.B, 1), (rows,), constexprs)

    def example(tokens: int) -> Example:
        rows, width = min(tokens, 25088), 896
        return Example(
            sizes={"B": 1, axis: rows, "E": width},
            flops=2 * rows * width,
            bytes=2 * rows * width + 4 * rows,
            tensor=False,
            attrs={},
        )

    return Kernel(row_directions, ("E",), ("rows",), geometry, example)

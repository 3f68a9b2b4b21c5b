"""Matching as a Triton launch: cosines in tiles that are reduced to the best column at once and never stored.

A program owns ``BLOCK_S`` rows of a and goes through all valid rows of b in blocks of ``BLOCK_R``, each a matrix
product over E: a video's 25 000 tokens make one wave of programs on an H100, three to a multiprocessor, and rows of b
are re-read from L2. Raw rows are multiplied, on tensor cores with float32 sums where they are float16 or bfloat16:
products of those are exact, and scaling by norms afterwards loses nothing against scaling before. The norm of a row of
a scales all its cosines alike, so it is applied only at the end.

What a row without a direction holds reaches its own row or column of the product only, which the masks take out.
Equal rows of b have equal cosines to the last bit, whatever their place: every column is computed in the same order.
"""

from __future__ import annotations

from types import SimpleNamespace

import triton
import triton.language as tl

from plugins._triton_cosine import inverse_norm, squared_norms
from trtpass.kernel import Example, Kernel, Launch


@triton.jit
def best_match(  # type: ignore[no-untyped-def]
    a,  # [B, S, E]
    b,  # [B, R, E]
    inverse,  # [B, R]
    lengths,  # [B]
    tokens,  # S
    rows,  # R
    match,  # [B, S]
    similarity,  # [B, S]
    E: tl.constexpr,
    PRECISION: tl.constexpr,  # of the matrix products of float32 inputs
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    EVEN: tl.constexpr = E % BLOCK_E == 0
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    length = tl.minimum(tl.load(lengths + batch), rows)
    e = tl.arange(0, BLOCK_E)
    # Rows outside are rows at the edge, read once more: a mask for rows would only keep loads from being wide.
    left = a + (batch * tokens + tl.minimum(token, tokens - 1)) * E
    scale = inverse_norm(squared_norms(left, token < tokens, E, BLOCK_E))

    best = tl.full([BLOCK_S], float("-inf"), tl.float32)
    chosen = tl.zeros([BLOCK_S], tl.int32) + rows
    for first in range(0, length, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        right = b + (batch * rows + tl.minimum(row, rows - 1)) * E
        product = tl.zeros([BLOCK_S, BLOCK_R], tl.float32)
        for start in range(0, E, BLOCK_E):
            x = tl.load(left[:, None] + (start + e), mask=EVEN | (e < E - start), other=0.0)
            y = tl.load(right[:, None] + (start + e), mask=EVEN | (e < E - start), other=0.0)
            product = tl.dot(x, tl.trans(y), product, input_precision=PRECISION)
        shrink = tl.load(inverse + batch * rows + row, mask=row < length, other=0.0)
        cosine = tl.where((shrink > 0.0)[None, :], product * shrink[None, :], float("-inf"))
        highest = tl.max(cosine, 1)
        lowest = tl.min(tl.where(cosine == highest[:, None], row[None, :], rows), 1)
        # Earlier blocks win ties. Nothing is above -inf, so what cannot be chosen is not; nor is NaN.
        larger = highest > best
        chosen = tl.where(larger, lowest, chosen)
        best = tl.where(larger, highest, best)

    chooses = (scale > 0.0) & (best > float("-inf"))
    out = batch * tokens + token
    tl.store(match + out, tl.where(chooses, chosen, rows), mask=token < tokens)
    tl.store(similarity + out, tl.where(chooses, best * scale, float("-inf")), mask=token < tokens)


def _geometry(d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace) -> Launch:
    wide = dtypes.a == "float32"
    block = 64 if wide else tactic.block_s
    constexprs = {
        "E": d.E,
        "PRECISION": "ieee" if wide else "tf32",
        "BLOCK_S": block,
        "BLOCK_R": 64 if wide else tactic.block_r,
        "BLOCK_E": 8 if wide else 64,  # wider ones spill registers where products are sums of single multiplications
    }
    grid = ((d.S + (block - 1)) // block, d.B, 1)
    return Launch(grid, (d.S, d.R), constexprs, warps=8 if wide else tactic.warps, stages=2 if wide else 3)


def _supports(
    d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace, cc: int
) -> bool | str:
    if dtypes.a == "float32" and tactic.warps > 4:
        return "float32 has blocks of its own"
    if tactic.block_r > 128 and cc != 90:
        return f"blocks of {tactic.block_r} rows spill registers or outgrow shared memory on compute capability {cc}"
    return True


def _example(tokens: int) -> Example:
    tokens = min(tokens, 25088)  # a video of 128 frames with 196 tokens each
    rows, width = tokens // 8, 896
    return Example(
        sizes={"B": 1, "S": tokens, "R": rows, "E": width},
        flops=2 * tokens * rows * width,
        bytes=2 * width * (tokens + rows) + 4 * rows + 8 * tokens,
        tensor=True,
        attrs={},
        note="an eighth of the tokens are representatives, which all tokens join",
    )


MATCH = Kernel(
    function=best_match,
    fixed=("E",),
    extras=("tokens", "rows"),
    geometry=_geometry,
    supports=_supports,
    example=_example,
    tactics=(
        {"block_s": 64, "block_r": 128, "warps": 4},
        {"block_s": 128, "block_r": 128, "warps": 8},
        {"block_s": 128, "block_r": 256, "warps": 8},
    ),
)

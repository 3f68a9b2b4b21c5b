"""The graph of similar pairs as bits, in one Triton launch.

A program owns a pair of blocks of ``BLOCK`` tokens and the words of both: their product is computed once, for i < j,
and its bits are written along both axes, which makes the graph symmetric whatever the rounding. Of n blocks every
distance 0 to n // 2 around a circle is taken once, so that half of the S x S products are never started; programs that
run together take blocks near each other (groups of ``GROUP`` rows), which keeps what they read in L2.

Raw rows are multiplied, on tensor cores with float32 sums where they are float16 or bfloat16: products of those are
exact, and scaling by norms afterwards loses nothing against scaling before. What a row without a direction holds
reaches its own row and column of the product only, which its inverse norm of 0 takes out.
"""

from __future__ import annotations

from types import SimpleNamespace

import triton
import triton.language as tl

from trtpass.kernel import Example, Kernel, Launch


@triton.jit
def similar_pairs(  # type: ignore[no-untyped-def]
    x,  # [B, S, E]
    inverse,  # [B, S]
    tokens,  # S
    pairs,  # [B, S, W]
    E: tl.constexpr,
    TAU: tl.constexpr,
    PRECISION: tl.constexpr,  # of the matrix products of float32 inputs
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr,
):
    EVEN: tl.constexpr = E % BLOCK_E == 0
    WORDS: tl.constexpr = BLOCK // 32
    batch = tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(tokens, BLOCK)
    distances = blocks // 2 + 1
    place, distance = tl.program_id(0) // distances, tl.program_id(0) % distances
    place, distance = tl.swizzle2d(place, distance, blocks, distances, GROUP)
    if (distance * 2 == blocks) & (place >= distance):  # the other half of the circle has it
        return
    other = (place + distance) % blocks
    first, second = tl.minimum(place, other) * BLOCK, tl.maximum(place, other) * BLOCK

    i, j = first + tl.arange(0, BLOCK), second + tl.arange(0, BLOCK)
    e = tl.arange(0, BLOCK_E)
    # Rows outside are rows at the edge, read once more: a mask for rows would only keep loads from being wide.
    left = x + (batch * tokens + tl.minimum(i, tokens - 1)) * E
    right = x + (batch * tokens + tl.minimum(j, tokens - 1)) * E
    product = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, E, BLOCK_E):
        a = tl.load(left[:, None] + (start + e), mask=EVEN | (e < E - start), other=0.0)
        b = tl.load(right[:, None] + (start + e), mask=EVEN | (e < E - start), other=0.0)
        product = tl.dot(a, tl.trans(b), product, input_precision=PRECISION)
    row_scale = tl.load(inverse + batch * tokens + i, mask=i < tokens, other=0.0)[:, None]
    column_scale = tl.load(inverse + batch * tokens + j, mask=j < tokens, other=0.0)[None, :]
    above = product * row_scale * column_scale > TAU
    above = above & (row_scale > 0.0) & (column_scale > 0.0) & (i[:, None] < j[None, :])

    bit = 1 << tl.arange(0, 32)
    set_ = above.to(tl.int32)
    row_words = tl.sum(tl.reshape(set_, [BLOCK, WORDS, 32]) * bit, 2)  # of i, over j
    column_words = tl.trans(tl.sum(tl.reshape(set_, [WORDS, 32, BLOCK]) * bit[:, None], 1))  # of j, over i
    words = tl.cdiv(tokens, 32)
    word = tl.arange(0, WORDS)[None, :]
    i_word, j_word = first // 32 + word, second // 32 + word
    if first == second:
        row_words += column_words  # above and below the diagonal: no bit is in both
    else:
        columns = pairs + (batch * tokens + j)[:, None] * words + i_word
        tl.store(columns, column_words, mask=(j < tokens)[:, None] & (i_word < words))
    rows = pairs + (batch * tokens + i)[:, None] * words + j_word
    tl.store(rows, row_words, mask=(i < tokens)[:, None] & (j_word < words))


def _geometry(d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace) -> Launch:
    wide = dtypes.x == "float32"
    block = 64 if wide else tactic.block
    constexprs = {
        "E": d.E,
        "TAU": max(-2.0, min(2.0, a.tau)),  # no cosine is beyond
        "PRECISION": "ieee" if wide else "tf32",
        "BLOCK": block,
        "BLOCK_E": 32 if wide else 64,
        "GROUP": 8,
    }
    blocks = (d.S + (block - 1)) // block
    grid = (blocks * (blocks // 2 + 1), d.B, 1)
    return Launch(grid, (d.S,), constexprs, warps=4 if wide else tactic.warps, stages=2 if wide else 3)


def _supports(
    d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace, cc: int
) -> bool | str:
    if dtypes.x == "float32" and tactic.warps < 8:
        return "float32 has blocks of its own"
    return a.tau == a.tau or "tau is NaN"


def _example(tokens: int) -> Example:
    tokens, width = min(tokens, 25088), 896  # a video of 128 frames with 196 tokens each
    return Example(
        sizes={"B": 1, "S": tokens, "E": width},
        flops=tokens * (tokens - 1) * width,  # half of the square
        bytes=2 * tokens * width + tokens * (tokens + 31) // 8 + 4 * tokens,
        tensor=True,
        attrs={},
        note="every pair once",
    )


PAIRS = Kernel(
    function=similar_pairs,
    fixed=("E",),
    extras=("tokens",),
    geometry=_geometry,
    supports=_supports,
    example=_example,
    tactics=({"block": 128, "warps": 8}, {"block": 64, "warps": 4}),
)

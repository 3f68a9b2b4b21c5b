"""Rounds of joining trees, as Triton launches.

``Neighbours`` and ``LowestRoots`` read the bits of the graph, S^2 / 8 bytes, and own 8 rows a program, which makes a
thousand programs of 8192 tokens; rows that are settled are not read. ``JoinTrees`` touches vectors of S tokens
only, but every token may depend on every other: one program owns a batch row and has barriers where launches would be.
"""

from __future__ import annotations

from types import SimpleNamespace

import triton
import triton.language as tl

from plugins._triton_graph import bits_of, follow, lowest_bit, roots_around
from trtpass.kernel import Example, Kernel, Launch


@triton.jit
def neighbours(  # type: ignore[no-untyped-def]
    pairs,  # [B, S, W]
    tokens,  # S
    lowest,  # [B, S]
    degree,  # [B, S]
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    words = tl.cdiv(tokens, 32)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < tokens
    near = row[:, None] + tl.zeros([1, WORDS], tl.int32)
    count = tl.zeros([ROWS, WORDS], tl.int32)
    for start in tl.range(0, words, WORDS, num_stages=3):
        index = start + tl.arange(0, WORDS)
        place = pairs + (batch * tokens + row)[:, None] * words + index
        word = tl.load(place, mask=real[:, None] & (index < words), other=0)
        near = tl.where(word != 0, tl.minimum(near, index * 32 + lowest_bit(word)), near)
        count += bits_of(word)
    tl.store(lowest + batch * tokens + row, tl.min(near, 1), mask=real)
    tl.store(degree + batch * tokens + row, tl.sum(count, 1), mask=real)


@triton.jit
def lowest_roots(  # type: ignore[no-untyped-def]
    pairs,  # [B, S, W]
    root,  # [B, S]
    unsettled,  # [B, S]
    tokens,  # S
    lowest,  # [B, S]
    border,  # [B, S]
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    words = tl.cdiv(tokens, 32)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < tokens
    own = tl.load(root + batch * tokens + row, mask=real, other=0)
    looks = tl.load(unsettled + batch * tokens + row, mask=real, other=0) != 0
    low, high = own, own
    if tl.max(looks.to(tl.int32), 0) > 0:
        low, high = roots_around(pairs + batch * tokens * words, root + batch * tokens, row, looks, own, words, WORDS)
    tl.store(lowest + batch * tokens + row, low, mask=real)
    tl.store(border + batch * tokens + row, (low < high).to(tl.int32), mask=real)


@triton.jit
def join_trees(  # type: ignore[no-untyped-def]
    root,  # [B, S]
    lowest,  # [B, S]
    tokens,  # S
    joined,  # [B, S]
    BLOCK: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    root += batch * tokens
    lowest += batch * tokens
    joined += batch * tokens
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        tl.store(joined + token, tl.load(root + token, mask=token < tokens, other=0), mask=token < tokens)
    tl.debug_barrier()
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        own = tl.load(root + token, mask=token < tokens, other=0)
        found = tl.load(lowest + token, mask=token < tokens, other=0)
        # A minimum does not depend on the order in which its members come.
        tl.atomic_min(joined + own, found, mask=(token < tokens) & (found < own), sem="relaxed")
    follow(joined, tokens, BLOCK)


def _by_rows(d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace) -> Launch:
    grid = ((d.S + (tactic.rows - 1)) // tactic.rows, d.B, 1)
    return Launch(grid, (d.S,), {"ROWS": tactic.rows, "WORDS": tactic.words}, stages=1)


def _by_batch(d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace) -> Launch:
    return Launch((d.B, 1, 1), (d.S,), {"BLOCK": tactic.block}, warps=tactic.warps, stages=1)


def graph_example(tokens: int, vectors: int, graph: bool = True) -> Example:
    """One graph of up to 25 088 tokens, a video of 128 frames; ``vectors`` of them are read or written."""
    tokens = min(tokens, 25088)
    words = (tokens + 31) // 32
    return Example(
        sizes={"B": 1, "S": tokens, **({"W": words} if graph else {})},
        flops=tokens * words if graph else tokens,
        bytes=4 * tokens * words * graph + 4 * tokens * vectors,
        tensor=False,
        attrs={},
        note="every word of bits once" if graph else "",
    )


def _neighbours_example(tokens: int) -> Example:
    return graph_example(tokens, 2)


def _lowest_example(tokens: int) -> Example:
    return graph_example(tokens, 4)


def _join_example(tokens: int) -> Example:
    return graph_example(tokens, 3, graph=False)


TILES = ({"rows": 8, "words": 64}, {"rows": 32, "words": 16})  # four words a thread; of long rows, and of short ones
BLOCKS = ({"block": 4096, "warps": 16}, {"block": 512, "warps": 4})  # for long rows; for many short ones
NEIGHBOURS = Kernel(neighbours, (), ("tokens",), _by_rows, _neighbours_example, TILES)
LOWEST = Kernel(lowest_roots, (), ("tokens",), _by_rows, _lowest_example, TILES)
JOIN = Kernel(join_trees, (), ("tokens",), _by_batch, _join_example, BLOCKS)

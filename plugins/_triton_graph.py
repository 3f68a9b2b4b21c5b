"""What kernels on graphs of bits share: counting bits, roots of neighbours, and trees of pointers in global memory."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def bits_of(word):  # type: ignore[no-untyped-def]
    """How many bits are set in each int32."""
    n = word.to(tl.uint32)
    n = n - ((n >> 1) & 0x55555555)
    n = (n & 0x33333333) + ((n >> 2) & 0x33333333)
    n = (n + (n >> 4)) & 0x0F0F0F0F
    return ((n * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def lowest_bit(word):  # type: ignore[no-untyped-def]
    """Position of the lowest set bit of each int32, 0 to 31; negative where none is set."""
    alone = (word & (0 - word)).to(tl.uint32)
    return (alone.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127  # a power of two, exactly


@triton.jit
def roots_around(  # type: ignore[no-untyped-def]
    pairs,  # of the batch row: [S, W]
    root,  # of the batch row: [S]
    row,  # [ROWS]
    looks,  # [ROWS]: rows to look at
    own,  # [ROWS]: their roots
    words,  # W
    WORDS: tl.constexpr,
):
    """The lowest and the highest root of each row and its neighbours: `[ROWS]` each.

    Set bits are taken out one by one, as often as the fullest word of a tile needs: graphs of similar tokens have few.
    """
    low = own[:, None] + tl.zeros([1, WORDS], tl.int32)
    high = low
    for start in range(0, words, WORDS):
        index = start + tl.arange(0, WORDS)
        word = tl.load(
            pairs + row.to(tl.int64)[:, None] * words + index, mask=looks[:, None] & (index < words), other=0
        )
        for _ in range(tl.max(tl.max(bits_of(word), 1), 0)):
            found = word != 0
            near = tl.load(root + (index * 32 + lowest_bit(word)), mask=found, other=0)
            low = tl.where(found, tl.minimum(low, near), low)
            high = tl.maximum(high, near)
            word = word & (word - 1)
    return tl.min(low, 1), tl.max(high, 1)


@triton.jit
def follow(parent, tokens, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Make every pointer `[S]` point at the end of its path: each round halves all paths.

    ``parent`` lies in global memory and belongs to this program alone. Its threads see what others of them wrote
    before the last barrier: ``bar.sync`` orders global memory within a program. Between two barriers a thread may see a
    pointer before or after it was moved, either of which is on the path to the same end.
    """
    moved = 1
    while moved > 0:
        tl.debug_barrier()
        change = tl.zeros([BLOCK], tl.int32)
        for start in range(0, tokens, BLOCK):
            token = start + tl.arange(0, BLOCK)
            real = token < tokens
            before = tl.load(parent + token, mask=real, other=0)
            after = tl.load(parent + before, mask=real, other=0)
            tl.store(parent + token, after, mask=real & (after != before))
            change = change | (real & (after != before)).to(tl.int32)
        moved = tl.max(change, 0)
    tl.debug_barrier()

"""Names of components as a Triton launch: what is left to join, then heads, then numbers.

Only vectors of S tokens are touched where the rounds before have settled the graph, but every token may depend on every
other: one program owns a batch row. Its outputs are its scratch memory, in which its threads see what others of them
wrote before the last barrier: ``bar.sync`` orders global memory within a program. Sums of integers, minima and maxima
do not depend on the order of the atomics that make them.
"""

from __future__ import annotations

from types import SimpleNamespace

import triton
import triton.language as tl

from plugins._triton_graph import follow, roots_around
from plugins.connected_components.trees import graph_example
from trtpass.kernel import Example, Kernel, Launch


@triton.jit
def join_the_rest(  # type: ignore[no-untyped-def]
    pairs, root, lowest, border, label, tree, head, tokens,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Make ``tree`` the lowest member of each token's component: rounds as those before, until nothing moves.

    In a round ``label`` holds the roots, ``tree`` what they join, and ``head`` whether a row has neighbours elsewhere.
    """
    change = tl.zeros([BLOCK], tl.int32)
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        real = token < tokens
        own = tl.load(root + token, mask=real, other=0)
        tl.store(tree + token, own, mask=real)
        tl.store(head + token, tl.load(border + token, mask=real, other=0), mask=real)
        change = change | (real & (tl.load(lowest + token, mask=real, other=0) < own)).to(tl.int32)
    tl.debug_barrier()
    moved = tl.max(change, 0)
    if moved > 0:
        for start in range(0, tokens, BLOCK):
            token = start + tl.arange(0, BLOCK)
            own = tl.load(root + token, mask=token < tokens, other=0)
            found = tl.load(lowest + token, mask=token < tokens, other=0)
            tl.atomic_min(tree + own, found, mask=(token < tokens) & (found < own), sem="relaxed")
        follow(tree, tokens, BLOCK)
    while moved > 0:
        for start in range(0, tokens, BLOCK):
            token = start + tl.arange(0, BLOCK)
            tl.store(label + token, tl.load(tree + token, mask=token < tokens, other=0), mask=token < tokens)
        tl.debug_barrier()
        moved = 0
        for start in range(0, tokens, ROWS):
            row = start + tl.arange(0, ROWS)
            looks = tl.load(head + row, mask=row < tokens, other=0) != 0
            if tl.max(looks.to(tl.int32), 0) > 0:
                own = tl.load(label + row, mask=looks, other=0)
                low, high = roots_around(pairs, label, row, looks, own, tl.cdiv(tokens, 32), WORDS)
                tl.store(head + row, (low < high).to(tl.int32), mask=looks)
                tl.atomic_min(tree + own, low, mask=looks & (low < own), sem="relaxed")
                moved = tl.maximum(moved, tl.max((looks & (low < own)).to(tl.int32), 0))
        follow(tree, tokens, BLOCK)


@triton.jit
def component_labels(  # type: ignore[no-untyped-def]
    pairs,  # [B, S, W]
    root,  # [B, S]
    lowest,  # [B, S]
    border,  # [B, S]
    degree,  # [B, S]
    lengths,  # [B]
    tokens,  # S
    label,  # [B, S]
    components,  # [B]
    tree,  # [B, S]
    head,  # [B, S]
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    length = tl.minimum(tl.load(lengths + batch), tokens)
    pairs += batch * tokens * tl.cdiv(tokens, 32)
    root += batch * tokens
    lowest += batch * tokens
    border += batch * tokens
    degree += batch * tokens
    label += batch * tokens
    tree += batch * tokens
    head += batch * tokens
    join_the_rest(pairs, root, lowest, border, label, tree, head, tokens, BLOCK, ROWS, WORDS)

    # The highest degree of each component, in label of its lowest member; then the lowest token that has it, in head.
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        tl.store(label + token, tl.full([BLOCK], -1, tl.int32), mask=token < tokens)
        tl.store(head + token, tl.zeros([BLOCK], tl.int32) + tokens, mask=token < tokens)
    tl.debug_barrier()
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        member_of = tl.load(tree + token, mask=token < tokens, other=0)
        similar = tl.load(degree + token, mask=token < tokens, other=0)
        tl.atomic_max(label + member_of, similar, mask=token < tokens, sem="relaxed")
    tl.debug_barrier()
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        member_of = tl.load(tree + token, mask=token < tokens, other=0)
        similar = tl.load(degree + token, mask=token < tokens, other=-1)
        most = tl.load(label + member_of, mask=token < tokens, other=0)
        tl.atomic_min(head + member_of, token, mask=(token < tokens) & (similar == most), sem="relaxed")
    tl.debug_barrier()
    # To all members; what is read here, of lowest members, is written as it was.
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        member_of = tl.load(tree + token, mask=token < tokens, other=0)
        tl.store(head + token, tl.load(head + member_of, mask=token < tokens, other=0), mask=token < tokens)
    tl.debug_barrier()

    # Numbers of heads in label, then of their members; again, what is read, of heads, is written as it was.
    total = 0
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        own = tl.load(head + token, mask=token < length, other=-1) == token
        number = total + tl.cumsum(own.to(tl.int32), 0) - 1
        tl.store(label + token, number, mask=own)
        total += tl.sum(own.to(tl.int32), 0)
    tl.store(components + batch, total)
    tl.debug_barrier()
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        own = tl.load(head + token, mask=token < length, other=0)
        number = tl.load(label + own, mask=token < length, other=0)
        tl.store(label + token, tl.where(token < length, number, tokens), mask=token < tokens)


def _geometry(d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace) -> Launch:
    constexprs = {"BLOCK": tactic.block, "ROWS": tactic.rows, "WORDS": tactic.words}
    return Launch((d.B, 1, 1), (d.S,), constexprs, warps=tactic.warps, stages=1)


def _example(tokens: int) -> Example:
    made = graph_example(tokens, 7)
    sizes, vectors = made.sizes, 4 * 7 * made.sizes["S"]
    return Example(sizes, made.sizes["S"] * 7, vectors, False, {}, "a graph that is settled, whose bits are not read")


LABELS = Kernel(
    component_labels,
    (),
    ("tokens",),
    _geometry,
    _example,
    # Long rows; many short ones. Larger blocks, or tiles of more words, spill registers on one GPU or another.
    (
        {"block": 2048, "rows": 4, "words": 256, "warps": 16},
        {"block": 512, "rows": 64, "words": 8, "warps": 4},
    ),
)

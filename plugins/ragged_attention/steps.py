"""RaggedAttention of few queries in two launches: parts of the slots side by side, then one average over the parts.

One query of one sequence makes Hkv programs, which leaves most of a GPU idle; so slots are cut into parts, as in
FlashDecoding (Dao, Haziza, Massa, Sizov, 2023) and PagedAttention V2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from trtpass.kernel import Kernel
from trtpass.op import FLOAT32, FLOATS, INT32, Port, Tolerance, op

if TYPE_CHECKING:
    from torch import Tensor

PART = 256  # slots of one part: 128 KiB of keys and values at 128 wide, a few tiles each

SOURCE = (
    "FlashAttention-2, arXiv 2307.08691, section 3.1 (parts of a softmax), for pages as in arXiv 2309.06180, section 4"
)


@op(
    name="RaggedPartial",
    source=SOURCE,
    shape=lambda d, a: {
        "partial": (d.B, d.H, d.S, (d.M * d.Z + (PART - 1)) // PART, d.Dv),
        "largest": (d.B, d.H, d.S, (d.M * d.Z + (PART - 1)) // PART),
        "total": (d.B, d.H, d.S, (d.M * d.Z + (PART - 1)) // PART),
    },
    tolerance=Tolerance(
        atol={"float32": 2e-5, "float16": 4e-3},
        rtol={"float32": 1e-4, "float16": 4e-3},
        reason="as RaggedAttention: averages of held values, scores of a few units and sums of at most 256 weights",
    ),
)
def ragged_partial(
    q: Annotated[Tensor, Port("B H S D", FLOATS)],
    k_pages: Annotated[Tensor, Port("P Z D", FLOATS)],
    v_pages: Annotated[Tensor, Port("P Z Dv", FLOATS)],
    page_table: Annotated[Tensor, Port("B Hkv M", INT32)],
    lengths: Annotated[Tensor, Port("B Hkv", INT32)],
    queries: Annotated[Tensor, Port("B", INT32)],
    *,
    scale: float = 0.0,
) -> tuple[
    Annotated[Tensor, Port("B H S N Dv", FLOATS, name="partial")],
    Annotated[Tensor, Port("B H S N", FLOAT32, name="largest")],
    Annotated[Tensor, Port("B H S N", FLOAT32, name="total")],
]:
    """``RaggedAttention`` over each part of the slots: ``PART`` of them, N = ceil(M Z / PART) parts in all.

    Args:
        q: queries after RoPE `[B, H, S, D]`.
        k_pages: pool of pages of Z keys `[P, Z, D]`.
        v_pages: their values `[P, Z, Dv]`.
        page_table: pages of each owner `[B, Hkv, M]`.
        lengths: slots held by each owner `[B, Hkv]`.
        queries: valid query rows of each batch row `[B]`.
        scale: factor of the scores; 0 means 1 / sqrt(D).

    Returns:
        partial `[B, H, S, N, Dv]` in the dtype of q, the average over the visible slots of a part, with their softmax
        weights; largest `[B, H, S, N]`, the largest score of the part times the scale; total `[B, H, S, N]`, the sum of
        exp(score times scale - largest). All three are 0 where a part has no visible slot.

    Raises:
        InputError: as ``RaggedAttention``.
    """
    import torch

    from plugins.ragged_attention import check

    (batch, heads, tokens, width), (pages, page_size, _) = q.shape, k_pages.shape
    check(heads, tokens, pages, page_size, page_table, lengths, queries)
    owners, entries = page_table.shape[1:]
    group, parts = heads // owners, -(-entries * page_size // PART)
    partial = q.new_zeros((batch, heads, tokens, parts, v_pages.shape[-1]))
    largest = torch.zeros((batch, heads, tokens, parts), device=q.device)
    total = torch.zeros_like(largest)
    for b in range(batch):
        for g in range(owners):
            held, asked = int(lengths[b, g]), int(queries[b])
            own, listed = slice(g * group, (g + 1) * group), page_table[b, g, : -(-held // page_size)].long()
            key, value = (x[listed].flatten(0, 1)[:held].float() for x in (k_pages, v_pages))
            limit = held - asked + 1 + torch.arange(asked, device=q.device)  # slots that each query sees
            for n in range(-(-held // PART)):
                slots = slice(n * PART, min((n + 1) * PART, held))
                seen = torch.arange(slots.start, slots.stop, device=q.device) < limit[:, None]
                score = q[b, own, :asked].float() @ key[slots].T * (scale or width**-0.5)  # [G, asked, slots]
                score = score.masked_fill(~seen, -torch.inf)
                top = score.amax(-1).clamp(min=-torch.finfo(score.dtype).max)
                weight = torch.exp(score - top[..., None])
                whole = weight.sum(-1)
                some = whole > 0
                average = weight @ value[slots] / torch.where(some, whole, 1)[..., None]
                partial[b, own, :asked, n] = average.to(q.dtype)
                largest[b, own, :asked, n] = torch.where(some, top, 0)
                total[b, own, :asked, n] = whole
    return partial, largest, total


@op(
    name="RaggedReduce",
    source=SOURCE,
    shape=lambda d, a: {"out": (d.B, d.H, d.S, d.Dv)},
    tolerance=Tolerance(
        atol={"float32": 2e-5, "float16": 4e-3},
        rtol={"float32": 1e-4, "float16": 4e-3},
        reason="rows are averages of averages of held values, a few units: the order of summation, and one rounding",
    ),
)
def ragged_reduce(
    partial: Annotated[Tensor, Port("B H S N Dv", FLOATS)],
    largest: Annotated[Tensor, Port("B H S N", FLOAT32)],
    total: Annotated[Tensor, Port("B H S N", FLOAT32)],
) -> Annotated[Tensor, Port("B H S Dv", FLOATS, name="out")]:
    """The average over all parts, each weighted by ``total`` times exp(``largest``).

    Args:
        partial: averages over the slots of each part `[B, H, S, N, Dv]`.
        largest: the largest score of each part `[B, H, S, N]`.
        total: sum of the weights of a part relative to it `[B, H, S, N]`; 0 marks a part that counts for nothing.

    Returns:
        out `[B, H, S, Dv]` in the dtype of partial; exactly 0 where no part counts.
    """
    import torch

    if partial.shape[3] == 0:
        return partial.sum(3)
    lowest = -torch.finfo(largest.dtype).max
    top = torch.where(total > 0, largest, lowest).amax(-1, keepdim=True)
    weight = torch.where(total > 0, total * torch.exp(largest - top), 0)  # [B, H, S, N]
    whole = weight.sum(-1, keepdim=True)
    out = (weight[..., None] * partial.float()).sum(-2) / torch.where(whole > 0, whole, 1)
    return out.to(partial.dtype)


PARTIAL, REDUCE = ragged_partial, ragged_reduce


@PARTIAL.kernels
def _partial_kernels() -> Sequence[Kernel]:
    from plugins.ragged_attention.decode import PARTIAL_KERNEL

    return [PARTIAL_KERNEL]


@REDUCE.kernels
def _reduce_kernels() -> Sequence[Kernel]:
    from plugins.ragged_attention.decode import REDUCE_KERNEL

    return [REDUCE_KERNEL]

"""RaggedAttention: attention over a paged KV cache whose owners each hold a number of keys of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from trtpass.errors import InputError
from trtpass.kernel import Kernel
from trtpass.op import FLOATS, INT32, Case, Port, Step, Tolerance, op

if TYPE_CHECKING:
    from torch import Tensor


def check(heads: int, tokens: int, pages: int, page_size: int, table: Tensor, lengths: Tensor, queries: Tensor) -> None:
    """Raises InputError for what the docstring of ``ragged_attention`` rules out."""
    import torch

    owners, entries = table.shape[1:]
    if owners == 0 or heads % owners:
        raise InputError(f"RaggedAttention has H = {heads} query heads, Hkv = {owners}", "H is a multiple of Hkv")
    slots = entries * page_size
    for b, g in ((lengths < 0) | (lengths > slots)).nonzero().tolist():
        raise InputError(f"RaggedAttention.lengths[{b}, {g}] is {int(lengths[b, g])}", f"0 to M Z = {slots}")
    for (b,) in ((queries < 0) | (queries > tokens)).nonzero().tolist():
        raise InputError(f"RaggedAttention.queries[{b}] is {int(queries[b])}", f"0 to S = {tokens}")
    used = torch.arange(entries, device=table.device) * page_size < lengths[..., None]  # [B, Hkv, M]
    for b, g, m in (used & ((table < 0) | (table >= pages))).nonzero().tolist():
        raise InputError(
            f"RaggedAttention.page_table[{b}, {g}, {m}] is {int(table[b, g, m])}, and its page is in use",
            f"a page of the pool: 0 to P - 1 = {pages - 1}" if pages else "no page in use: the pool is empty",
        )


@op(
    name="RaggedAttention",
    source="KVzap, arXiv 2601.07891, section on eviction (each KV head keeps a number of keys of its own); pages as in "
    "PagedAttention, arXiv 2309.06180, section 4",
    shape=lambda d, a: {"out": (d.B, d.H, d.S, d.Dv)},
    tolerance=Tolerance(
        atol={"float32": 2e-5, "float16": 4e-3},
        rtol={"float32": 1e-4, "float16": 4e-3},
        reason="rows are averages of held values, a few units in the cases: float32 by the order of summation, over "
        "slots that may lie in any order; float16 because scores and probabilities may be rounded to 11 bits",
    ),
)
def ragged_attention(
    q: Annotated[Tensor, Port("B H S D", FLOATS)],
    k_pages: Annotated[Tensor, Port("P Z D", FLOATS)],
    v_pages: Annotated[Tensor, Port("P Z Dv", FLOATS)],
    page_table: Annotated[Tensor, Port("B Hkv M", INT32)],
    lengths: Annotated[Tensor, Port("B Hkv", INT32)],
    queries: Annotated[Tensor, Port("B", INT32)],
    *,
    scale: float = 0.0,
) -> Annotated[Tensor, Port("B H S Dv", FLOATS, name="out")]:
    """Query t of row b sees the slots below ``lengths[b, g] - queries[b] + t + 1`` of its owner (b, g).

    Head h reads g = h // (H // Hkv). Slot s of an owner is row ``s % Z`` of page ``page_table[b, g, s // Z]``. Its last
    ``queries[b]`` slots are the tokens of this step, in order; those before them are the past, in any order, and each
    query sees all of it. Nothing else is read: other slots and pages may hold NaN, other entries of the table may be
    anything. Owners may share pages.

    Args:
        q: queries after RoPE `[B, H, S, D]`, S >= 1: 1 in decode, more in a prefill or in a later turn.
        k_pages: pool of pages of Z keys after RoPE `[P, Z, D]`; P may be 0.
        v_pages: their values `[P, Z, Dv]`.
        page_table: pages of each owner in the order of its slots `[B, Hkv, M]`; the first ``ceil(lengths / Z)`` count.
        lengths: slots held by each owner, those of this step included `[B, Hkv]`, 0 to M Z.
        queries: valid query rows of each batch row `[B]`, 0 (a finished row) to S; later rows of q may hold NaN.
        scale: factor of the scores; 0 means 1 / sqrt(D).

    Returns:
        out `[B, H, S, Dv]` in the dtype of q, computed in float32; exactly 0 where a query sees no slot and in the rows
        from ``queries`` on.

    Raises:
        InputError: H is no multiple of Hkv; ``lengths`` outside 0 to M Z; ``queries`` outside 0 to S; a page in use
            that is not in the pool.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    (batch, heads, tokens, _), (pages, page_size, _) = q.shape, k_pages.shape
    check(heads, tokens, pages, page_size, page_table, lengths, queries)
    owners = page_table.shape[1]
    group = heads // owners
    out = q.new_zeros((batch, heads, tokens, v_pages.shape[-1]))
    for b in range(batch):
        for g in range(owners):
            held, asked = int(lengths[b, g]), int(queries[b])
            first = max(0, asked - held)  # queries before it see nothing
            if first == asked:
                continue
            listed = page_table[b, g, : -(-held // page_size)].long()
            key, value = (x[listed].flatten(0, 1)[None, :held].float() for x in (k_pages, v_pages))
            limit = held - asked + 1 + torch.arange(first, asked, device=q.device)  # slots that each query sees
            visible = torch.arange(held, device=q.device) < limit[:, None]
            own = slice(g * group, (g + 1) * group), slice(first, asked)
            query = q[b][own].float()  # [G, asked - first, D]
            shape = (group, -1, -1)
            rows = scaled_dot_product_attention(
                query, key.expand(shape), value.expand(shape), attn_mask=visible, scale=scale or None
            )
            out[b][own] = rows.to(q.dtype)
    return out


OP = ragged_attention


@OP.body("dynamic")
def _dynamic() -> Any:
    from plugins.ragged_attention.body import cut

    return cut


@OP.body("static")
def _static() -> Any:
    from plugins.ragged_attention.body import padded

    return padded


@OP.cases
def _cases() -> Sequence[Case]:
    from plugins.ragged_attention.cases import CASES

    return CASES


@OP.kernels
def _kernels() -> Sequence[Kernel]:
    from plugins.ragged_attention.kernel import KERNEL

    return [KERNEL]


@OP.steps
def _steps() -> Sequence[Step]:
    from plugins.ragged_attention.steps import PARTIAL, REDUCE

    parts = ("partial", "largest", "total")
    return [
        Step(PARTIAL, ("q", "k_pages", "v_pages", "page_table", "lengths", "queries"), parts),
        Step(REDUCE, parts, ("out",)),
    ]

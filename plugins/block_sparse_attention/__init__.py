"""BlockSparseAttention: causal attention in which each block of queries sees chosen blocks of keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from trtpass.errors import InputError
from trtpass.kernel import Kernel
from trtpass.op import FLOATS, INT32, Case, Port, Tolerance, op

if TYPE_CHECKING:
    from torch import Tensor


@op(
    name="BlockSparseAttention",
    source="FlexPrefill, arXiv 2502.20766, section 3 (block-sparse attention over each head's chosen blocks)",
    shape=lambda d, a: {"out": (d.B, d.H, d.S, d.Dv)},
    tolerance=Tolerance(
        atol={"float32": 2e-5, "float16": 4e-3},
        rtol={"float32": 1e-4, "float16": 4e-3},
        reason="rows are averages of v, so errors are relative to max|v|, a few units in the cases: float32 by the "
        "order of summation; float16 because q k and the probabilities may be rounded to 11 bits between the products",
    ),
)
def block_sparse_attention(
    q: Annotated[Tensor, Port("B H S D", FLOATS)],
    k: Annotated[Tensor, Port("B Hkv S D", FLOATS)],
    v: Annotated[Tensor, Port("B Hkv S Dv", FLOATS)],
    blocks: Annotated[Tensor, Port("B H Q C", INT32)],
    count: Annotated[Tensor, Port("B H Q", INT32)],
    *,
    block: int = 128,
    scale: float = 0.0,
) -> Annotated[Tensor, Port("B H S Dv", FLOATS, name="out")]:
    """Query t of head h sees the keys up to t in the blocks that its query block ``i = t // block`` lists.

    Args:
        q: queries after RoPE `[B, H, S, D]`.
        k: keys after RoPE `[B, Hkv, S, D]`; head h reads key head ``h // (H // Hkv)``.
        v: values `[B, Hkv, S, Dv]`.
        blocks: key blocks of each query block `[B, H, Q, C]`, Q = ceil(S / block): distinct, ascending; slots from
            ``count`` on are not read. A block above the diagonal, or outside [0, Q), adds nothing.
        count: listed blocks `[B, H, Q]`, 0 to C.
        block: tokens of a block.
        scale: factor of the scores; 0 means 1 / sqrt(D).

    Returns:
        out `[B, H, S, Dv]` in the dtype of q, computed in float32; exactly 0 where a query sees nothing.

    Raises:
        InputError: ``block`` below 1, or Q is not ceil(S / block).
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    batch, heads, tokens, _ = q.shape
    rows = blocks.shape[2]
    if block < 1:
        raise InputError(f"BlockSparseAttention.block is {block}", "1 or more")
    if rows != -(-tokens // block):
        raise InputError(f"BlockSparseAttention.blocks has Q = {rows}", f"ceil(S / block) = {-(-tokens // block)}")
    out = q.new_zeros((batch, heads, tokens, v.shape[-1]))
    token = torch.arange(tokens, device=q.device)
    causal = token <= token[:, None]  # [S, S]
    for b in range(batch):
        for h in range(heads):
            listed = torch.zeros(rows, rows, dtype=torch.bool, device=q.device)
            for i in range(rows):
                chosen = blocks[b, h, i, : int(count[b, h, i])].long()
                listed[i, chosen[(chosen >= 0) & (chosen < rows)]] = True
            visible = causal & listed[token // block][:, token // block]
            sees = visible.any(1)
            if not sees.any():
                continue
            g = h * k.shape[1] // heads
            query, key, value = (x[None, None].float() for x in (q[b, h, sees], k[b, g], v[b, g]))
            attended = scaled_dot_product_attention(query, key, value, attn_mask=visible[sees], scale=scale or None)
            out[b, h, sees] = attended[0, 0].to(q.dtype)
    return out


OP = block_sparse_attention


@OP.body("dynamic")
@OP.body("static")
def _body() -> Any:
    from plugins.block_sparse_attention.body import BlockSparseAttention

    return BlockSparseAttention


@OP.cases
def _cases() -> Sequence[Case]:
    from plugins.block_sparse_attention.cases import CASES

    return CASES


@OP.kernels
def _kernels() -> Sequence[Kernel]:
    from plugins.block_sparse_attention.kernel import KERNEL

    return [KERNEL]

"""TokenSparseAttention: causal attention among each head's selected tokens, restored to the full sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from trtpass.errors import InputError
from trtpass.kernel import Kernel
from trtpass.op import FLOATS, INT32, Case, Port, Tolerance, op

if TYPE_CHECKING:
    from torch import Tensor


@op(
    name="TokenSparseAttention",
    source="Token Sparse Attention, arXiv 2602.03216, section 3 (compress, attend, decompress)",
    shape=lambda d, a: {"out": (d.B, d.H, d.S, d.Dv)},
    tolerance=Tolerance(
        atol={"float32": 2e-5, "float16": 4e-3},
        rtol={"float32": 1e-4, "float16": 4e-3},
        reason="rows are averages of v, so errors are relative to max|v|, a few units in the cases: float32 by the "
        "order of summation; float16 because q k and the probabilities may be rounded to 11 bits between the products",
    ),
)
def token_sparse_attention(
    q: Annotated[Tensor, Port("B H S D", FLOATS)],
    k: Annotated[Tensor, Port("B Hkv S D", FLOATS)],
    v: Annotated[Tensor, Port("B Hkv S Dv", FLOATS)],
    index: Annotated[Tensor, Port("B N C", INT32)],
    count: Annotated[Tensor, Port("B N", INT32)],
    *,
    scale: float = 0.0,
) -> Annotated[Tensor, Port("B H S Dv", FLOATS, name="out")]:
    """``out[b, h, I] = causal_attention(q[b, h, I], k[b, g, I], v[b, g, I])`` with I the selection of head h; else 0.

    Args:
        q: queries after RoPE `[B, H, S, D]`.
        k: keys after RoPE `[B, Hkv, S, D]`; head h reads key head ``g = h // (H // Hkv)``.
        v: values `[B, Hkv, S, Dv]`.
        index: selected positions `[B, N, C]`, ascending, S from slot ``count`` on. N = H (a set for each query head) or
            N = Hkv (one set for all query heads of a group).
        count: selected positions in each set `[B, N]`, 0 to C.
        scale: factor of the scores; 0 means 1 / sqrt(D).

    Returns:
        out `[B, H, S, Dv]` in the dtype of q, computed in float32; rows outside the selection are exactly 0.

    Raises:
        InputError: N is neither H nor Hkv.
    """
    from torch.nn.functional import scaled_dot_product_attention

    batch, heads = q.shape[:2]
    key_heads, sets = k.shape[1], index.shape[1]
    if sets not in (heads, key_heads):
        raise InputError(f"TokenSparseAttention.index has N = {sets}", f"N = H = {heads} or N = Hkv = {key_heads}")
    out = q.new_zeros((*q.shape[:3], v.shape[-1]))
    for b in range(batch):
        for h in range(heads):
            chosen = h * sets // heads
            kept = index[b, chosen, : int(count[b, chosen])].long()
            if len(kept) == 0:
                continue
            g = h * key_heads // heads
            query, key, value = (x[None, None, kept].float() for x in (q[b, h], k[b, g], v[b, g]))
            rows = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale or None)
            out[b, h, kept] = rows[0, 0].to(q.dtype)
    return out


OP = token_sparse_attention


@OP.body("dynamic")
def _dynamic() -> Any:
    from plugins.token_sparse_attention.body import branching

    return branching


@OP.body("static")
def _static() -> Any:
    from plugins.token_sparse_attention.body import gathered

    return gathered


@OP.cases
def _cases() -> Sequence[Case]:
    from plugins.token_sparse_attention.cases import CASES

    return CASES


@OP.kernels
def _kernels() -> Sequence[Kernel]:
    from plugins.token_sparse_attention.kernel import KERNEL

    return [KERNEL]

"""CompactSlots: where each kept token goes in a cache that holds only what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from trtpass.kernel import Kernel
from trtpass.op import INT32, Case, Port, Tolerance, op

if TYPE_CHECKING:
    from torch import Tensor


@op(
    name="CompactSlots",
    source="KVzap, arXiv 2601.07891, section on eviction (each KV head keeps a number of keys of its own); slots as in "
    "PagedAttention, arXiv 2309.06180, section 4",
    shape=lambda d, a: {"slot": (d.B, d.Hkv, d.S), "kept": (d.B, d.Hkv)},
    tolerance=Tolerance(atol={}, rtol={}, reason="integers: counts of tokens"),
)
def compact_slots(
    keep: Annotated[Tensor, Port("B Hkv S", INT32)],
    held: Annotated[Tensor, Port("B Hkv", INT32)],
    lengths: Annotated[Tensor, Port("B", INT32)],
) -> tuple[
    Annotated[Tensor, Port("B Hkv S", INT32, name="slot")],
    Annotated[Tensor, Port("B Hkv", INT32, name="kept")],
]:
    """The kept tokens of each owner (batch row, KV head) in their order, behind the slots that it holds already.

    Args:
        keep: whether a token is kept, 0 for no `[B, Hkv, S]`; padding may hold anything.
        held: slots that each owner holds before `[B, Hkv]`.
        lengths: valid tokens of each row `[B]`, clipped to [0, S].

    Returns:
        slot int32 `[B, Hkv, S]`: ``held`` plus the number of kept tokens before it, -1 for a token that is not kept;
        kept int32 `[B, Hkv]`: slots held afterwards.
    """
    import torch

    valid = torch.arange(keep.shape[2], device=keep.device) < lengths[:, None, None]
    kept = ((keep != 0) & valid).int()
    before = kept.cumsum(2, dtype=torch.int32) - kept
    slot = torch.where(kept == 1, held[..., None] + before, -1)
    return slot.int(), held + kept.sum(2, dtype=torch.int32)


OP = compact_slots


@OP.body("dynamic")
@OP.body("static")
def _body() -> Any:
    from plugins.compact_slots.body import CompactSlots

    return CompactSlots


@OP.cases
def _cases() -> Sequence[Case]:
    from plugins.compact_slots.cases import CASES

    return CASES


@OP.kernels
def _kernels() -> Sequence[Kernel]:
    from plugins.compact_slots.kernel import KERNEL

    return [KERNEL]

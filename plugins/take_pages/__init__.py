"""TakePages: which pages each owner of a paged cache gets, from a list of free ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from trtpass.errors import InputError
from trtpass.op import INT32, Case, Port, Tolerance, op

if TYPE_CHECKING:
    from torch import Tensor


@op(
    name="TakePages",
    source="PagedAttention, arXiv 2309.06180, section 4 (block tables); KVzap, arXiv 2601.07891, section on eviction "
    "(each KV head keeps a number of keys of its own)",
    shape=lambda d, a: {"page_table": (d.B, d.Hkv, (d.S + (a.page_size - 1)) // a.page_size)},
    tolerance=Tolerance(atol={}, rtol={}, reason="integers: numbers of pages"),
)
def take_pages(
    kept: Annotated[Tensor, Port("B Hkv", INT32)],
    free: Annotated[Tensor, Port("F", INT32)],
    slot: Annotated[Tensor, Port("B Hkv S", INT32)],
    *,
    page_size: int = 64,
) -> Annotated[Tensor, Port("B Hkv M", INT32, name="page_table")]:
    """Owners (batch row, KV head), in row-major order, take ceil(kept / page_size) pages each from ``free``, in order.

    Args:
        kept: slots that each owner holds `[B, Hkv]`, clipped to [0, M page_size].
        free: pages that nobody holds `[F]`, each once (not checked); a negative one stands for none.
        slot: slots of the tokens `[B, Hkv, S]`; only S is read, which bounds what an owner can hold.
        page_size: slots of a page.

    Returns:
        page_table int32 `[B, Hkv, M]`, M = ceil(S / page_size): entry m of an owner whose first page is entry o of
        ``free`` is ``free[o + m]``; -1 where the owner needs none, where ``free`` ends before, or where it holds none.

    Raises:
        InputError: ``page_size`` below 1.
    """
    import torch

    if page_size < 1:
        raise InputError(f"TakePages.page_size is {page_size}", "1 or more")
    entries = -(-slot.shape[2] // page_size)
    wanted = kept.long().clamp(0, entries * page_size).add(page_size - 1) // page_size  # [B, Hkv] pages
    first = (wanted.flatten().cumsum(0) - wanted.flatten()).view_as(wanted)
    entry = torch.arange(entries, device=kept.device)  # [M]
    at = first[..., None] + entry  # [B, Hkv, M]
    ended = torch.cat([free, free.new_tensor([-1])])  # what is asked for behind the end is none
    page = ended[at.clamp(max=len(free))]
    return torch.where(entry < wanted[..., None], page.clamp(min=-1), -1).int()


OP = take_pages


@OP.body("dynamic")
@OP.body("static")
def _body() -> Any:
    from plugins.take_pages.body import TakePages

    return TakePages


@OP.cases
def _cases() -> Sequence[Case]:
    from plugins.take_pages.cases import CASES

    return CASES

"""WritePages: keys or values into the slots of a paged cache, in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from trtpass.kernel import Kernel
from trtpass.op import FLOATS, INT32, Case, Port, Tolerance, op

if TYPE_CHECKING:
    from torch import Tensor


@op(
    name="WritePages",
    source="PagedAttention, arXiv 2309.06180, section 4 (block tables); KVzap, arXiv 2601.07891, section on eviction",
    shape=lambda d, a: {"written": (d.P, d.Z, d.D)},
    tolerance=Tolerance(
        atol={"float32": 0.0, "float16": 0.0},
        rtol={"float32": 0.0, "float16": 0.0},
        reason="rows are copied, bit by bit",
    ),
    aliases={"written": "pages"},
)
def write_pages(
    pages: Annotated[Tensor, Port("P Z D", FLOATS)],
    new: Annotated[Tensor, Port("B Hkv S D", FLOATS)],
    slot: Annotated[Tensor, Port("B Hkv S", INT32)],
    page_table: Annotated[Tensor, Port("B Hkv M", INT32)],
) -> Annotated[Tensor, Port("P Z D", FLOATS, name="written")]:
    """Row ``slot % Z`` of page ``page_table[b, g, slot // Z]`` becomes ``new[b, g, t]``, for ``slot[b, g, t]``.

    It is the compaction of a prefill (slots from CompactSlots) and the overwrite of a decode step (S = 1) alike.

    Args:
        pages: pool of P pages of Z rows `[P, Z, D]`; P may be 0.
        new: rows to write `[B, Hkv, S, D]`; those that go nowhere may hold anything.
        slot: slot of each row within its owner `[B, Hkv, S]`; outside [0, M Z) it goes nowhere.
        page_table: pages of each owner in the order of its slots `[B, Hkv, M]`; a row for a page outside [0, P) goes
            nowhere. No two rows of a call may go to one place (not checked).

    Returns:
        written `[P, Z, D]`: ``pages`` with these rows; it may share the memory of ``pages``.
    """
    pool, page_size, width = pages.shape
    flat = pages.clone().view(pool * page_size, width)
    slots = page_table.shape[2] * page_size
    for b, g in ((b, g) for b in range(slot.shape[0]) for g in range(slot.shape[1])):
        there = ((slot[b, g] >= 0) & (slot[b, g] < slots)).nonzero()[:, 0]
        row = slot[b, g, there].long()
        page = page_table[b, g, row // page_size].long()
        real = (page >= 0) & (page < pool)
        flat[(page * page_size + row % page_size)[real]] = new[b, g, there[real]]
    return flat.view(pool, page_size, width)


OP = write_pages


@OP.body("dynamic")
def _dynamic() -> Any:
    from plugins.write_pages.body import write_in_place

    return write_in_place


@OP.body("static")
def _static() -> Any:
    from plugins.write_pages.body import write_all

    return write_all


@OP.cases
def _cases() -> Sequence[Case]:
    from plugins.write_pages.cases import CASES

    return CASES


@OP.kernels
def _kernels() -> Sequence[Kernel]:
    from plugins.write_pages.kernel import KERNEL

    return [KERNEL]

"""Who holds which page: the host's side of a paged KV cache, in plain integers.

An *owner* is a (layer, row, KV head). It holds slots 0 .. held - 1, in any order of tokens, on pages of Z slots of its
layer's pool. Positions are those of the text and never change; a slot says nothing about them.

**The ring.** Of the last W + 1 tokens of each owner, the ring remembers which slot may be taken from them: that of a
token at position p stands at ``p mod (W + 1)``, or -1 where the token stays. The query at position T no longer sees the
token at T - 1 - W if that is evicted, and its place in the ring is T's own: the new token takes over slot and place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from trtpass.free_pages import CacheFull, FreePages, Ints

__all__ = ["BROKEN", "EVICTED", "CacheFull", "FreePages", "Moves", "Pages"]

EVICTED, BROKEN = 0, -1  # decisions of a policy; 1 and above: kept


ROWS = {"table": 1, "held": 1, "ring": 1, "lengths": 0}  # arrays of a book, and the axis that stands for its rows


@dataclass(frozen=True)
class Moves:
    """Rows to copy within the pools of one layer: from ``(page, row)`` to ``(page, row)``, each int32 ``[n]``."""

    layer: int
    source: tuple[Ints, Ints]
    target: tuple[Ints, Ints]


@dataclass
class Pages:
    """The pages of a batch.

    Args:
        layers, batch, heads: owners: L, B, Hkv.
        page: Z, slots of a page.
        pages: P, pages of each layer's pool.
        entries: M, pages that an owner may hold.
        window: W, the last tokens that are never evicted.
        sinks: the first tokens that are never evicted.
        stock: the free pages, where several books share the pools; None makes a stock of its own.

    Attributes:
        table: int32 ``[L, B, Hkv, M]``, pages of an owner in the order of its slots, -1 behind them.
        held: int32 ``[L, B, Hkv]``, slots in use.
        ring: int32 ``[L, B, Hkv, W + 1]``, see above.
        lengths: int32 ``[B]``, tokens of each row so far.
    """

    layers: int
    batch: int
    heads: int
    page: int
    pages: int
    entries: int
    window: int
    sinks: int
    stock: FreePages | None = None
    table: Ints = field(init=False)
    held: Ints = field(init=False)
    ring: Ints = field(init=False)
    lengths: Ints = field(init=False)

    def __post_init__(self) -> None:
        owners = (self.layers, self.batch, self.heads)
        self.table = np.full((*owners, self.entries), -1, np.int32)
        self.held = np.zeros(owners, np.int32)
        self.ring = np.full((*owners, self.window + 1), -1, np.int32)
        self.lengths = np.zeros(self.batch, np.int32)
        self._free = self.stock = self.stock or FreePages(self.layers, self.pages)

    @property
    def pages_held(self) -> int:
        """Pages of the pools in use, all layers together, by whichever book."""
        return self._free.held

    def free(self, most: int | None = None) -> Ints:
        """At most so many free pages of each layer, in the order in which they are taken ``[L, F]``, -1 behind them."""
        return self._free.order(most)

    def empty(self, batch: int) -> Pages:
        """A book of ``batch`` new rows over the same pools."""
        return replace(self, batch=batch)

    def row(self, row: int) -> Pages:
        """The book of one row. It is a part of this one: what changes in either changes in both."""
        made = self.empty(1)
        for name, at in ROWS.items():
            setattr(made, name, getattr(self, name)[(slice(None),) * at + (slice(row, row + 1),)])
        return made

    @staticmethod
    def joined(books: Sequence[Pages]) -> Pages:
        """One book of the rows of several, one at least, over the same pools, in this order. It takes their place."""
        made = books[0].empty(sum(book.batch for book in books))
        for name, at in ROWS.items():
            arrays = [getattr(book, name) for book in books]
            setattr(made, name, np.ascontiguousarray(np.concatenate(arrays, at)))
        return made

    def elsewhere(self) -> Pages:
        """The same rows, holding as much on pages that are free now; this book stays as it is.

        Raises:
            CacheFull: there are not enough; nothing has changed.
        """
        made = Pages.joined([self])
        self._free.need((self.table >= 0).sum((1, 2, 3)))
        for i, table in enumerate(made.table):
            mine = table >= 0
            table[mine] = self._free.take(i, int(mine.sum()))
        return made

    def fill(self, lengths: Ints, table: Ints, slot: Ints, keep: Ints) -> None:
        """What a prefill from an empty cache did: its page tables ``[L, B, Hkv, m]``, and slots and decisions of every
        token ``[L, B, Hkv, S]``.

        Raises:
            CacheFull: there were not enough free pages; nothing has changed.
        """
        valid = np.arange(slot.shape[-1]) < lengths[:, None, None]  # [B, 1, S]
        kept = (valid & (slot >= 0)).sum(-1, dtype=np.int32)
        need = -(-kept // self.page)
        per_layer = need.sum((1, 2))
        self._free.need(per_layer)
        for layer, count in enumerate(per_layer):
            self._free.take(layer, int(count))
        self.table[..., : table.shape[-1]] = table[..., : self.entries]
        self.held[:] = kept
        self.lengths[:] = lengths
        self._remember(np.zeros_like(lengths), lengths, slot, keep)

    def place(self, active: np.ndarray) -> Ints:
        """A slot for the next token of each active row, ``[L, B, Hkv, 1]``, -1 elsewhere; takes pages where needed.

        Raises:
            CacheFull: there is no page for some owner; nothing has changed.
        """
        at = np.broadcast_to((self.lengths % (self.window + 1))[None, :, None, None], (*self.held.shape, 1))
        old = np.take_along_axis(self.ring, at, 3)[..., 0]
        moving = np.asarray(active, bool)[None, :, None]
        grows = moving & (old < 0)
        slot = np.where(moving, np.where(old >= 0, old, self.held), -1)
        self._take(self.held + grows)
        self.held += grows
        return slot[..., None].astype(np.int32)

    def settle(self, slot: Ints, keep: Ints, active: np.ndarray) -> None:
        """After the step: remember the new tokens' slots and decisions, each ``[L, B, Hkv, 1]``."""
        at = np.broadcast_to((self.lengths % (self.window + 1))[None, :, None, None], slot.shape)
        moving = np.asarray(active, bool)[None, :, None, None]
        evictable = (keep == EVICTED) & (self.lengths >= self.sinks)[None, :, None, None]
        before = np.take_along_axis(self.ring, at, 3)
        np.put_along_axis(self.ring, at, np.where(moving, np.where(evictable, slot, -1), before), 3)
        self.lengths += np.asarray(active, bool)

    def evict_due(self) -> list[Moves]:
        """Before a step of several tokens: drop the tokens that its first query no longer sees."""
        at = np.broadcast_to((self.lengths % (self.window + 1))[None, :, None, None], (*self.held.shape, 1))
        due = np.take_along_axis(self.ring, at, 3)[..., 0]
        np.put_along_axis(self.ring, at, np.int32(-1), 3)
        return self._drop({(i, b, g): [int(due[i, b, g])] for i, b, g in np.argwhere(due >= 0).tolist()})

    def append(self, counts: Ints) -> Ints:
        """Slots for the next ``counts [B]`` tokens of each row, behind what is held: ``[L, B, Hkv, T]``, -1 behind a
        row's own; takes pages.

        Raises:
            CacheFull: there is no page for some owner; nothing has changed.
        """
        token = np.arange(max(1, int(counts.max())), dtype=np.int32)
        slot = np.where(token < counts[:, None, None], self.held[..., None] + token, -1)
        wanted = self.held + counts[None, :, None]
        self._take(wanted)
        self.held[:] = wanted
        return slot.astype(np.int32)

    def cut(self, held: Ints) -> None:
        """Take back what ``append`` gave since each owner held ``held [L, B, Hkv]`` slots."""
        self._drop({
            (i, b, g): list(range(int(held[i, b, g]), int(self.held[i, b, g])))
            for i, b, g in np.argwhere(self.held > held).tolist()
        })  # fmt: skip

    def judge(self, counts: Ints, slot: Ints, keep: Ints) -> list[Moves]:
        """After the step, or all chunks of it: drop what has left the window of the next query, remember the rest.

        Args:
            counts: tokens that were added to each row ``[B]``.
            slot, keep: their slots and decisions ``[L, B, Hkv, T]``.
        """
        start, end = self.lengths.copy(), self.lengths + counts
        holes: dict[tuple[int, int, int], list[int]] = {}
        size = self.window + 1
        for b in np.flatnonzero(counts).tolist():
            # Old tokens that leave: positions start - W .. end - 2 - W, as far as they are old.
            gone = np.arange(start[b] - self.window, min(start[b], end[b] - size))
            places = gone[gone >= 0] % size
            fresh = np.arange(counts[b])
            leaves = (start[b] + fresh < end[b] - size) & (start[b] + fresh >= self.sinks)
            for i in range(self.layers):
                for g in range(self.heads):
                    old = self.ring[i, b, g, places]
                    new = slot[i, b, g, : counts[b]][leaves & (keep[i, b, g, : counts[b]] == EVICTED)]
                    if found := [*old[old >= 0].tolist(), *new.tolist()]:
                        holes[i, b, g] = found
            self.ring[:, b, :, places] = -1
        self._remember(start, end, slot, keep)
        self.lengths[:] = end
        return self._drop(holes)

    def release(self, row: int) -> None:
        """Give back the pages of a row that has ended."""
        for i in range(self.layers):
            pages = self.table[i, row][self.table[i, row] >= 0]
            self._free.give(i, pages)
        self.table[:, row], self.held[:, row], self.ring[:, row] = -1, 0, -1

    def _remember(self, start: Ints, end: Ints, slot: Ints, keep: Ints) -> None:
        """Put the last W + 1 of the tokens at positions start .. end - 1 (``[B]``) into the ring."""
        size = self.window + 1
        for b in range(self.batch):
            position = np.arange(max(int(start[b]), int(end[b]) - size), end[b])
            if position.size:
                token = position - start[b]
                evictable = (keep[:, b][..., token] == EVICTED) & (position >= self.sinks)
                self.ring[:, b][..., position % size] = np.where(evictable, slot[:, b][..., token], -1)

    def _take(self, held: np.ndarray) -> None:
        """Pages so that each owner has room for ``held [L, B, Hkv]`` slots.

        Raises:
            CacheFull: some layer has too few, or an owner would need more than M; nothing has changed.
        """
        have = (self.table >= 0).sum(-1)
        more = np.maximum(-(-held // self.page) - have, 0)
        if not more.any():
            return
        if int((have + more).max()) > self.entries:
            raise CacheFull(
                f"an owner would hold {int(held.max())} keys", f"at most {self.entries * self.page}, its page table's",
                "allocate a larger capacity in prefill, within the context limit",
            )  # fmt: skip
        self._free.need(more.sum((1, 2)))
        for i, b, g in np.argwhere(more > 0).tolist():
            start, count = int(have[i, b, g]), int(more[i, b, g])
            self.table[i, b, g, start : start + count] = self._free.take(i, count)

    def _drop(self, holes: dict[tuple[int, int, int], list[int]]) -> list[Moves]:
        """Free the slots in ``holes`` of each owner: the last slots move into them, and pages at the end go back."""
        lists: dict[int, list[list[int]]] = {}
        for (i, b, g), dropped in holes.items():
            held = int(self.held[i, b, g])
            left = held - len(dropped)
            gone = set(dropped)
            into = sorted(s for s in gone if s < left)
            source = [s for s in range(left, held) if s not in gone]
            table, ring = self.table[i, b, g], self.ring[i, b, g]
            for old, new in zip(source, into, strict=True):
                ring[ring == old] = new
                lists.setdefault(i, []).append(
                    [table[old // self.page], old % self.page, table[new // self.page], new % self.page]
                )
            keep = -(-left // self.page)
            self._free.give(i, table[keep:][table[keep:] >= 0])
            table[keep:] = -1
            self.held[i, b, g] = left
        return [
            Moves(i, (rows[:, 0], rows[:, 1]), (rows[:, 2], rows[:, 3]))
            for i, rows in ((i, np.array(found, np.int32)) for i, found in lists.items())
        ]

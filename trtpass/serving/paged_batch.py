"""Rows that come and go over one set of pools: each has a book of its own, and all books share the free pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trtpass.engine_checks import RowFailed
from trtpass.errors import InputError
from trtpass.paged import PagedEngine
from trtpass.paged_state import PagedState
from trtpass.pages import CacheFull, FreePages, Pages
from trtpass.serving.request import Limits
from trtpass.serving.rows import Rows, renamed


@dataclass(frozen=True)
class PausedPages:
    """A row outside the pools.

    Args:
        book: who held which slots; its pages are no longer its own.
        data: by name of the pool, the pages of the row ``[n, Z, D]`` in the order of its table.
    """

    book: Pages
    data: Mapping[str, np.ndarray]


class PagedBatch(Rows):
    """See ``trtpass.serving.batch.Batch``. Rows that step together are one book, made anew when they change: integers
    only, while keys and values stay where they are. Free pages are zeros and hold no memory."""

    def __init__(self, engine: PagedEngine, limits: Limits) -> None:
        super().__init__(engine, limits)
        entries = -(-self.capacity // engine.page)
        count = self.rows * engine.heads * entries if limits.pages is None else limits.pages
        self._engine, self._pools = engine, engine.pools(count)
        self._free = FreePages(engine.layers, count)
        self._none = Pages(
            engine.layers, 0, engine.heads, engine.page, count, entries, engine.window, engine.sinks, self._free
        )
        self._books: dict[int, Pages] = {}
        self._together: tuple[int, ...] = ()  # rows of the state
        self._state = self._state_of(self._none)
        self.pages = engine.layers * count

    @property
    def running(self) -> int:
        """Rows that have joined and not left."""
        return len(self._books)

    @property
    def pages_held(self) -> int:
        """Pages in use, all layers together."""
        return self._free.held

    @property
    def bytes_held(self) -> int:
        """Bytes of the pages in use."""
        return self._state.bytes_held

    def join(self, prompt: Sequence[int], room: int) -> tuple[int, np.ndarray]:
        """Read a prompt into a free row; returns the row and float32 ``[V]``, the logits after its last token.

        A CacheFull that is certain from the length alone costs nothing; else the prompt has been read in vain.
        """
        self._check_join(prompt, room, self.running)
        self._need(len(prompt))
        state = self._state_of(self._none.empty(1))
        try:
            logits = self._engine.read(state, 0, prompt)
        except InputError as error:
            self._clear(self._free.order())  # it may have been written to some of them
            if isinstance(error, RowFailed):  # of no row that anyone knows
                raise InputError(error.found, error.expected, error.fix) from error
            raise
        row = self._number()
        self._books[row] = state.pages
        return row, logits

    def step(self, tokens: Mapping[int, int]) -> dict[int, np.ndarray]:
        """Append one token to each of these rows; returns float32 ``[V]`` by row, the logits after it.

        Raises:
            RowFailed: a row's scores or logits are NaN; nothing has changed. Let it leave, and step the others again.
            CacheFull: no page is left for some row; nothing has changed.
        """
        if not tokens:
            return {}
        if tokens.keys() != set(self._together):
            self._bind(tuple(tokens))
        try:
            logits = self._engine.decode(self._state, [tokens[row] for row in self._together])
        except RowFailed as failed:
            raise renamed(failed, self._together[failed.row]) from failed
        return dict(zip(self._together, logits, strict=True))

    def leave(self, row: int) -> None:
        """Free the row and its memory."""
        self._check_rows([row], self._books)
        book = self._books.pop(row)
        pages = book.table.reshape(book.layers, -1).copy()
        book.release(0)
        self._clear(pages)

    def pause(self, row: int) -> PausedPages:
        """Take a row out of the batch; its pages are copied, and are free."""
        self._check_rows([row], self._books)
        book = Pages.joined([self._books[row]])
        data = {name: pool.array[self._mine(book, name)] for name, pool in self._pools.items()}
        self.leave(row)
        return PausedPages(book, data)

    def resume(self, paused: PausedPages) -> int:
        """Put a paused row back, on other pages.

        Raises:
            CacheFull: there are too few free pages, or no free row; ``paused`` is as good as before.
        """
        if self.running == self.rows:
            raise CacheFull(f"all {self.rows} rows are taken", "a free row", "wait until one leaves")
        book = paused.book.elsewhere()
        for name, pool in self._pools.items():
            pool.array[self._mine(book, name)] = paused.data[name]
        row = self._number()
        self._books[row] = book
        return row

    def length(self, row: int) -> int:
        """Tokens of a row so far."""
        self._check_rows([row], self._books)
        return int(self._books[row].lengths[0])

    def kept(self, row: int) -> float:
        """Share of its tokens that the row's cache holds, mean over layers and KV heads."""
        length = self.length(row)
        return float(self._books[row].held.mean() / length)

    def _state_of(self, book: Pages) -> PagedState:
        return self._engine.over(book, {name: pool.array for name, pool in self._pools.items()}, self.capacity)

    def _bind(self, rows: tuple[int, ...]) -> None:
        """Make one book of these rows. Those of each row become parts of it; other rows keep theirs."""
        self._check_rows(rows, self._books)
        book = Pages.joined([self._books[row] for row in rows])
        self._state, self._together = self._state_of(book), rows
        for i, row in enumerate(rows):
            self._books[row] = book.row(i)

    def _need(self, tokens: int) -> None:
        """Raises CacheFull where not even sinks and window of such a prompt fit."""
        engine = self._engine
        least = min(tokens, engine.sinks + engine.window + 1)
        self._free.need([engine.heads * -(-least // engine.page)] * engine.layers)

    @staticmethod
    def _mine(book: Pages, name: str) -> np.ndarray:
        """Pages of a book in the pool ``past.{i}.key`` or ``past.{i}.value``, in the order of its table."""
        table = book.table[int(name.split(".")[1])]
        mine: np.ndarray = table[table >= 0]
        return mine

    def _clear(self, pages: np.ndarray) -> None:
        """Pages ``[L, n]`` of each layer's pools, -1 for none, become zeros without memory: no NaN is left in them."""
        for name, pool in self._pools.items():
            layer = pages[int(name.split(".")[1])]
            for run in _runs(layer[layer >= 0]):
                pool.clear(int(run[0]), int(run[-1]) + 1)


def _runs(numbers: np.ndarray) -> list[np.ndarray]:
    """Numbers in order, cut where they do not follow each other."""
    ordered = np.sort(numbers)
    return np.split(ordered, np.flatnonzero(np.diff(ordered) > 1) + 1) if ordered.size else []

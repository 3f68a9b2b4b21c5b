"""Running an engine whose KV cache holds, per layer, row and KV head, only what its policy keeps.

Same calls as ``trtpass.runtime.Engine``. Pools are reserved for a dense cache and hold memory only where a page was
written, so what a process holds is what the policy keeps. Pages that are given back are the first to be taken again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from trtpass.engine_checks import RowFailed, need_numbers
from trtpass.errors import InputError
from trtpass.paged_state import PagedState, Usage, paged
from trtpass.pages import BROKEN, CacheFull, Moves, Pages
from trtpass.passes.cache_policy import SINKS_KEY, WINDOW_KEY
from trtpass.passes.paged_cache import KIND_KEY, PAGE_KEY, PAGED
from trtpass.reserved import Reserved
from trtpass.runtime import DECODE, PREFILL, Engine, State, last, padded
from trtpass.sampling import Sampler, Step
from trtpass.sessions import Source

__all__ = ["CacheFull", "PagedEngine", "PagedState", "is_paged"]

INTS = np.dtype(np.int32)


def is_paged(stated: Mapping[str, str]) -> bool:
    """Whether a graph's properties say that its cache is paged."""
    return stated.get(KIND_KEY) == PAGED


class PagedEngine(Engine):
    """A prefill and a decode graph over a paged cache; see ``Engine.open``, which opens either kind."""

    def __init__(
        self, sources: Mapping[str, Source], provider: str, threads: int | None, context: int | None, decode: Any
    ) -> None:
        super().__init__(sources, provider, threads, context, decode)
        if self.provider != "CPUExecutionProvider":
            raise InputError(
                f"a paged cache on {self.provider}", "the CPU provider: pages are moved by the host", "use provider cpu"
            )
        stated = decode.get_modelmeta().custom_metadata_map
        self.page, self.window, self.sinks = (int(stated[key]) for key in (PAGE_KEY, WINDOW_KEY, SINKS_KEY))
        held = next(item for item in decode.get_inputs() if item.name == "held")
        self.layers, self.heads = int(held.shape[0]), int(held.shape[2])

    inputs = frozenset({"input_ids", "lengths", "past_lengths", "page_table", "slot", "held"})

    def _read_cache(self, inputs: Mapping[str, Any]) -> int | None:
        """Widths of the pools; the capacity of a row is not the graph's to say."""
        self._widths = {name: int(inputs[name].shape[2]) for name in self.cache_inputs}
        return None

    def prefill(
        self, rows: Sequence[Sequence[int]], chunk: int | None = None, capacity: int | None = None,
        pages: int | None = None,
    ) -> PagedState:  # fmt: skip
        """Read the prompts (of different lengths) into a new cache, which then holds what the policy keeps.

        A whole prompt is compacted layer by layer. In chunks every key is kept until the prompt ends, because the
        decisions take effect at the next call: the peak is that of a dense cache.

        Args:
            rows: token ids of each row, at least one a row.
            chunk: read in pieces of at most this many tokens with the decode graph; None reads all.
            capacity: tokens that a row may have; None takes the context limit, else longest prompt + 256.
            pages: pages of each layer's pool; None has room for every key of every row.

        Raises:
            InputError: as ``Engine.prefill``.
            RowFailed: scores or logits of a row came out as NaN.
            CacheFull: more pages are needed than there are.
        """
        lengths = self._check_rows(rows)
        slots = self._capacity(int(lengths.max()), capacity)
        if chunk is not None:
            self._check_chunk(chunk)
        state = self.new_state(len(rows), slots, pages)
        if chunk is None:
            state.logits = self._read(rows, lengths, state, state.pages)
        else:
            self.append(state, rows, chunk)
        return state

    def read(self, state: State, row: int, prompt: Sequence[int]) -> np.ndarray:
        """Read a whole prompt into one row of a batch, which holds nothing; returns the logits ``[V]`` after it.

        Args:
            state: changed in place, at this row only.
            row: which one.
            prompt: token ids, at least one.

        Raises:
            InputError, CacheFull: as ``prefill``; free pages may have been written to then, and nothing else.
        """
        state = paged(state)
        lengths = self._check_rows([prompt])
        self._check_fits(int(lengths[0]), state.capacity)
        state.logits[row] = self._read([prompt], lengths, state, state.pages.row(row))[0]
        answer: np.ndarray = state.logits[row]
        return answer

    def _read(self, rows: Sequence[Sequence[int]], lengths: np.ndarray, state: PagedState, book: Pages) -> np.ndarray:
        """Whole prompts into the rows of ``book``; returns the logits ``[B, V]`` after them."""
        most = self.heads * int((-(-lengths // self.page)).sum())  # pages of a layer that keeps all of them
        feeds = {"lengths": lengths, "free": book.free(most)}
        made = self._run(PREFILL, padded(rows, lengths), feeds, state, outputs=("page_table", "slot", "keep"))
        self._decided(made["keep"])
        logits = last(made["logits"], lengths)
        self._need_numbers(made["keep"], lengths)
        need_numbers(logits, lengths > 0)
        book.fill(lengths, made["page_table"], made["slot"], made["keep"])
        return logits

    def decode(self, state: State, tokens: Sequence[int], active: Sequence[bool] | None = None) -> np.ndarray:
        """Append one token to each row; returns (and keeps in ``state``) the logits ``[B, V]`` after it.

        Args:
            state: what ``prefill`` returned; changed in place.
            tokens: one id a row; that of a row which is not active is ignored.
            active: False for rows that have ended: they write nothing.

        Raises:
            InputError: as ``Engine.decode``.
            RowFailed: scores or logits of a row came out as NaN; nothing has changed.
            CacheFull: no page is left; nothing has changed.
        """
        state = paged(state)
        ids, moving = self._check_step(state, tokens, active)
        held = state.pages.held.copy()
        slot = state.pages.place(moving)
        if state.binding is None:
            self._bind_new_step(state)
        state.step["input_ids"][:] = ids[:, None]
        state.step["slot"][:] = slot
        keep = state.step["keep"]
        try:
            self._run_bound(DECODE, state.binding)
            self._need_numbers(keep, moving.astype(np.int32))
            need_numbers(state.step["logits"], moving)
        except InputError:
            state.pages.cut(held)
            raise
        state.pages.settle(slot, keep, moving)
        state.logits = state.step["logits"][:, -1].astype(np.float32)
        self._decided(keep)
        return state.logits

    def append(self, state: State, rows: Sequence[Sequence[int]], chunk: int | None = None) -> np.ndarray:
        """Append several tokens to each row, such as a later turn; returns the logits ``[B, V]`` after each row's last.

        The new tokens see every key that is held now and, causally, each other; what leaves the window is judged when
        all of them are there, so that ``chunk`` changes nothing but the memory of a call.

        Args:
            state: changed in place.
            rows: token ids of each row; a row without any is left as it is, its logits too.
            chunk: read in pieces of at most this many tokens; None reads all at once.

        Raises:
            InputError: an id outside the vocabulary, more tokens than the capacity, or NaN scores.
            CacheFull: more pages are needed than are left: what fitted of this turn is taken back.
        """
        state = paged(state)
        counts = self._check_turn(state, rows)
        book = state.pages
        self._move(state, book.evict_due())
        before, slots, keeps = book.held.copy(), [], []
        longest = int(counts.max(initial=0))
        size = max(1, longest if chunk is None else chunk)
        for start in range(0, longest, size):
            pieces = [list(row[start : start + size]) for row in rows]
            part = np.array([len(piece) for piece in pieces], np.int32)
            try:
                slot = book.append(part)
            except CacheFull:
                book.cut(before)
                raise
            lengths = np.maximum(part, 1)  # a row that is done repeats token 0, writes nothing, and is not read
            feeds = {
                "lengths": lengths, "past_lengths": (state.lengths + np.minimum(start, counts)).astype(np.int32),
                "page_table": book.table, "slot": slot, "held": book.held,
            }  # fmt: skip
            ids = padded([piece or [0] for piece in pieces], lengths)
            made = self._run(DECODE, ids, feeds, state, outputs=("keep",))
            logits = last(made["logits"], lengths)
            state.logits = np.where((part > 0)[:, None], logits, state.logits)
            slots.append(slot)
            keeps.append(made["keep"])
            self._decided(made["keep"])
        if slots:
            keep = np.concatenate(keeps, -1)
            self._move(state, book.judge(counts, np.concatenate(slots, -1), keep))
            self._need_numbers(keep, counts)
        return state.logits

    def release(self, state: State, row: int) -> None:
        """Give back the pages of a row that has ended."""
        paged(state).pages.release(row)

    def _steps(self, rows: Sequence[Sequence[int]], sampler: Sampler, chunk: int | None, slots: int) -> Iterator[Step]:
        state = self.prefill(rows, chunk, slots, self.limit_pages)
        self.usage = usage = Usage(np.zeros(len(rows)))
        limit = slots if self.context is None else min(slots, self.context)
        while True:
            step = sampler.step(state.logits, state.lengths >= limit)
            usage.bytes = max(usage.bytes, state.bytes_held)
            for row, reason in enumerate(step.stopped):
                if reason is not None or sampler.active[row]:
                    usage.kept[row] = state.kept()[:, row].mean()
                if reason is not None:
                    self.release(state, row)
            yield step
            if not any(sampler.active):
                return
            self.decode(state, [token or 0 for token in step.tokens], sampler.active)

    decisions: list[np.ndarray] | None = None  # where a list is put here, every call adds its int32 ``[L, B, Hkv, T]``
    limit_pages: int | None = None  # pages of each layer's pool in ``generate``; None has room for every key
    usage: Usage | None = None  # of the last ``generate``

    def new_state(self, batch: int, slots: int, pages: int | None) -> PagedState:
        """An empty cache for ``batch`` rows of at most ``slots`` tokens; ``pages`` of each layer, or enough for all."""
        entries = -(-slots // self.page)
        count = batch * self.heads * entries if pages is None else pages
        book = Pages(self.layers, batch, self.heads, self.page, count, entries, self.window, self.sinks)
        return self.over(book, {name: pool.array for name, pool in self.pools(count).items()}, slots)

    def pools(self, pages: int) -> dict[str, Reserved]:
        """New pools ``[P, Z, D]`` of so many pages, by name."""
        if pages < 1:
            raise InputError(f"a cache of {pages} pages", "1 or more for each layer")
        return {name: Reserved((pages, self.page, wide), self._cache_dtype) for name, wide in self._widths.items()}

    def over(self, book: Pages, pools: Mapping[str, np.ndarray], slots: int) -> PagedState:
        """The batch of a book's rows, of at most ``slots`` tokens each, in pools that other batches may share."""
        return PagedState(dict(pools), book.lengths, np.zeros((book.batch, self.vocab), np.float32), slots, book)

    def _bind_cache(self, binding: Any, state: State, row: int | None = None) -> None:
        """As past and as present: all rows share the pools."""
        for name, pool in state.cache.items():
            where = ("cpu", 0, self._cache_dtype, pool.shape, pool.ctypes.data)
            binding.bind_input(name, *where)
            binding.bind_output(name.replace("past.", "present.", 1), *where)

    def _bind_new_step(self, state: PagedState) -> None:
        """Buffers of a step of one token; tables and lengths are the book's own arrays."""
        book, batch = state.pages, len(state.lengths)
        state.step = {
            "input_ids": np.zeros((batch, 1), np.int64), "lengths": np.ones(batch, np.int32),
            "slot": np.zeros((*book.held.shape, 1), np.int32), "keep": np.zeros((*book.held.shape, 1), np.int32),
            "logits": np.zeros((batch, 1, self.vocab), self._logits_dtype),
        }  # fmt: skip
        held = {"past_lengths": book.lengths, "page_table": book.table, "held": book.held}
        outputs = {name: state.step[name] for name in ("keep", "logits")}
        self._bind_step(state, {n: x for n, x in {**state.step, **held}.items() if n not in outputs}, outputs)

    def _move(self, state: PagedState, moves: Sequence[Moves]) -> None:
        """Copy rows within the pools: all are read before any is written."""
        for move in moves:
            for role in ("key", "value"):
                pool = state.cache[f"past.{move.layer}.{role}"]
                pool[move.target] = pool[move.source]

    def _decided(self, keep: np.ndarray) -> None:
        if self.decisions is not None:
            self.decisions.append(keep.copy())

    def _need_numbers(self, keep: np.ndarray, counts: np.ndarray) -> None:
        """Raises RowFailed where the policy's score of a valid token came out as NaN (it counts as kept)."""
        broken = (keep == BROKEN) & (np.arange(keep.shape[-1]) < counts[:, None, None])
        if broken.any():
            layer, row, head, token = np.argwhere(broken)[0].tolist()
            raise RowFailed(
                row, f"the policy's score of layer {layer}, KV head {head}", f", token {token} of this call"
            )

    def run_named(self, rows: Sequence[Sequence[int]], names: Sequence[str]) -> dict[str, np.ndarray]:
        lengths = self._check_rows(rows)
        state = self.new_state(len(rows), self._capacity(int(lengths.max()), None), None)
        feeds = {"lengths": lengths, "free": state.pages.free()}
        return self._run(PREFILL, padded(rows, lengths), feeds, state, names=tuple(names))

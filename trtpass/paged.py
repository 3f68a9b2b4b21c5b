"""Running an engine whose KV cache holds, per layer, row and KV head, only what its policy keeps.

Same calls as ``trtpass.runtime.Engine``. Pools are reserved for a dense cache and hold memory only where a page was
written, so what a process holds is what the policy keeps. Pages that are given back are the first to be taken again.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trtpass.errors import InputError
from trtpass.pages import BROKEN, CacheFull, Moves, Pages
from trtpass.passes.cache_policy import SINKS_KEY, WINDOW_KEY
from trtpass.passes.paged_cache import KIND_KEY, PAGE_KEY, PAGED
from trtpass.runtime import DECODE, PREFILL, Engine, State, last, padded
from trtpass.sampling import Sampler, Step
from trtpass.sessions import Source

__all__ = ["CacheFull", "PagedEngine", "PagedState", "is_paged"]

INTS = np.dtype(np.int32)


def is_paged(stated: Mapping[str, str]) -> bool:
    """Whether a graph's properties say that its cache is paged."""
    return stated.get(KIND_KEY) == PAGED


@dataclass
class PagedState(State):
    """A batch in progress.

    Attributes:
        cache: the pools ``[P, Z, D]`` by name, ``past.{i}.key`` and ``past.{i}.value``.
        pages: who holds what in them; ``lengths`` is its own.
    """

    pages: Pages
    step: dict[str, np.ndarray] = field(default_factory=dict)  # buffers of a decode step, bound once
    binding: Any = None

    @property
    def bytes_held(self) -> int:
        """Bytes of the pages that are in use, keys and values of all layers."""
        of_page = sum(pool[0].nbytes for pool in self.cache.values()) // self.pages.layers if self.cache else 0
        return self.pages.pages_held * of_page

    def kept(self) -> np.ndarray:
        """Share of its tokens that each owner holds ``[L, B, Hkv]``; 0 for a row that was released."""
        share: np.ndarray = self.pages.held / np.maximum(self.lengths, 1)[None, :, None]
        return share


@dataclass
class Usage:
    """What a generation needed: the share of its keys that each row held at its end ``[B]``, and the most bytes of
    pages that all rows together held after a step."""

    kept: np.ndarray
    bytes: int = 0


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
            InputError: as ``Engine.prefill``; or the policy's scores came out as NaN.
            CacheFull: more pages are needed than there are.
        """
        lengths = self._check_rows(rows)
        slots = self._capacity(int(lengths.max()), capacity)
        if chunk is not None:
            self._check_chunk(chunk)
        state = self.new_state(len(rows), slots, pages)
        if chunk is not None:
            self.append(state, rows, chunk)
            return state
        feeds = {"input_ids": padded(rows, lengths), "lengths": lengths, "free": state.pages.free()}
        made = self._call(PREFILL, feeds, state, ("logits", "page_table", "slot", "keep"))
        self._decided(made["keep"])
        self._need_numbers(made["keep"], lengths)
        state.pages.fill(lengths, made["page_table"], made["slot"], made["keep"])
        state.logits = last(made["logits"], lengths)
        return state

    def decode(self, state: State, tokens: Sequence[int], active: Sequence[bool] | None = None) -> np.ndarray:
        """Append one token to each row; returns (and keeps in ``state``) the logits ``[B, V]`` after it.

        Args:
            state: what ``prefill`` returned; changed in place.
            tokens: one id a row; that of a row which is not active is ignored.
            active: False for rows that have ended: they write nothing.

        Raises:
            InputError: as ``Engine.decode``; or the policy's scores came out as NaN.
            CacheFull: no page is left; nothing has changed.
        """
        state = _paged(state)
        ids, moving = self._check_step(state, tokens, active)
        slot = state.pages.place(moving)
        if state.binding is None:
            self._bind_step(state)
        state.step["input_ids"][:] = ids[:, None]
        state.step["slot"][:] = slot
        self._run_bound(DECODE, state.binding)
        keep = state.step["keep"]
        state.pages.settle(slot, keep, moving)
        state.logits = state.step["logits"][:, -1].astype(np.float32)
        self._decided(keep)
        self._need_numbers(np.where(moving[None, :, None, None], keep, 1), np.ones_like(state.lengths))
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
        state = _paged(state)
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
                "input_ids": padded([piece or [0] for piece in pieces], lengths), "lengths": lengths,
                "past_lengths": (state.lengths + np.minimum(start, counts)).astype(np.int32),
                "page_table": book.table, "slot": slot, "held": book.held,
            }  # fmt: skip
            made = self._call(DECODE, feeds, state, ("logits", "keep"))
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
        _paged(state).pages.release(row)

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
        if count < 1:
            raise InputError(f"a cache of {count} pages", "1 or more for each layer")
        book = Pages(self.layers, batch, self.heads, self.page, count, entries, self.window, self.sinks)
        cache = {name: _reserve((count, self.page, width), self._cache_dtype) for name, width in self._widths.items()}
        return PagedState(cache, book.lengths, np.zeros((batch, self.vocab), np.float32), slots, book)

    def _call(
        self, phase: str, feeds: Mapping[str, np.ndarray], state: PagedState, wanted: Sequence[str],
        names: tuple[str, ...] = (),
    ) -> dict[str, np.ndarray]:  # fmt: skip
        binding = self._session(phase, names).io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        self._bind_pools(binding, state)
        for name in wanted:
            binding.bind_output(name, "cpu")
        self._run_bound(phase, binding, names)
        made = binding.get_outputs()[-len(wanted) :]  # in the order of binding
        return {name: np.array(value.numpy()) for name, value in zip(wanted, made, strict=True)}

    def _bind_pools(self, binding: Any, state: PagedState) -> None:
        for name, pool in state.cache.items():
            where = ("cpu", 0, self._cache_dtype, pool.shape, pool.ctypes.data)
            binding.bind_input(name, *where)
            binding.bind_output(name.replace("past.", "present.", 1), *where)

    def _bind_step(self, state: PagedState) -> None:
        """Bind a step of one token once: its buffers and the pools stay where they are."""
        book, batch = state.pages, len(state.lengths)
        state.binding = self._session(DECODE).io_binding()
        self._bind_pools(state.binding, state)
        state.step = {
            "input_ids": np.zeros((batch, 1), np.int64), "lengths": np.ones(batch, np.int32),
            "slot": np.zeros((*book.held.shape, 1), np.int32), "keep": np.zeros((*book.held.shape, 1), np.int32),
            "logits": np.zeros((batch, 1, self.vocab), self._logits_dtype),
        }  # fmt: skip
        held = {"past_lengths": book.lengths, "page_table": book.table, "held": book.held}
        for name, array in {**state.step, **held}.items():
            bind = state.binding.bind_output if name in ("keep", "logits") else state.binding.bind_input
            bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

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
        """Raises InputError where the policy's score of a valid token came out as NaN (it counts as kept)."""
        broken = (keep == BROKEN) & (np.arange(keep.shape[-1]) < counts[:, None, None])
        if broken.any():
            layer, row, head, token = np.argwhere(broken)[0].tolist()
            raise InputError(
                f"the policy's score of layer {layer}, KV head {head} is NaN (row {row}, token {token} of this call)",
                "finite scores", "the model's activations or the checkpoint hold NaN: check both",
            )  # fmt: skip

    def run_named(self, rows: Sequence[Sequence[int]], names: Sequence[str]) -> dict[str, np.ndarray]:
        lengths = self._check_rows(rows)
        state = self.new_state(len(rows), self._capacity(int(lengths.max()), None), None)
        feeds = {"input_ids": padded(rows, lengths), "lengths": lengths, "free": state.pages.free()}
        return self._call(PREFILL, feeds, state, tuple(dict.fromkeys(("logits", *names))), tuple(names))


def _paged(state: State) -> PagedState:
    if not isinstance(state, PagedState):
        raise InputError("the state of an engine with a dense cache", "what this engine's prefill returned")
    return state


def _reserve(shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
    """Zeros whose memory is taken page by page as they are written; in small pages, or each touch would take 2 MiB."""
    count = int(np.prod(shape))
    area = mmap.mmap(-1, max(1, count * np.dtype(dtype).itemsize), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        area.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(area, dtype, count).reshape(shape)

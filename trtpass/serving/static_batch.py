"""Rows that come and go in caches ``[rows, Hkv, slots, D]``: those that run lie in front, without a gap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trtpass.engine_checks import RowFailed, need_numbers
from trtpass.errors import InputError
from trtpass.pages import CacheFull
from trtpass.runtime import Engine, State
from trtpass.serving.request import Limits
from trtpass.serving.rows import Rows, renamed


@dataclass(frozen=True)
class PausedSlots:
    """A row outside the cache.

    Args:
        length: its tokens.
        dropped: int32 ``[layers]``, tokens that a layer's cache does not hold; None: it holds all.
        data: its slots in use ``[Hkv, used, D]``, by name.
    """

    length: int
    dropped: np.ndarray | None
    data: Mapping[str, np.ndarray]


class StaticBatch(Rows):
    """See ``trtpass.serving.batch.Batch``. Room for every row is reserved, and holds memory only where it was written.

    When a row leaves, the last one moves into its place: that row's slots in use are all that is ever copied.
    """

    def __init__(self, engine: Engine, limits: Limits) -> None:
        super().__init__(engine, limits)
        if limits.pages is not None:
            raise InputError(f"{limits.pages} pages for a dense cache", "an engine with a cache policy")
        self._engine = engine
        self._cache = engine.reserve(self.rows, self.capacity)
        self._bytes = np.zeros(len(self._cache) // 2, np.int64)  # [layers], of a token's key and value
        for name, area in self._cache.items():
            self._bytes[_layer(name)] += area.array[0, :, :1].nbytes
        self._order: list[int] = []  # row by place
        self._state = self._state_of(np.zeros(0, np.int32), None)
        self.pages = self.pages_held = 0

    @property
    def running(self) -> int:
        """Rows that have joined and not left."""
        return len(self._order)

    @property
    def bytes_held(self) -> int:
        """Bytes of the slots in use."""
        held, gone = self._bytes.sum() * self._state.lengths.sum(), self._state.dropped
        return int(held if gone is None else held - self._bytes @ gone.sum(1))

    def join(self, prompt: Sequence[int], room: int) -> tuple[int, np.ndarray]:
        """Read a prompt into a free row; returns the row and float32 ``[V]``, the logits after its last token."""
        self._check_join(prompt, room, self.running)
        place, before = self.running, self._state
        self._state = self._grown(0, None)
        try:
            logits = self._engine.read(self._state, place, prompt)
            need_numbers(logits[None], np.ones(1, bool))
        except InputError as error:
            self._state = before
            self._clear(place)
            if isinstance(error, RowFailed):  # of no row that anyone knows
                raise InputError(error.found, error.expected, error.fix) from error
            raise
        self._order.append(self._number())
        return self._order[-1], logits

    def step(self, tokens: Mapping[int, int]) -> dict[int, np.ndarray]:
        """Append one token to each of these rows; returns float32 ``[V]`` by row, the logits after it.

        The graph runs over all rows that have joined. One that is not asked for gets token 0 in its next slot, which
        does not count and is written over by its own next token.

        Raises:
            RowFailed: a row's logits are NaN; nothing has changed. Let it leave, and step the others again.
        """
        if not tokens:
            return {}
        self._check_rows(tokens, self._order)
        moving = np.array([row in tokens for row in self._order])
        lengths, before = self._state.lengths, self._state.logits
        logits = self._engine.decode(self._state, [tokens.get(row, 0) for row in self._order], moving.tolist())
        try:
            need_numbers(logits, moving)
        except RowFailed as failed:
            self._state.lengths, self._state.logits = lengths, before
            raise renamed(failed, self._order[failed.row]) from failed
        return {row: answer for row, answer in zip(self._order, logits, strict=True) if row in tokens}

    def leave(self, row: int) -> None:
        """Free the row and its memory."""
        hole, end = self._place(row), self.running - 1
        self._clear(hole)
        keep = np.arange(end)
        if hole != end:
            for name, area in self._cache.items():
                used = self._used(name, end)
                area.array[hole, :, :used] = area.array[end, :, :used]
            self._clear(end)
            keep[hole] = end
            self._order[hole] = self._order[end]
        self._order.pop()
        state = self._state
        self._state = self._state_of(state.lengths[keep], None if state.dropped is None else state.dropped[:, keep])

    def pause(self, row: int) -> PausedSlots:
        """Take a row out of the batch, with a copy of its slots."""
        place = self._place(row)
        data = {name: area.array[place, :, : self._used(name, place)].copy() for name, area in self._cache.items()}
        gone = self._state.dropped
        paused = PausedSlots(int(self._state.lengths[place]), None if gone is None else gone[:, place].copy(), data)
        self.leave(row)
        return paused

    def resume(self, paused: PausedSlots) -> int:
        """Put a paused row back.

        Raises:
            CacheFull: there is no free row; ``paused`` is as good as before.
        """
        if self.running == self.rows:
            raise CacheFull(f"all {self.rows} rows are taken", "a free row", "wait until one leaves")
        self._state = self._grown(paused.length, paused.dropped)
        for name, area in self._cache.items():
            area.array[self.running, :, : paused.data[name].shape[1]] = paused.data[name]
        self._order.append(self._number())
        return self._order[-1]

    def length(self, row: int) -> int:
        """Tokens of a row so far."""
        return int(self._state.lengths[self._place(row)])

    def kept(self, row: int) -> float:
        """Share of its tokens that the row's cache holds, mean over layers."""
        place = self._place(row)
        if self._state.dropped is None:
            return 1.0
        return float(1 - self._state.dropped[:, place].mean() / self._state.lengths[place])

    def _place(self, row: int) -> int:
        self._check_rows([row], self._order)
        return self._order.index(row)

    def _used(self, name: str, place: int) -> int:
        """Slots in use of the row at a place, in the cache ``past.{i}.key`` or ``past.{i}.value``."""
        gone = 0 if self._state.dropped is None else self._state.dropped[_layer(name), place]
        return int(self._state.lengths[place] - gone)

    def _grown(self, length: int, dropped: np.ndarray | None) -> State:
        """The state with one more row behind the others."""
        state = self._state
        gone = state.dropped
        if self._engine.shortened is not None:
            new = np.zeros((self._engine.shortened.layers, 1), np.int32) if dropped is None else dropped[:, None]
            gone = new if gone is None else np.concatenate([gone, new], 1)
        return self._state_of(np.append(state.lengths, np.int32(length)), gone)

    def _state_of(self, lengths: np.ndarray, dropped: np.ndarray | None) -> State:
        return self._engine.state_of(self._cache, lengths, dropped, self.capacity)

    def _clear(self, place: int) -> None:
        for area in self._cache.values():
            area.clear(place, place + 1)


def _layer(name: str) -> int:
    """Of the cache ``past.{i}.key`` or ``past.{i}.value``."""
    return int(name.split(".")[1])

"""What an engine refuses before it runs anything: rows, steps and turns that its graphs or its cache cannot take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from trtpass.errors import InputError

if TYPE_CHECKING:
    from trtpass.reduction.decoder import Shortened
    from trtpass.runtime import State

DEFAULT_HEADROOM = 256  # tokens after the prompt, where neither the graph nor the model states a limit


class RowFailed(InputError):
    """One row of a batch cannot go on: numbers of its own are NaN. The call that raises it has changed nothing.

    Args:
        row: which one.
        what: is NaN, for the error's text.
        where: what follows the row in it.
    """

    def __init__(self, row: int, what: str, where: str = "") -> None:
        self.row, self.what, self.where = row, what, where
        super().__init__(
            f"{what} is NaN (row {row}{where})", "finite numbers",
            "the model's activations or the checkpoint hold NaN: check both",
        )  # fmt: skip


def need_numbers(logits: np.ndarray, rows: np.ndarray) -> None:
    """Raises RowFailed where logits ``[B, ..., V]`` of one of these rows, bool ``[B]``, hold a NaN."""
    broken = np.isnan(logits.reshape(len(logits), -1).max(-1)) & rows
    if broken.any():
        raise RowFailed(int(broken.argmax()), "a logit")


class Checks:
    """Of an engine.

    Attributes:
        context: most tokens of a row, where something states it.
        fixed_capacity: slots of a row, where the graph fixes them.
        shortened: what a span method did to the graphs.
        vocab: V.
    """

    context: int | None
    fixed_capacity: int | None
    shortened: Shortened | None
    vocab: int

    def _capacity(self, longest: int, asked: int | None) -> int:
        default = self.context if self.context is not None else longest + DEFAULT_HEADROOM
        slots = self.fixed_capacity or (default if asked is None else asked)
        self._check_fits(longest, slots)
        return slots

    @staticmethod
    def _check_fits(longest: int, slots: int) -> None:
        if longest > slots:
            raise InputError(f"a prompt of {longest} tokens for a cache of {slots} slots", f"at most {slots} tokens")

    def _check_rows(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        if not rows or not all(len(row) for row in rows):
            raise InputError("a batch without rows, or a row without tokens", "at least one token in each row")
        lengths = np.array([len(row) for row in rows], np.int32)
        if self.context is not None and lengths.max() > self.context:
            row = int(lengths.argmax())
            raise InputError(
                f"row {row} has {lengths[row]} tokens",
                f"at most {self.context}, the context limit",
                "shorten the prompt",
            )
        for row_ids in rows:
            self._check_ids(np.asarray(row_ids, np.int64))
        if self.shortened is not None:
            self.shortened.check(lengths)
        return lengths

    def _check_step(
        self, state: State, tokens: Sequence[int], active: Sequence[bool] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids ``[B]``, 0 for rows that have ended, and which rows go on ``[B]``, with room for one more token each."""
        batch = len(state.lengths)
        moving = np.ones(batch, bool) if active is None else np.asarray(active, bool)
        if len(tokens) != batch or moving.shape != (batch,):
            raise InputError(f"{len(tokens)} tokens for {batch} rows", "one token a row")
        ids = np.where(moving, np.asarray(tokens, np.int64), 0)
        self._check_ids(ids)
        self._check_room(state, moving.astype(np.int32))
        return ids, moving

    def _check_turn(self, state: State, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Tokens of each row ``[B]``, all in the vocabulary, with room for them."""
        if len(rows) != len(state.lengths):
            raise InputError(f"{len(rows)} rows of tokens for {len(state.lengths)} rows", "one list of tokens a row")
        for row in rows:
            self._check_ids(np.asarray(row, np.int64))
        counts = np.array([len(row) for row in rows], np.int32)
        self._check_room(state, counts)
        return counts

    @staticmethod
    def _check_room(state: State, counts: np.ndarray) -> None:
        full = (counts > 0) & (state.lengths + counts > state.capacity)
        if full.any():
            row = int(full.argmax())
            more = (
                "no slot left"
                if counts[row] == 1
                else f"{state.capacity - state.lengths[row]} slots left for {counts[row]}"
            )
            raise InputError(
                f"row {row} has {state.lengths[row]} tokens and {more}", "lengths below the capacity",
                "allocate a larger capacity in prefill, within the context limit",
            )  # fmt: skip

    def _check_ids(self, ids: np.ndarray) -> None:
        bad = ids[(ids < 0) | (ids >= self.vocab)]
        if bad.size:
            raise InputError(f"token id {int(bad[0])}", f"0 to {self.vocab - 1}", "use this model's tokenizer")

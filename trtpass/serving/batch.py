"""A batch whose rows come and go: the contract between the scheduler and an engine's cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np


class Batch(Protocol):
    """Rows of one engine in decode. A row is known by a number of its own from ``join`` to ``leave``.

    What a row computes does not depend on the rows beside it: its tokens are those of ``Engine.generate`` on that
    prompt alone. One thread calls.

    Attributes:
        rows: most rows at once.
        capacity: tokens that a row may have, prompt and answer.
        pages: pages that there are, all layers together; 0 where the cache is not paged.
    """

    rows: int
    capacity: int
    pages: int

    @property
    def running(self) -> int:
        """Rows that have joined and not left (paused ones are not counted)."""

    @property
    def pages_held(self) -> int:
        """Pages in use, all layers together; 0 where the cache is not paged."""

    @property
    def bytes_held(self) -> int:
        """Bytes of keys and values that the running rows hold."""

    def join(self, prompt: Sequence[int], room: int) -> tuple[int, np.ndarray]:
        """Read a prompt into a free row; returns the row and float32 ``[V]``, the logits after its last token.

        Args:
            prompt: token ids, at least one.
            room: tokens that the row will have at most, prompt and answer.

        Raises:
            InputError: what ``Engine.prefill`` refuses, or no row is free; nothing has changed.
            CacheFull: memory is short; nothing has changed.
        """

    def step(self, tokens: Mapping[int, int]) -> dict[int, np.ndarray]:
        """Append one token to each of these rows; the others stay as they are.

        Returns:
            float32 ``[V]`` by row: the logits after its token.

        Raises:
            CacheFull: no page is left for some row; nothing has changed.
            RowFailed: the numbers of one row, its ``row``, are NaN; nothing has changed, so that once it has left the
                others can be stepped again.
        """

    def leave(self, row: int) -> None:
        """Free the row and its memory."""

    def pause(self, row: int) -> Any:
        """Take a row out of the batch, with what it holds, so that its pages are free for others."""

    def resume(self, paused: Any) -> int:
        """Put a paused row back; its number may be another.

        Raises:
            CacheFull: there is no room yet; ``paused`` is as good as before.
        """

    def length(self, row: int) -> int:
        """Tokens of a row so far."""

    def kept(self, row: int) -> float:
        """Share of its tokens that the row's cache holds, mean over layers and KV heads: 0 to 1."""

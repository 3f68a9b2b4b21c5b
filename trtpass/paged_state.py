"""A batch in progress whose cache is in pages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trtpass.errors import InputError
from trtpass.pages import Pages
from trtpass.runtime import State


@dataclass
class PagedState(State):
    """A batch in progress.

    Attributes:
        cache: the pools ``[P, Z, D]`` by name, ``past.{i}.key`` and ``past.{i}.value``.
        pages: who holds what in them; ``lengths`` is its own.
    """

    pages: Pages

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


def paged(state: State) -> PagedState:
    """The state itself.

    Raises:
        InputError: it is another engine's.
    """
    if not isinstance(state, PagedState):
        raise InputError("the state of an engine with a dense cache", "what this engine's prefill returned")
    return state

"""The pages of a paged cache that nobody holds: one list a layer, shared by the books of all rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trtpass.errors import InputError

Ints = np.ndarray[Any, np.dtype[np.int32]]


class CacheFull(InputError):
    """No page is left. What was generated so far stays as it is, and the step that did not fit has not been run."""


class FreePages:
    """Free pages of each layer's pool. Those that were given back last are taken first.

    Args:
        layers: L.
        pages: P, pages of each layer's pool.
    """

    def __init__(self, layers: int, pages: int) -> None:
        self.layers, self.pages = layers, pages
        self._stacks = [list(range(pages - 1, -1, -1)) for _ in range(layers)]

    @property
    def held(self) -> int:
        """Pages in use, all layers together."""
        return self.layers * self.pages - sum(map(len, self._stacks))

    def order(self, most: int | None = None) -> Ints:
        """At most so many free pages of each layer, in the order in which they are taken ``[L, F]``, -1 behind them."""
        taken = [stack[::-1][:most] for stack in self._stacks]
        made = np.full((self.layers, max(1, *map(len, taken))), -1, np.int32)
        for row, pages in zip(made, taken, strict=True):
            row[: len(pages)] = pages
        return made

    def need(self, counts: Sequence[int] | np.ndarray) -> None:
        """Raise unless each layer has as many free pages as ``counts [L]`` says.

        Raises:
            CacheFull: the first layer that has not.
        """
        for layer, (count, stack) in enumerate(zip(counts, self._stacks, strict=True)):
            if count > len(stack):
                raise CacheFull(
                    f"the KV cache is full: layer {layer} wants {count} pages, "
                    f"and {len(stack)} of {self.pages} are free",
                    "room for the keys that are kept",
                    "give more pages, a shorter prompt, fewer rows, or a higher threshold",
                )

    def take(self, layer: int, count: int) -> list[int]:
        """The next ``count`` pages of a layer, which has them."""
        stack = self._stacks[layer]
        left = len(stack) - count
        taken = stack[left:][::-1]
        del stack[left:]
        return taken

    def give(self, layer: int, pages: Ints) -> None:
        """Take pages back: the first of them will be the next to be taken."""
        self._stacks[layer] += pages[::-1].tolist()

"""Choosing tokens: greedy or sampled, and when a row of a batch stops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Step:
    """One step of generation: a row's token (None once it has stopped), and why it stopped at this step.

    Reasons: ``stop`` (a stop token, which is the step's token), ``length`` (max_tokens), ``context`` (no slot left).
    """

    tokens: tuple[int | None, ...]
    stopped: tuple[str | None, ...]


class Sampler:
    """The rows of a batch, of which ``active`` says which go on.

    Each row has a random stream of its own, so that what it draws does not depend on the rows beside it.
    """

    def __init__(self, rows: int, max_tokens: int, stop_ids: Sequence[int], temperature: float, seed: int) -> None:
        self.active = [True] * rows
        self._left, self._stop_ids, self._temperature = max_tokens, frozenset(stop_ids), temperature
        self._streams = [np.random.default_rng([seed, row]) for row in range(rows)]

    def step(self, logits: np.ndarray, full: np.ndarray) -> Step:
        """Choose the next token of each active row.

        Args:
            logits: float ``[B, V]`` after the last token of each row.
            full: bool ``[B]``, whether a row's cache has no slot left for the chosen token.
        """
        self._left -= 1
        tokens: list[int | None] = [None] * len(self.active)
        stopped: list[str | None] = [None] * len(self.active)
        for row in [row for row, going in enumerate(self.active) if going]:
            tokens[row] = token = sample(logits[row], self._temperature, self._streams[row])
            if token in self._stop_ids:
                stopped[row] = "stop"
            elif self._left == 0:
                stopped[row] = "length"
            elif full[row]:
                stopped[row] = "context"
            self.active[row] = stopped[row] is None
        return Step(tuple(tokens), tuple(stopped))


def sample(logits: np.ndarray, temperature: float, stream: np.random.Generator) -> int:
    """A token from ``logits [V]``: the first largest at temperature 0, else one drawn from softmax."""
    if temperature == 0:
        return int(logits.argmax())
    scaled = (logits.astype(np.float64) - logits.max()) / temperature
    weights = np.exp(scaled)
    return int(stream.choice(len(weights), p=weights / weights.sum()))

"""Choosing tokens: greedy or sampled, and when a row of a batch stops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from trtpass.errors import InputError


@dataclass(frozen=True)
class Step:
    """One step of generation: a row's token (None once it has stopped), and why it stopped at this step.

    Reasons: ``stop`` (a stop token, which is the step's token, or ``ends`` said so), ``length`` (max_tokens),
    ``context`` (no slot left).
    """

    tokens: tuple[int | None, ...]
    stopped: tuple[str | None, ...]


class RowSampler:
    """The tokens of one row, and when it stops.

    Args:
        max_tokens: most tokens.
        stop_ids: tokens that end the row.
        temperature: 0 is greedy; else softmax(logits / temperature) is sampled.
        seed, row: of the random stream.
        top_p: share of the probability that is sampled from, see ``sample``. It and the temperature are rounded to
            float32, as which a server's request carries them: so the same numbers draw the same tokens.
        ends: called with each token that is no stop token; whether it ends the row (with a stop text, say).

    Raises:
        InputError: a value that is not in its range.
    """

    def __init__(
        self, max_tokens: int, stop_ids: frozenset[int], temperature: float, seed: int, row: int = 0,
        top_p: float = 1.0, ends: Callable[[int], bool] | None = None,
    ) -> None:  # fmt: skip
        if max_tokens < 1:
            raise InputError(f"max_tokens={max_tokens}", "1 or more")
        with np.errstate(over="ignore"):
            self._temperature, self._top_p = float(np.float32(temperature)), float(np.float32(top_p))
        if not (temperature >= 0 and math.isfinite(self._temperature)):
            raise InputError(f"temperature={temperature}", "0 (greedy) or more, and finite")
        if not 0 < top_p <= 1:
            raise InputError(f"top_p={top_p}", "above 0 and at most 1 (everything)")
        if seed < 0:
            raise InputError(f"seed={seed}", "0 or more")
        self._left, self._stop_ids, self._ends = max_tokens, stop_ids, ends
        self._stream = np.random.default_rng([seed, row])

    def step(self, logits: np.ndarray, full: bool) -> tuple[int, str | None]:
        """The next token, and why the row stops with it (see ``Step``), if it does.

        Args:
            logits: float ``[V]`` after the row's last token.
            full: whether the row's cache has no slot left for the chosen token.
        """
        token = sample(logits, self._temperature, self._stream, self._top_p)
        self._left -= 1
        if token in self._stop_ids or (self._ends is not None and self._ends(token)):
            return token, "stop"
        if self._left == 0:
            return token, "length"
        return token, "context" if full else None


class Sampler:
    """The rows of a batch, of which ``active`` says which go on.

    Each row has a random stream of its own, so that what it draws does not depend on the rows beside it. Arguments are
    those of ``RowSampler``; ``ends`` is called with the row and its token.
    """

    def __init__(
        self, rows: int, max_tokens: int, stop_ids: Sequence[int], temperature: float, seed: int, top_p: float = 1.0,
        ends: Callable[[int, int], bool] | None = None,
    ) -> None:  # fmt: skip
        self.active = [True] * rows
        stops = frozenset(stop_ids)
        self._rows = [
            RowSampler(max_tokens, stops, temperature, seed, row, top_p, None if ends is None else partial(ends, row))
            for row in range(rows)
        ]

    def step(self, logits: np.ndarray, full: np.ndarray) -> Step:
        """Choose the next token of each active row.

        Args:
            logits: float ``[B, V]`` after the last token of each row.
            full: bool ``[B]``, whether a row's cache has no slot left for the chosen token.
        """
        tokens: list[int | None] = [None] * len(self.active)
        stopped: list[str | None] = [None] * len(self.active)
        for row in [row for row, going in enumerate(self.active) if going]:
            tokens[row], stopped[row] = self._rows[row].step(logits[row], bool(full[row]))
            self.active[row] = stopped[row] is None
        return Step(tuple(tokens), tuple(stopped))


def sample(logits: np.ndarray, temperature: float, stream: np.random.Generator, top_p: float = 1.0) -> int:
    """A token from ``logits [V]``: the first largest at temperature 0, else one drawn from softmax.

    Below ``top_p=1`` only the nucleus is drawn from: the fewest most likely tokens whose probability reaches ``top_p``
    together; of equally likely ones the lower ids come first.

    Raises:
        InputError: the logits hold NaN, or no finite number at all.
    """
    largest = int(logits.argmax())  # the first NaN, where there is one
    if not np.isfinite(logits[largest]):
        raise InputError(
            f"the largest of the logits is {logits[largest]}", "finite logits",
            "the model's activations or the checkpoint hold NaN or infinity: check both",
        )  # fmt: skip
    if temperature == 0:
        return largest
    with np.errstate(over="ignore"):  # a tiny temperature: the others are at -inf, and weigh 0
        scaled = (logits.astype(np.float64) - logits.max()) / temperature
    weights = np.exp(scaled)
    if top_p < 1:
        weights = _nucleus(weights, top_p)
    return int(stream.choice(len(weights), p=weights / weights.sum()))


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """``weights [V]`` of the nucleus, 0 elsewhere. Sorts values alone, which is several times faster than ids, and none
    below a value under which all tokens together are too unlikely to matter."""
    total = weights.sum()
    ordered = np.sort(weights[weights >= (1 - top_p) * total / len(weights)])[::-1]
    count = min(int(np.searchsorted(np.cumsum(ordered), top_p * total)) + 1, len(ordered))
    least = ordered[count - 1]
    made = np.where(weights > least, weights, 0.0)
    equal = np.flatnonzero(weights == least)[: count - int((weights > least).sum())]
    made[equal] = least
    return made

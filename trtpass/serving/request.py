"""What is asked of a text model, what comes back piece by piece, and the limits of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from trtpass.errors import InputError

Finish = Literal["stop", "length", "context", "cache"]


class Refused(InputError):
    """A request that may be repeated later: the queue is full, or the server is shutting down."""


class OverLimit(InputError):
    """A request beyond a limit of the server."""


@dataclass(frozen=True)
class Request:
    """One prompt and how to go on from it.

    Args:
        prompt: token ids, at least one.
        max_tokens: most new tokens.
        stop: texts that end the answer, which is cut before the first of them.
        temperature: 0 is greedy.
        top_p: share of the probability that is sampled from, above 0 and at most 1.
        seed: of the row's random stream.
        logits: whether the first piece carries the logits after the prompt.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    logits: bool = False


@dataclass(frozen=True)
class Piece:
    """A piece of an answer. Pieces joined are the answer; the last one has a ``finish``.

    Args:
        text: may be empty: a character or a stop text may be unfinished.
        tokens: new token ids since the last piece, a stop token among them.
        finish: ``stop`` (a stop token or text), ``length`` (max_tokens), ``context`` (the row is full), ``cache`` (the
            pages of the whole batch are not enough for this row alone).
        prompt_tokens, completion_tokens: so far.
        kept: share of the row's tokens that its cache holds.
        logits: float32 ``[V]`` after the prompt, in the first piece of a request that asked for them.
    """

    text: str
    tokens: tuple[int, ...]
    finish: Finish | None
    prompt_tokens: int
    completion_tokens: int
    kept: float
    logits: np.ndarray | None = None


class Listener(Protocol):
    """Who asked. Called from the scheduler's thread; exactly one of a last piece and ``failed`` ends it. What it raises
    ends the request too: ``failed`` is called with it."""

    def piece(self, piece: Piece) -> None:
        """Take the next piece."""

    def failed(self, error: Exception) -> None:
        """The request ends without a last piece."""

    def gone(self) -> bool:
        """Whether the client has given up; then its row is freed, and ``failed`` is called with ``Cancelled``."""


class Cancelled(InputError):
    """The client has gone."""


@dataclass(frozen=True)
class Limits:
    """What a text model takes on.

    Args:
        rows: most requests that are decoded at once.
        queue: most requests that wait for a row; one more is refused, that is where ``rows + queue`` run or wait.
        prompt_tokens: most tokens of a prompt.
        new_tokens: most ``max_tokens`` of a request.
        pages: pages of each layer's pool, where the cache is paged; None has room for every key of every row.
        threads: threads of one operator; None leaves the choice to ONNX Runtime.
    """

    rows: int = 16
    queue: int = 64
    prompt_tokens: int = 4096
    new_tokens: int = 1024
    pages: int | None = None
    threads: int | None = None

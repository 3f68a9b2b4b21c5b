"""A batch without an engine, a byte tokenizer, and clients, for tests of the scheduler."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trtpass.errors import InputError
from trtpass.pages import CacheFull
from trtpass.sampling import sample
from trtpass.serving.observer import Observer
from trtpass.serving.request import Piece, Request
from trtpass.text import Tokenizer

VOCAB, PAGE, STOP = 24, 4, 23
BYTES = [*b"abcdefghijklmnopqrst ", 0xC3, 0xA9]  # of tokens 0 to 22; the last two are one character together
ASCII = range(STOP + 1, 128)  # tokens of the engines' tests beyond the stop token, by their own byte


class ByteTokens:
    """What ``trtpass.text.Tokenizer`` asks of the package: decoding."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return bytes(i if i in ASCII else BYTES[i] for i in ids if i != STOP).decode("utf-8", "replace")


TOKENIZER = Tokenizer(ByteTokens())


def logits_after(tokens: Sequence[int]) -> np.ndarray:
    """Float32 ``[V]`` that depend on the last three tokens and their place, so a mistake in any of them shows."""
    rng = np.random.default_rng([len(tokens), *tokens[-3:]])
    logits = rng.normal(size=VOCAB).astype(np.float32)
    logits[STOP] -= 1
    return logits


class RowError(InputError):
    """A failure of one row of a step."""

    def __init__(self, row: int) -> None:
        super().__init__(f"row {row} is broken")
        self.row = row


class FakeBatch:
    """See ``trtpass.serving.batch.Batch``. A page holds 4 tokens; ``log`` has every call that changed something.

    Args:
        pages: 0 is without limit, as where the cache is not paged.
    """

    def __init__(self, rows: int, capacity: int = 1000, pages: int = 0) -> None:
        self.rows, self.capacity, self.pages = rows, capacity, pages
        self.log: list[tuple[Any, ...]] = []
        self.full = 0  # calls that ended in CacheFull
        self.fail: Callable[[str, Sequence[int]], None] = lambda call, tokens: None  # may raise
        self._held: dict[int, list[int]] = {}
        self._next = 0
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> int:
        return len(self._held)

    @property
    def pages_held(self) -> int:
        return sum(-(-len(tokens) // PAGE) for tokens in self._held.values()) if self.pages else 0

    @property
    def bytes_held(self) -> int:
        return 8 * sum(map(len, self._held.values()))

    def join(self, prompt: Sequence[int], room: int) -> tuple[int, np.ndarray]:
        self.fail("join", prompt)
        assert len(prompt) <= room <= self.capacity
        if max(prompt) >= VOCAB:
            raise InputError(f"token id {max(prompt)}", f"0 to {VOCAB - 1}")
        row = self._put(list(prompt))
        self.log.append(("join", row, tuple(prompt)))
        return row, logits_after(prompt)

    def step(self, tokens: Mapping[int, int]) -> dict[int, np.ndarray]:
        self._one_thread()
        assert tokens and tokens.keys() <= self._held.keys()
        for row in tokens:
            self.fail("step", self._held[row])
        self._need(sum(len(self._held[row]) % PAGE == 0 for row in tokens))
        for row, token in tokens.items():
            self._held[row].append(token)
            assert len(self._held[row]) <= self.capacity
        self.log.append(("step", tuple(tokens)))
        return {row: logits_after(self._held[row]) for row in tokens}

    def leave(self, row: int) -> None:
        self._one_thread()
        del self._held[row]
        self.log.append(("leave", row))

    def pause(self, row: int) -> list[int]:
        self._one_thread()
        self.log.append(("pause", row, tuple(self._held[row])))
        return self._held.pop(row)

    def resume(self, paused: list[int]) -> int:
        row = self._put(paused)
        self.log.append(("resume", row, tuple(paused)))
        return row

    def length(self, row: int) -> int:
        return len(self._held[row])

    def kept(self, row: int) -> float:
        return 1 / len(self._held[row])

    def _put(self, tokens: list[int]) -> int:
        self._one_thread()
        assert self.running < self.rows
        self._need(-(-len(tokens) // PAGE))
        self._next += 1
        self._held[self._next] = tokens
        return self._next

    def _need(self, pages: int) -> None:
        if self.pages and self.pages_held + pages > self.pages:
            self.full += 1
            raise CacheFull(f"{pages} pages wanted, {self.pages - self.pages_held} of {self.pages} are free")

    def _one_thread(self) -> None:
        self._thread = self._thread or threading.current_thread()
        assert threading.current_thread() is self._thread, "a batch is used by one thread"


@dataclass(eq=False)
class Client:
    """A listener. ``gives_up`` after so many pieces; ``raises`` at the piece of that number."""

    gives_up: int | None = None
    raises: int | None = None
    pieces: list[Piece] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def piece(self, piece: Piece) -> None:
        assert not self.ended.is_set()
        if self.raises == len(self.pieces):
            raise RuntimeError("the client broke")
        self.pieces.append(piece)
        if piece.finish:
            self.ended.set()

    def failed(self, error: Exception) -> None:
        assert not self.ended.is_set()
        self.errors.append(error)
        self.ended.set()

    def gone(self) -> bool:
        return self.gives_up is not None and len(self.pieces) >= self.gives_up

    @property
    def answer(self) -> tuple[str, list[int], str | None]:
        """Text, tokens, and why it ended."""
        tokens = [token for piece in self.pieces for token in piece.tokens]
        return "".join(p.text for p in self.pieces), tokens, self.pieces[-1].finish if self.pieces else None


class Recorder(Observer):
    """Everything that was said, by name."""

    def __init__(self) -> None:
        self.said: list[tuple[Any, ...]] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and hasattr(Observer, name):
            return lambda *values: self.said.append((name, *values))
        return super().__getattribute__(name)

    def all(self, name: str) -> list[tuple[Any, ...]]:
        """The arguments of every call of that name."""
        return [values for said, *values in list(self.said) if said == name]


def alone(request: Request, capacity: int = 1000, pages: int = 0) -> tuple[str, list[int], str]:
    """The answer to a request that has everything to itself, by plain means; its stop texts are of one length each."""
    stream = np.random.default_rng([request.seed, 0])
    row, made = list(request.prompt), list[int]()
    while True:
        token = sample(logits_after(row), request.temperature, stream, request.top_p)
        made.append(token)
        text = ByteTokens().decode(made, True)
        places = [text.find(stop) for stop in request.stop if stop in text]
        if places:
            return text[: min(places)], made, "stop"
        if token == STOP:
            return text, made, "stop"
        if len(made) == request.max_tokens:
            return text, made, "length"
        if len(row) == capacity:
            return text, made, "context"
        row.append(token)
        if pages and len(row) > pages * PAGE:
            return text, made, "cache"


def random_request(rng: np.random.Generator, longest: int = 20) -> Request:
    """Of every kind: greedy, sampled, from a nucleus, with and without stop texts."""
    letters = "abcdefghijklmnopqrst"
    stop = tuple("".join(rng.choice(list(letters), 2)) for _ in range(rng.integers(0, 12)))
    return Request(
        prompt=tuple(rng.integers(0, VOCAB - 1, rng.integers(1, longest)).tolist()),
        max_tokens=int(rng.integers(1, 30)),
        stop=stop,
        temperature=float(rng.choice([0.0, 0.7, 2.0])),
        top_p=float(rng.choice([1.0, 0.8, 0.3])),
        seed=int(rng.integers(0, 2**40)),
        logits=bool(rng.random() < 0.2),
    )

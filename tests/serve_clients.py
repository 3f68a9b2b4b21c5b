"""Clients of a served text model, the answers that its runtime gives alone, and what a server says about itself."""

from __future__ import annotations

import itertools
import json
import re
import socket
import threading
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import psutil

from tests.served import PATIENCE, model_processes, until
from trtpass.manifest import Manifest
from trtpass.paged import PagedEngine
from trtpass.runtime import Engine
from trtpass.server import client
from trtpass.server.process import Server
from trtpass.text import AnswerText, Tokenizer

Way = Literal["generate", "stream", "grpc"]
WAYS: tuple[Way, ...] = ("generate", "stream", "grpc")
ENDS = ("stop", "length", "context", "cache", "cancelled", "failed")
BESIDE = "a stream that runs beside all that goes wrong"
GAUGES = ("trtpass_rows_running", "trtpass_pages_in_use", "trtpass_requests_waiting", "trtpass_cache_bytes")


@dataclass(frozen=True)
class Ask:
    """One request to one model."""

    model: str
    prompt: str | tuple[int, ...]
    max_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """Everything but the prompt, as the client takes it."""
        return {
            "max_tokens": self.max_tokens, "stop": list(self.stop), "temperature": self.temperature,
            "top_p": self.top_p, "seed": self.seed,
        }  # fmt: skip


def pieces(server: Server, ask: Ask, way: Way, **options: Any) -> Iterator[client.Answer]:
    """The answer as it comes: one piece for ``generate``. Closing the iterator disconnects."""
    given = {"timeout": PATIENCE, **ask.options, **options}
    if way == "generate":
        yield client.generate(server.http, ask.model, ask.prompt, **given)
    elif way == "stream":
        yield from client.stream(server.http, ask.model, ask.prompt, **given)
    else:
        yield from client.stream_grpc(server.grpc, ask.model, ask.prompt, **given)


def answer(server: Server, ask: Ask, way: Way, **options: Any) -> client.Answer:
    """The whole answer."""
    return client.join(pieces(server, ask, way, **options))


def begin(server: Server, ask: Ask, way: Way, count: int) -> list[client.Answer]:
    """The first pieces of an answer; then the client hangs up, without a word."""
    if way == "generate":
        hang_up(server, ask)
        return []
    with closing(pieces(server, ask, way)) as coming:  # type: ignore[type-var]
        return list(itertools.islice(coming, count))


def request_bytes(ask: Ask, path: str = "generate_stream", **more: Any) -> bytes:
    """A request of HTTP, head and body."""
    name = "text_input" if isinstance(ask.prompt, str) else "input_ids"
    body = json.dumps({name: ask.prompt, **ask.options, **more}).encode()
    head = f"POST /v2/models/{ask.model}/{path} HTTP/1.1\r\nHost: test\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def connected(server: Server, room: int | None = None) -> socket.socket:
    """A socket to the HTTP port, with so small a buffer for what it gets."""
    made = socket.socket()
    if room is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    made.settimeout(PATIENCE)
    made.connect((urlsplit(server.http).hostname, server.ports["http"]))
    return made


def hang_up(server: Server, ask: Ask) -> None:
    """Ask for a whole answer and go away at once."""
    with connected(server) as wire:
        wire.sendall(request_bytes(ask, "generate"))


class Alone:
    """What the runtime answers to one request at a time.

    Args:
        engines: model -> folder of its engine.
    """

    def __init__(self, engines: Mapping[str, Path]) -> None:
        self._engines = engines
        self.answer = cache(self._answer)
        self._opened = cache(self._open)

    def _open(self, model: str) -> tuple[Engine, Tokenizer]:
        folder = self._engines[model]
        return Engine.open(folder, "cpu", 1, Manifest.read(folder).context), Tokenizer.open(folder)

    def ids(self, ask: Ask) -> list[int]:
        """Token ids of a prompt."""
        return self._opened(ask.model)[1].encode(ask.prompt) if isinstance(ask.prompt, str) else list(ask.prompt)

    def _answer(self, ask: Ask) -> client.Answer:
        engine, tokenizer = self._opened(ask.model)
        text, prompt, tokens = AnswerText(tokenizer, ask.stop), self.ids(ask), []
        shown, finish = "", ""
        steps = engine.generate(
            [prompt], ask.max_tokens, (), ask.temperature, ask.seed, top_p=ask.top_p, ends=lambda _, i: text.push(i)
        )
        for step in steps:
            tokens.append(step.tokens[0])
            reason = step.stopped[0]
            piece, finish = text.finish(reason) if reason else (text.take(), "")
            shown += piece
        usage = engine.usage if isinstance(engine, PagedEngine) else None
        kept = 1.0 if usage is None else float(usage.kept[0])
        made = tuple(token for token in tokens if token is not None)
        return client.Answer(shown, made, finish, len(prompt), len(made), kept)


def check_same(found: client.Answer, right: client.Answer) -> None:
    """Every field; the share that was kept travels as float32."""
    assert (found.tokens, found.text, found.finish) == (right.tokens, right.text, right.finish)
    assert (found.prompt_tokens, found.completion_tokens) == (right.prompt_tokens, len(right.tokens))
    assert abs(found.kept - right.kept) < 1e-6


def check_begins(found: Sequence[client.Answer], right: client.Answer) -> None:
    """Pieces of an answer that was cut off."""
    tokens, text = tuple(i for piece in found for i in piece.tokens), "".join(piece.text for piece in found)
    assert right.tokens[: len(tokens)] == tokens and right.text.startswith(text)
    for piece in found:
        assert piece.prompt_tokens == right.prompt_tokens
        assert piece.completion_tokens == len(right.tokens) or not piece.finish


@contextmanager
def undisturbed(server: Server, alone: Alone, model: str) -> Iterator[None]:
    """Streams that run one after the other, before, during and after the block, each with the right answer."""
    asks = [Ask(model, BESIDE, 45), Ask(model, BESIDE, 45, (), 1.1, 0.9, 5)]
    right = [alone.answer(ask) for ask in asks]
    begun, enough = threading.Event(), threading.Event()

    def go() -> None:
        for i in itertools.cycle(range(2)):
            last, found = enough.is_set(), []
            for piece in pieces(server, asks[i], "stream"):
                begun.set()
                found.append(piece)
            check_same(client.join(found), right[i])
            if last:
                return

    with ThreadPoolExecutor(1) as pool:
        streams = pool.submit(go)
        until(lambda: begun.is_set() or streams.done(), "the first piece")
        try:
            yield
        finally:
            enough.set()
    streams.result()


class Numbers:
    """The metrics of a server at one moment."""

    def __init__(self, server: Server) -> None:
        with urllib.request.urlopen(server.metrics, timeout=PATIENCE) as response:
            text = response.read().decode()
        self._values = {
            (name, frozenset(re.findall(r'(\w+)="([^"]*)"', labels))): float(value)
            for name, labels, value in re.findall(r"^(trtpass_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE)
        }

    def of(self, name: str, model: str, **labels: str) -> float:
        """One number; KeyError where the server does not have it."""
        return self._values[name, frozenset({"model": model, **labels}.items())]

    def ended(self, model: str) -> dict[str, int]:
        """Requests by how they ended."""
        return {finish: int(self.of("trtpass_requests_total", model, finish=finish)) for finish in ENDS}

    def refused(self, model: str) -> dict[str, int]:
        """Requests that were not taken, by why."""
        reasons = ("queue", "limit", "input", "closing")
        return {reason: int(self.of("trtpass_refused_total", model, reason=reason)) for reason in reasons}

    def idle(self, models: Sequence[str]) -> bool:
        """Whether nothing runs, waits, or holds memory."""
        return not any(self.of(name, model) for model in models for name in GAUGES)


def stub(server: Server, model: str) -> psutil.Process:
    """The process of a model."""
    folder = server.repository / model
    [found] = [
        process
        for process in model_processes(server)
        if any(Path(word).is_relative_to(folder) for word in process.cmdline())
    ]
    return found

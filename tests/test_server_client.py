"""Asking a server: pieces and whole answers over HTTP and gRPC, what goes wrong, and who hangs up."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.served import GATED, PATIENCE, gated, killed, needed, until
from trtpass.errors import InputError
from trtpass.server import client
from trtpass.server.client import Broken, ServerError, generate, infer, join, stream, stream_grpc
from trtpass.server.process import Server
from trtpass.serving.request import Refused

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    needed()
    with killed(Server(gated(tmp_path_factory.mktemp("gated")))) as running:
        yield running


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A prompt: the model goes on after its first piece when there is such a file."""
    return tmp_path / "gate"


def ask(server: Server, how: str, prompt: str, **options: Any) -> Iterator[client.Answer]:
    options = {"timeout": PATIENCE, **options}
    if how == "grpc":
        return stream_grpc(server.grpc, GATED, prompt, **options)
    return stream(server.http, GATED, prompt, **options)


@pytest.mark.parametrize("how", ["http", "grpc"])
def test_pieces_come_as_they_are_made(server: Server, gate: Path, how: str) -> None:
    pieces = ask(server, how, str(gate), max_tokens=3)
    first = next(pieces)
    assert (first.text, first.tokens, first.finish, first.completion_tokens) == ("0 ", (0,), "", 1)
    gate.touch()
    rest = list(pieces)
    assert [piece.tokens for piece in rest] == [(1,), (2,)] and rest[-1].finish == "length"
    whole = join([first, *rest])
    assert whole == client.Answer("0 1 2 ", (0, 1, 2), "length", 1, 3, 0.5)


def test_a_whole_answer(server: Server, gate: Path) -> None:
    gate.touch()
    answer = generate(server.http, GATED, str(gate), max_tokens=3, timeout=PATIENCE)
    assert answer == client.Answer("0 1 2 ", (0, 1, 2), "length", 1, 3, 0.5)
    assert join(stream_grpc(server.grpc, GATED, str(gate), max_tokens=3, stream=False)).tokens == (0, 1, 2)


@pytest.mark.parametrize("how", ["http", "grpc"])
def test_closing_a_stream_hangs_up(server: Server, gate: Path, how: str) -> None:
    with closing(ask(server, how, str(gate), max_tokens=3)) as pieces:  # type: ignore[type-var]
        next(pieces)
    until(gate.with_name("gate.gone").exists, "the model to see that the client has gone")


@pytest.mark.parametrize(
    "call",
    [
        lambda s, n: generate(s.http, GATED, "x", max_tokens=n),
        lambda s, n: list(stream(s.http, GATED, "x", max_tokens=n)),
        lambda s, n: list(stream_grpc(s.grpc, GATED, "x", max_tokens=n)),
    ],
    ids=["generate", "stream", "grpc"],
)
def test_the_servers_words(server: Server, call: Callable[[Server, int], object]) -> None:
    with pytest.raises(ServerError) as wrong:
        call(server, 0)
    assert (wrong.value.found, wrong.value.expected, wrong.value.fix) == ("max_tokens=0", "1 or more", "ask for more")


def test_a_model_that_is_not_available_now(server: Server) -> None:
    with pytest.raises(Refused, match="max_tokens=-1"):
        list(stream_grpc(server.grpc, GATED, "x", max_tokens=-1))
    with pytest.raises(ServerError, match="max_tokens=-1"):  # HTTP: this server says 400 to whatever a model refuses
        generate(server.http, GATED, "x", max_tokens=-1)


def test_models_that_are_not_there(server: Server) -> None:
    for call in (
        lambda: generate(server.http, "other/..", "x"),
        lambda: list(stream_grpc(server.grpc, "other", "x")),
        lambda: infer(server.grpc, "other", {"x": np.zeros(1, np.float32)}),
    ):
        with pytest.raises(ServerError, match=r"(?i)unknown model|not found"):
            call()


@pytest.mark.parametrize("how", ["http", "grpc"])
def test_a_server_that_falls_silent(server: Server, gate: Path, how: str) -> None:
    pieces = ask(server, how, str(gate), max_tokens=2, timeout=0.2)
    next(pieces)
    with pytest.raises(Broken, match=r"no word came for 0.2 s"):
        next(pieces)
    until(gate.with_name("gate.gone").exists, "the model to see that the client has gone")


def test_no_server_and_no_address() -> None:
    for call in (
        lambda: generate("http://127.0.0.1:9", "m", "x"),
        lambda: list(stream_grpc("127.0.0.1:9", "m", "x", timeout=PATIENCE)),
        lambda: infer("127.0.0.1:9", "m", {"x": np.zeros(1, np.float32)}),
    ):
        with pytest.raises(Broken, match=r"127.0.0.1:9 does not answer"):
            call()
    with pytest.raises(InputError, match=r"(?s)address '127.0.0.1:8000'.*http://host:port"):
        generate("127.0.0.1:8000", "m", "x")


def test_options_are_those_of_a_text_model() -> None:
    with pytest.raises(InputError, match=r"(?s)option 'tokens'.*max_tokens, stop, temperature"):
        generate("http://127.0.0.1:9", "m", "x", tokens=3)


def test_fields_of_a_request() -> None:
    fields = client._fields([1, 2], {"stop": ("a",), "seed": None, "temperature": 0.5})
    assert fields == {"input_ids": [1, 2], "stop": ["a"], "temperature": 0.5}
    arrays = {name: client._array(name, value) for name, value in fields.items()}
    assert arrays["input_ids"].dtype == np.int64 and arrays["stop"].tolist() == [b"a"]
    assert arrays["temperature"].dtype == np.float32 and arrays["temperature"].shape == (1,)


class Wrong(BaseHTTPRequestHandler):
    """Answers with the bytes of the prompt."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = asked["text_input"].encode()
        self.send_response(int(asked.get("max_tokens", 200)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def other() -> Iterator[str]:
    """The address of something that is not Triton."""
    with HTTPServer(("127.0.0.1", 0), Wrong) as wrong:
        thread = threading.Thread(target=wrong.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{wrong.server_port}"
        finally:
            wrong.shutdown()
            thread.join()


PIECE = {
    "text_output": "a",
    "token_ids": [1],
    "finish_reason": "",
    "prompt_tokens": 1,
    "completion_tokens": 1,
    "kept": 1,
}


@pytest.mark.parametrize(
    ("body", "status", "error", "words"),
    [
        ("no JSON", 200, Broken, "no JSON"),
        ("[1]", 200, Broken, "a JSON object"),
        ('{"text_output": "a"}', 200, Broken, "a response with text_output"),
        ("Bad Gateway", 502, ServerError, "Bad Gateway"),
        ("", 500, ServerError, "status 500"),
        ("busy", 503, Refused, "busy"),
    ],
)
def test_what_is_no_answer(body: str, status: int, error: type[Exception], words: str) -> None:
    with other() as url, pytest.raises(error, match=words):
        generate(url, "m", body, max_tokens=status)


def test_a_stream_without_its_end() -> None:
    with other() as url:
        pieces = stream(url, "m", f"data: {json.dumps(PIECE)}\n\n", max_tokens=200)
        assert next(pieces).tokens == (1,)
        with pytest.raises(Broken, match="before its last piece"):
            next(pieces)
    with pytest.raises(Broken, match="before its last piece"):
        join([])

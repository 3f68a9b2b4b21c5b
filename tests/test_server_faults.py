"""What clients do wrong is an error for that request alone; processes that die, servers that stop, and full queues."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import struct
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_engines import CONTEXT, tiny_engine

from tests.serve_clients import (
    WAYS,
    Alone,
    Ask,
    Numbers,
    answer,
    check_begins,
    check_same,
    connected,
    pieces,
    request_bytes,
    stub,
)
from tests.served import PATIENCE, Served, gated, killed, model_processes, needed, until
from trtpass.deploy.repository import Request as Deployment
from trtpass.deploy.repository import deploy
from trtpass.errors import InputError
from trtpass.server import client, process
from trtpass.server.control import READY
from trtpass.server.process import Server
from trtpass.server.watch import Watch
from trtpass.serving.request import Refused
from trtpass.serving.text_request import INPUTS

pytestmark = pytest.mark.server

MODEL = "dense"
PROMPT = "a stream that runs beside all that goes wrong"
Tensor = tuple[str, str, Sequence[int], bytes]  # name, type, shape, data


@pytest.fixture(scope="module")
def alone(served: Served) -> Alone:
    return Alone(served.engines)


@contextmanager
def undisturbed(server: Server, alone: Alone, model: str = MODEL) -> Iterator[None]:
    """Streams that run one after the other, before, during and after the block, each with the right answer."""
    asks = [Ask(model, PROMPT, 45), Ask(model, PROMPT, 45, (), 1.1, 0.9, 5)]
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


@contextmanager
def nothing_happens(server: Server, model: str = MODEL) -> Iterator[None]:
    """The same process serves the model at the end, and nothing of what ran is left in it."""
    before = stub(server, model)
    yield
    until(lambda: Numbers(server).idle([model]), "a model at rest")
    assert stub(server, model) == before


def post(server: Server, body: bytes | Mapping[str, Any], path: str = "generate") -> tuple[int, str]:
    """Status and the words of the error, of a request of HTTP."""
    connection = HTTPConnection("127.0.0.1", server.ports["http"], timeout=PATIENCE)
    try:
        data = body if isinstance(body, bytes) else json.dumps(body)
        connection.request("POST", f"/v2/models/{MODEL}/{path}", data, {"Connection": "close"})
        response = connection.getresponse()
        text = response.read().decode().removeprefix("data: ")
        return response.status, str(json.loads(text).get("error", "an answer"))
    finally:
        connection.close()


def texts(*words: bytes) -> bytes:
    """The data of a tensor of strings."""
    return b"".join(struct.pack("<I", len(word)) + word for word in words)


TEXT: Tensor = ("text_input", "BYTES", [1], texts(b"hi"))
FEW: Tensor = ("max_tokens", "INT32", [1], struct.pack("<i", 3))


def number(name: str, kind: str, value: float) -> Tensor:
    form = {"INT32": "<i", "INT64": "<q", "FP32": "<f", "BOOL": "<?"}[kind]
    return name, kind, [1], struct.pack(form, value)


def send(server: Server, tensors: Sequence[Tensor]) -> str:
    """The error of a request of gRPC with these tensors, as raw bytes, or ``an answer``."""
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    request = service_pb2.ModelInferRequest(model_name=MODEL)
    for name, kind, shape, data in tensors:
        tensor = request.inputs.add()
        tensor.name, tensor.datatype = name, kind
        tensor.shape.extend(shape)
        request.raw_input_contents.append(data)
    with grpc.insecure_channel(server.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            found = [response.error_message for response in stub.ModelStreamInfer(iter([request]), timeout=PATIENCE)]
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    assert found, "the server said nothing"
    return next(filter(None, found), "an answer")


OURS: list[tuple[dict[str, Any], str]] = [  # refused by the model: fields, and words of the error
    ({}, "without a prompt. Expected: exactly one of text_input and input_ids"),
    ({"text_input": "a", "input_ids": [1]}, "both text_input and input_ids. Expected: exactly one"),
    ({"text_input": ""}, "a prompt without tokens. Expected: at least one token"),
    ({"input_ids": []}, "a prompt without tokens. Expected: at least one token"),
    ({"input_ids": [3, 256]}, "token id 256. Expected: 0 to 255"),
    ({"input_ids": [-1]}, "token id -1. Expected: 0 to 255"),
    ({"input_ids": [2**62]}, f"token id {2**62}. Expected: 0 to 255"),
    ({"input_ids": [1] * (CONTEXT + 1)}, "a prompt of 97 tokens. Expected: at most 96. To do: shorten the prompt"),
    ({"input_ids": [1] * 300_000}, "a prompt of 300000 tokens. Expected: at most 96"),
    ({"text_input": "a" * (CONTEXT + 1)}, "a prompt of 97 tokens. Expected: at most 96"),
    ({"text_input": "a" * 1_000_000}, "a text of 1000000 bytes. Expected: at most 6144. To do: shorten it"),
    ({"text_input": "hi", "max_tokens": 0}, "max_tokens=0. Expected: 1 or more"),
    ({"text_input": "hi", "max_tokens": -1}, "max_tokens=-1. Expected: 1 or more"),
    ({"text_input": "hi", "max_tokens": -(2**31)}, "max_tokens=-2147483648. Expected: 1 or more"),
    (
        {"text_input": "hi", "max_tokens": 2**31 - 1},
        "max_tokens=2147483647. Expected: at most 96. To do: ask for fewer",
    ),
    ({"text_input": "hi", "temperature": -0.5}, "temperature=-0.5. Expected: 0 (greedy) or more, and finite"),
    ({"text_input": "hi", "temperature": float("nan")}, "temperature=nan. Expected: 0 (greedy) or more"),
    ({"text_input": "hi", "temperature": float("inf")}, "temperature=inf. Expected: 0 (greedy) or more"),
    ({"text_input": "hi", "temperature": 1e39}, "temperature=inf. Expected: 0 (greedy) or more"),
    ({"text_input": "hi", "top_p": 0.0}, "top_p=0.0. Expected: above 0 and at most 1"),
    ({"text_input": "hi", "top_p": 1.5}, "top_p=1.5. Expected: above 0 and at most 1"),
    ({"text_input": "hi", "top_p": float("nan")}, "top_p=nan. Expected: above 0 and at most 1"),
    ({"text_input": "hi", "seed": -1}, "seed=-1. Expected: 0 or more"),
    ({"text_input": "hi", "stop": [""]}, "a stop text of 0 characters. Expected: 1 to 1024"),
    ({"text_input": "hi", "stop": ["a"] * 17}, "17 stop texts. Expected: at most 16"),
    ({"text_input": "hi", "stop": ["a"] * 100_000}, "100000 stop texts. Expected: at most 16"),
    ({"text_input": "hi", "stop": ["a" * 1025]}, "a stop text of 1025 characters. Expected: 1 to 1024"),
]
THEIRS: list[tuple[dict[str, Any], str]] = [  # refused by the server itself, which reads the JSON
    ({"text_input": "hi", "max_tokens": 1.5}, "non-signed-integer"),
    ({"text_input": "hi", "max_tokens": "3"}, "non-signed-integer"),
    ({"text_input": "hi", "max_tokens": None}, "non-signed-integer"),
    ({"text_input": "hi", "max_tokens": [3, 4]}, "'max_tokens' to tensor with proper shape"),
    ({"text_input": "hi", "max_tokens": []}, "'max_tokens' to tensor with proper shape"),
    ({"text_input": "hi", "temperature": "warm"}, "non-number"),
    ({"text_input": "hi", "stream": 1}, "non-boolean"),
    ({"text_input": "hi", "seed": 2**64}, "non-signed-integer"),
    ({"text_input": "hi", "stop": [1]}, "non-string"),
    ({"text_input": ["a", "b"]}, "'text_input' to tensor with proper shape"),
    ({"text_input": 5}, "non-string"),
    ({"text_input": {"a": 1}}, "non-string"),
    ({"text_input": "\ud800"}, "surrogate pair"),
    ({"input_ids": "abc"}, "non-signed-integer"),
    ({"input_ids": [[1, 2]]}, "true shape"),
]
GARBAGE: list[tuple[bytes, str]] = [
    (b"", "document is empty"),
    (b"{", "Missing a name"),
    (b"[]", "non-object"),
    (b"null", "non-object"),
    (b"\xff\xfe\x00", "Invalid value"),
    (b'{"text_input":' + b"[" * 1000, "Invalid value"),
    (b'{"text_input":"a","text_input":"b"}', "already exists"),
    (b'{"text_input":"\xff\xfe"}', "text_input is not UTF-8 (byte 0). Expected: a text in UTF-8"),
    (b'{"text_input":"hi\xc3"}', "text_input is not UTF-8 (byte 2). Expected: a text in UTF-8"),
    (b'{"text_input":"hi","stop":["ok","\xed\xa0\x80"]}', "stop is not UTF-8 (byte 0). Expected: a text in UTF-8"),
]
RAW: list[tuple[str, list[Tensor], str]] = [
    ("bytes that are no text", [("text_input", "BYTES", [1], texts(b"ab\xff")), FEW], "not UTF-8 (byte 2)"),
    ("a stop that is no text", [TEXT, FEW, ("stop", "BYTES", [2], texts(b"a", b"\xc3"))], "stop is not UTF-8"),
    ("a length beyond the data", [("text_input", "BYTES", [1], b"\xff\xff\xff\x7fab"), FEW], "incomplete string"),
    ("half a length", [("text_input", "BYTES", [1], b"\x01"), FEW], "incomplete string length"),
    ("no data", [("text_input", "BYTES", [1], b""), FEW], "expected 1 string elements"),
    ("one text too many", [("text_input", "BYTES", [1], texts(b"a", b"b")), FEW], "unexpected number of string"),
    ("two texts", [("text_input", "BYTES", [2], texts(b"a", b"b")), FEW], "unexpected shape for input 'text_input'"),
    ("a text in two dimensions", [("text_input", "BYTES", [1, 1], texts(b"a")), FEW], "unexpected shape"),
    ("no text", [("text_input", "BYTES", [0], b""), FEW], "unexpected shape"),
    ("a scalar", [("text_input", "BYTES", [], texts(b"a")), FEW], "unexpected shape"),
    ("a text of numbers", [("text_input", "INT32", [1], b"abcd"), FEW], "data-type is 'INT32'"),
    ("a type that does not exist", [("text_input", "WORDS", [1], texts(b"a")), FEW], "data-type is '<invalid>'"),
    ("an open size", [("text_input", "BYTES", [-1], texts(b"a")), FEW], "All input dimensions should be specified"),
    ("ids of 32 bits", [("input_ids", "INT32", [1], b"\x00" * 4), FEW], "data-type is 'INT32'"),
    ("ids in two dimensions", [("input_ids", "INT64", [1, 2], b"\x00" * 16), FEW], "unexpected shape"),
    ("too few bytes", [("input_ids", "INT64", [3], b"\x00" * 16), FEW], "Expected 24, got 16"),
    ("no ids", [("input_ids", "INT64", [0], b""), FEW], "a prompt without tokens. Expected: at least one"),
    ("an id out of range", [number("input_ids", "INT64", -5), FEW], "token id -5. Expected: 0 to 255"),
    ("both prompts", [TEXT, number("input_ids", "INT64", 1), FEW], "both text_input and input_ids"),
    ("no prompt", [FEW], "without a prompt"),
    ("an unknown input", [TEXT, FEW, number("bogus", "INT64", 1)], "unexpected inference input 'bogus'"),
    ("one input twice", [TEXT, TEXT, FEW], "already exists"),
    ("no number", [TEXT, ("max_tokens", "INT32", [0], b"")], "unexpected shape for input 'max_tokens'"),
    ("two numbers", [TEXT, ("max_tokens", "INT32", [2], b"\x01" * 8)], "unexpected shape for input 'max_tokens'"),
    ("a number of 64 bits", [TEXT, number("max_tokens", "INT64", 1)], "data-type is 'INT64'"),
    ("a negative number", [TEXT, number("max_tokens", "INT32", -1)], "max_tokens=-1. Expected: 1 or more"),
    ("NaN", [TEXT, FEW, number("temperature", "FP32", float("nan"))], "temperature=nan. Expected: 0 (greedy)"),
    ("infinity", [TEXT, FEW, number("top_p", "FP32", float("inf"))], "top_p=inf. Expected: above 0 and at most 1"),
    ("a negative seed", [TEXT, FEW, number("seed", "INT64", -(2**63))], f"seed={-(2**63)}. Expected: 0 or more"),
]


def test_wrong_values_over_http(served: Served, alone: Alone) -> None:
    server = served.process
    with nothing_happens(server), undisturbed(server, alone):
        before = Numbers(server).refused(MODEL)
        for fields, words in OURS:
            for path in ("generate", "generate_stream"):
                status, error = post(server, {"max_tokens": 3, **fields}, path)
                assert status == 400 and words in error, (str(fields)[:80], status, error)
        refused = Counter(Numbers(server).refused(MODEL)) - Counter(before)
    wrong_ids = sum("token id" in words for _, words in OURS)  # these are the engine's to find
    over = sum("at most 96" in words or "bytes" in words for _, words in OURS)
    assert refused == {"limit": 2 * over, "input": 2 * (len(OURS) - over - wrong_ids)}


def test_requests_over_http_that_are_none(served: Served, alone: Alone) -> None:
    server = served.process
    with nothing_happens(server), undisturbed(server, alone):
        for fields, words in THEIRS:
            status, error = post(server, fields)
            assert status in (400, 500) and words in error, (fields, status, error)
        for body, words in GARBAGE:
            for path in ("generate", "generate_stream"):
                status, error = post(server, body, path)
                assert status in (400, 500) and words in error, (body[:80], status, error)


def test_wrong_tensors_over_grpc(served: Served, alone: Alone) -> None:
    server = served.process
    with nothing_happens(server), undisturbed(server, alone):
        assert send(server, [TEXT, FEW]) == "an answer"
        for what, tensors, words in RAW:
            error = send(server, tensors)
            assert words in error, (what, error)


SIZES = st.lists(st.integers(-1, 3), max_size=3)
NAMES = st.sampled_from([*INPUTS, "x"])
KINDS = st.sampled_from(["BYTES", "INT64", "INT32", "FP32", "BOOL", "FP16", ""])


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(NAMES, KINDS, SIZES, st.binary(max_size=24)), max_size=4))
def test_any_tensors(served: Served, tensors: list[Tensor]) -> None:
    """An answer or an error, and the model goes on."""
    server = served.process
    with nothing_happens(server):
        assert send(server, [*tensors, FEW])
        assert send(server, [TEXT, FEW]) == "an answer"


def test_clients_that_stop_in_the_middle(served: Served, alone: Alone) -> None:
    """Half a head, half a body, a stream that nobody reads: the others go on, and rows end."""
    server, ask = served.process, Ask(MODEL, PROMPT, 50)
    whole = request_bytes(ask, stream=True, return_logits=True)
    with nothing_happens(server), ExitStack() as wires, undisturbed(server, alone):
        before = Numbers(server).ended(MODEL)["length"]
        for sent in [whole[:40], whole[:-5]] * 20 + [whole] * 8:
            wires.enter_context(connected(server, 1024)).sendall(sent)
        until(lambda: Numbers(server).ended(MODEL)["length"] >= before + 8, "rows whose answers nobody reads")
        for way in WAYS:
            check_same(answer(server, ask, way), alone.answer(ask))


class Holding:
    """A repository of ``narrow`` (one row) and ``wide`` (four), each with a queue of two, that a test can hold up, and
    of ``sparse``, which it cannot."""

    def __init__(self, folder: Path, dense: Path, sparse: Path) -> None:
        self.folder = folder
        for name, rows in (("narrow", 1), ("wide", 4)):
            deploy(Deployment(dense, folder, name, rows=rows, queue=2, threads=1))
            shutil.copy(Path(__file__).with_name("held_model.py"), folder / name / "1/model.py")
        deploy(Deployment(sparse, folder, "sparse", threads=1))
        self.alone = Alone({"narrow": dense, "wide": dense, "sparse": sparse})

    @contextmanager
    def held(self, model: str) -> Iterator[Path]:
        """While the file is there, a full batch of the model does not step."""
        file = self.folder / model / "1/hold"
        file.touch()
        try:
            yield file
        finally:
            file.unlink(missing_ok=True)

    @staticmethod
    def asks(model: str, count: int) -> list[Ask]:
        return [Ask(model, PROMPT[i:], 40 + i, (), (i % 2) * 0.9, 1.0, i) for i in range(count)]


@pytest.fixture(scope="module")
def holding(tmp_path_factory: pytest.TempPathFactory) -> Holding:
    needed()
    engines = [tiny_engine(tmp_path_factory, name) for name in ("dense", "sparse")]
    return Holding(tmp_path_factory.mktemp("holding"), *engines)


def one_too_many(server: Server, model: str, asks: Sequence[Ask], pool: ThreadPoolExecutor) -> dict[Ask, Future[Any]]:
    """Sends all at once; the model has room for all but one. Returns those that it took, when that one was refused."""
    sent = {ask: pool.submit(answer, server, ask, way) for ask, way in zip(asks, itertools.cycle(WAYS))}
    until(lambda: any(future.done() for future in sent.values()), "a refusal")
    [refused] = [ask for ask, future in sent.items() if future.done()]
    error = sent.pop(refused).exception()
    count = len(sent)
    assert isinstance(error, Refused), error
    assert f"unavailable: {count} requests run or wait. Expected: fewer than {count}" in " ".join(str(error).split())
    return sent


@pytest.fixture(scope="module")
def server(holding: Holding) -> Iterator[Server]:
    with killed(Server(holding.folder)) as running:
        yield running


def test_the_first_request_beyond_the_queue_is_refused_at_once(server: Server, holding: Holding) -> None:
    other = Ask("sparse", PROMPT, 9)
    with ThreadPoolExecutor(4) as pool:
        with holding.held("narrow"):
            taken = one_too_many(server, "narrow", holding.asks("narrow", 4), pool)
            for way in WAYS:
                with pytest.raises(Refused, match="3 requests run or wait"):
                    answer(server, Ask("narrow", PROMPT, 9), way)
            check_same(answer(server, other, "generate"), holding.alone.answer(other))
        for ask, future in taken.items():
            check_same(future.result(), holding.alone.answer(ask))
    assert Numbers(server).refused("narrow") == {"queue": 4, "limit": 0, "input": 0, "closing": 0}


def test_a_model_process_that_is_killed_under_load(server: Server, holding: Holding) -> None:
    """It is brought back while another model goes on. Clients of the dead process notice by their own timeout: the
    server leaves their requests open."""
    said: list[str] = []
    asks = holding.asks("wide", 4)
    with Watch(server, said.append, interval=0.05), ThreadPoolExecutor(4) as pool:
        with holding.held("wide"), undisturbed(server, holding.alone, "sparse"):
            streams = [pieces(server, ask, "grpc" if i % 2 else "stream", timeout=3) for i, ask in enumerate(asks)]
            for ask, coming in zip(asks, streams, strict=True):
                check_begins([next(coming)], holding.alone.answer(ask))
            dead, other = stub(server, "wide"), stub(server, "sparse")
            rests = [pool.submit(list, coming) for coming in streams]
            dead.kill()
            until(lambda: len(said) == 2, "a model that is brought back")
            for rest in rests:
                assert isinstance(rest.exception(), client.Broken)
        assert said == ["watch: the process of 'wide' died; loading it again", "watch: 'wide' is ready again"]
        assert stub(server, "wide") != dead and stub(server, "sparse") == other
        for ask in asks:
            check_same(answer(server, ask, "stream"), holding.alone.answer(ask))
        until(lambda: Numbers(server).idle(["wide", "sparse"]), "models at rest")


def segments(server: Server) -> list[Path]:
    return list(Path("/dev/shm").glob(f"{server._memory}*"))


def test_a_server_that_stops_ends_what_it_has_taken(holding: Holding) -> None:
    """Four streams run and two wait: all of them are answered, and nothing new is taken, over HTTP or gRPC."""
    with killed(Server(holding.folder)) as server, ThreadPoolExecutor(8) as pool:
        family = [psutil.Process(server.pid), *model_processes(server)]
        triton = server.process
        assert len(family) == 4 and segments(server) and triton is not None
        with holding.held("wide"):
            taken = one_too_many(server, "wide", holding.asks("wide", 7), pool)
            begun = "trtpass_time_to_first_token_seconds_count"  # of rows: the gauges follow when the step is over
            until(lambda: Numbers(server).of(begun, "wide") == 4, "four rows")
            stopped = pool.submit(server.stop)
            until(lambda: READY not in server.control.states().values(), "the end of new requests")
            for way, model in itertools.product(WAYS, ("sparse", "wide")):
                with pytest.raises(InputError, match="has no available versions"):
                    answer(server, Ask(model, PROMPT, 3), way)
            assert not any(future.done() for future in [*taken.values(), stopped])
        for ask, future in taken.items():
            check_same(future.result(), holding.alone.answer(ask))
        stopped.result()
        assert triton.returncode == 0 and not segments(server)
        assert not any(member.is_running() for member in family)


def test_what_triton_leaves_of_itself(tmp_path: Path) -> None:
    """Nothing after SIGTERM. (After SIGKILL its shared memory stays, which ``stop`` removes.)"""
    needed()
    with killed(Server(gated(tmp_path))) as server:
        assert segments(server)
        os.kill(server.pid, signal.SIGTERM)
        assert server.wait() == 0 and not segments(server)


def test_a_server_stops_though_clients_stay_connected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle HTTP connection and an idle stream of gRPC, for which Triton alone would wait; the second without end."""
    import tritonclient.grpc as grpc

    needed()
    monkeypatch.setattr(process, "AFTER_DRAIN_SECONDS", 0.5)
    with killed(Server(gated(tmp_path), drain_seconds=3600)) as server, connected(server) as wire:
        wire.sendall(b"GET /v2/health/ready HTTP/1.1\r\nHost: test\r\n\r\n")
        assert b"200" in wire.recv(1000)
        with closing(grpc.InferenceServerClient(server.grpc)) as idle:
            idle.start_stream(lambda result, error: None)
            assert idle.is_server_ready()
            pid = server.pid
            server.stop()
            assert not psutil.pid_exists(pid)


def test_it_listens_everywhere_only_where_that_was_asked_for(tmp_path: Path, served: Served) -> None:
    def heard(server: Server) -> set[str]:
        family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        found = [c.laddr for p in family for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
        assert {address.port for address in found} >= set(server.ports.values())
        return {address.ip.removeprefix("::ffff:") for address in found}

    assert heard(served.process) == {"127.0.0.1"}
    with killed(Server(gated(tmp_path), host="0.0.0.0")) as public:
        assert heard(public) <= {"0.0.0.0", "::"}

"""Full queues, model processes that die, and servers that stop: what was taken is answered wherever it can be."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_engines import tiny_engine

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
    stub,
    undisturbed,
)
from tests.served import gated, killed, model_processes, needed, until
from trtpass.deploy.repository import Request as Deployment
from trtpass.deploy.repository import deploy
from trtpass.errors import InputError
from trtpass.server import client, process
from trtpass.server.control import READY
from trtpass.server.process import Server
from trtpass.server.watch import Watch
from trtpass.serving.request import Refused

pytestmark = pytest.mark.server

PROMPT = "a prompt of those that wait, or run, or die"


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


def test_it_listens_everywhere_only_where_that_was_asked_for(tmp_path: Path, server: Server) -> None:
    def heard(server: Server) -> set[str]:
        family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        found = [c.laddr for p in family for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
        assert {address.port for address in found} >= set(server.ports.values())
        return {address.ip.removeprefix("::ffff:") for address in found}

    assert heard(server) == {"127.0.0.1"}
    with killed(Server(gated(tmp_path), host="0.0.0.0")) as public:
        assert heard(public) <= {"0.0.0.0", "::"}

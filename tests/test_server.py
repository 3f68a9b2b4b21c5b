"""One server process: where it listens, why it does not start, and that nothing of it stays."""

from __future__ import annotations

import http.client
import os
import platform
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from tests.served import GATED, PATIENCE, gated, killed, model_processes, needed
from trtpass.errors import InputError
from trtpass.server import client, ports, process
from trtpass.server.foreground import Request, _present
from trtpass.server.install import ENVIRONMENT, installed
from trtpass.server.process import Server

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needed()
    return gated(tmp_path_factory.mktemp("gated"))


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[Server]:
    with killed(Server(repository)) as running:
        yield running


def segments(server: Server) -> list[Path]:
    """Its shared memory."""
    return list(Path("/dev/shm").glob(f"{server._memory}*"))


@pytest.mark.skipif(
    (platform.system(), platform.machine(), sys.version_info[:2]) != ("Linux", "x86_64", (3, 11)),
    reason="make setup need not find a server for this platform",
)
def test_the_server_is_there() -> None:
    here = installed()
    assert os.access(here.program, os.X_OK) and os.access(here.backends / "python/triton_python_backend_stub", os.X_OK)
    found = subprocess.run(
        [ENVIRONMENT / "bin/python", "-c", "import numpy; print(numpy.__version__)"], capture_output=True, text=True
    )
    assert found.stdout == "1.26.4\n"


def test_it_listens_on_loopback_alone(server: Server) -> None:
    family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    heard = {c.laddr for p in family for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
    assert {address.ip.removeprefix("::ffff:") for address in heard} == {"127.0.0.1"}  # IPv4 on a socket for both
    assert {address.port for address in heard} == set(server.ports.values()) and len(heard) == 3


def test_models_are_ready_when_it_has_started(server: Server) -> None:
    assert server.control.states() == {GATED: "READY"}
    assert server.control.config(GATED)["backend"] == "python"
    with pytest.raises(InputError, match=r"answers 404 .*unknown model"):
        server.control.config("nothing")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"host": "localhost"}, "host 'localhost'.*IPv4"),
        ({"host": "192.0.2.1"}, "192.0.2.1:0 cannot be listened on"),
        ({"http_port": 70000}, "port 70000 for http"),
    ],
)
def test_addresses_that_cannot_be(repository: Path, options: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=f"(?s){words}"), Server(repository, **options):  # type: ignore[arg-type]
        pass


def test_repositories_without_models(tmp_path: Path) -> None:
    needed()
    with pytest.raises(InputError, match="there is no folder"), Server(tmp_path / "nothing"):
        pass
    with pytest.raises(InputError, match=r"(?s)has no models.*trtpass deploy"), Server(tmp_path):
        pass


def test_a_port_that_was_asked_for_is_taken(repository: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"(?s)port {port} is in use.*--grpc-port"):
            Server(repository, grpc_port=port).start()


@pytest.mark.parametrize("kind", ["http", "metrics"])
def test_a_port_that_is_taken_in_the_meantime(repository: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Another port where any would do; the error where it was asked for."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        found: list[dict[str, int]] = []

        def late(host: str, asked: dict[str, int]) -> dict[str, int]:
            found.append(ports.choose(host, {**asked, kind: 0}))
            if len(found) == 1 or asked[kind]:
                found[-1][kind] = taken.getsockname()[1]
            return found[-1]

        monkeypatch.setattr(process, "choose", late)
        if kind == "http":
            with killed(Server(repository)) as running:
                assert len(found) == 2 and running.ports == found[1] and running.control.ready()
        else:
            port = taken.getsockname()[1]
            broken = Server(repository, metrics_port=port)
            with pytest.raises(InputError, match=f"port {port} is in use"):
                broken.start()
            assert broken.process is None and not segments(broken) and not broken.log.exists()


def test_a_model_that_does_not_load(tmp_path: Path) -> None:
    needed()
    (gated(tmp_path) / GATED / "1/model.py").write_text("raise ValueError('no engine here')\n")
    broken = Server(tmp_path)
    with pytest.raises(InputError, match="failed to load 'gated' version 1: Internal: ValueError: no engine here"):
        broken.start()
    assert broken.process is None and not segments(broken)


def test_operators_need_a_key_where_others_can_reach_it(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guarded = Server(repository)
    monkeypatch.setattr(guarded, "_public", True)
    with killed(guarded):
        assert guarded.control.states() == {GATED: "READY"}
        for path in ("/v2/repository/index", f"/v2/repository/models/{GATED}/load"):
            with closing(
                http.client.HTTPConnection("127.0.0.1", guarded.ports["http"], timeout=PATIENCE)
            ) as connection:
                connection.request("POST", path)
                assert connection.getresponse().status == 403
        import tritonclient.grpc as grpc

        with pytest.raises(grpc.InferenceServerException, match=r"(?i)restricted"):
            grpc.InferenceServerClient(guarded.grpc).unload_model(GATED)
        assert client.generate(guarded.http, GATED, "x", max_tokens=1).tokens == (0,)
        said: list[str] = []
        _present(guarded, Request(repository), said.append)
        assert f"need the header trtpass-key: {guarded.control.headers['trtpass-key']}" in "\n".join(said)


def test_nothing_stays_of_a_server_that_was_killed(repository: Path) -> None:
    crashed = Server(repository)
    crashed.start()
    models = model_processes(crashed)
    assert models and segments(crashed)
    os.kill(crashed.pid, signal.SIGKILL)
    assert crashed.wait() == -signal.SIGKILL
    crashed.stop()
    assert not segments(crashed) and not crashed.log.exists()
    gone, alive = psutil.wait_procs(models, PATIENCE)  # they notice that their parent is gone
    assert gone and not alive


def test_a_server_drains_when_the_process_that_started_it_dies(repository: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from trtpass.server.process import Server\n"
        "server = Server(sys.argv[1], log=Path(sys.argv[2])); server.start(); print(server.pid, flush=True)\n"
        "sys.stdin.read()"
    )
    log = tmp_path / "log"
    words = [sys.executable, "-c", code, str(repository), str(log)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        orphan = psutil.Process(int(parent.stdout.readline()))
        models = orphan.children()
        parent.kill()
    gone, alive = psutil.wait_procs([orphan, *models], PATIENCE)
    assert len(gone) == 2 and not alive
    assert "Signal (15) received" in log.read_text() and "successfully unloaded" in log.read_text()

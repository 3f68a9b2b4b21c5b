"""A model whose process dies is brought back, not for ever, and not against an operator's will."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.served import GATED, PATIENCE, gated, killed, model_processes, needed, until
from trtpass.errors import InputError
from trtpass.server.client import generate
from trtpass.server.process import Server
from trtpass.server.watch import Watch

pytestmark = pytest.mark.server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    needed()
    with killed(Server(gated(tmp_path / "repository"))) as running:
        yield running


def kill_model(server: Server) -> int:
    [model] = model_processes(server)
    os.kill(model.pid, signal.SIGKILL)
    until(lambda: model.status() == psutil.STATUS_ZOMBIE, "the end of the process")
    return model.pid


def test_a_killed_model_is_brought_back(server: Server) -> None:
    said: list[str] = []
    with Watch(server, said.append, interval=0.05):
        dead = kill_model(server)
        until(lambda: len(said) == 2, "two lines")
    assert said == [f"watch: the process of '{GATED}' died; loading it again", f"watch: '{GATED}' is ready again"]
    assert [model.pid for model in model_processes(server)] != [dead]
    assert generate(server.http, GATED, "x", max_tokens=1, timeout=PATIENCE).tokens == (0,)


def test_without_a_watch_it_stays_dead(server: Server) -> None:
    """What the watch is for: the server does not notice."""
    kill_model(server)
    assert server.control.states() == {GATED: "READY"} and server.control.ready()
    with pytest.raises(InputError, match="not healthy"):
        generate(server.http, GATED, "x", max_tokens=1, timeout=PATIENCE)


def test_it_gives_up_on_one_that_dies_again_and_again(server: Server) -> None:
    said: list[str] = []
    watch = Watch(server, said.append, tries=1)  # looks only when it is told to
    kill_model(server)
    watch.look()
    assert len(said) == 2 and server.control.states() == {GATED: "READY"}
    kill_model(server)
    watch.look()
    assert len(said) == 3 and f"the process of '{GATED}' died 2 times in 60 s; it stays unloaded" in said[2]
    until(lambda: server.control.states() == {GATED: "UNAVAILABLE"}, "the model to be unloaded")
    watch.look()
    assert server.control.states() == {GATED: "UNAVAILABLE"}
    server.control.load(GATED)  # the operator's: it is looked after again
    kill_model(server)
    watch.look()
    assert said[3:] == said[:2]


def test_what_an_operator_unloads_stays_unloaded(server: Server) -> None:
    said: list[str] = []
    watch = Watch(server, said.append)
    watch.look()
    server.control.unload(GATED)
    for _ in range(3):  # on its way out, and gone
        watch.look()
    until(lambda: server.control.states() == {GATED: "UNAVAILABLE"} and not model_processes(server), "the unloading")
    watch.look()
    server.control.load(GATED)
    watch.look()
    assert said == [] and server.control.states() == {GATED: "READY"}


def test_a_model_that_does_not_load_any_more(server: Server) -> None:
    said: list[str] = []
    watch = Watch(server, said.append, tries=2)
    code = server.repository / GATED / "1/model.py"
    whole = code.read_text()
    kill_model(server)
    code.write_text("raise ValueError('gone')\n")
    watch.look()
    assert "died; loading it again" in said[0] and "does not load: " in said[1] and "ValueError: gone" in said[1]
    until(lambda: watch.look() or len(said) > 2, "another attempt")  # after a pause
    assert said[3] == f"watch: '{GATED}' stays unloaded after 2 attempts"
    code.write_text(whole)
    watch.look()
    assert len(said) == 4 and server.control.states()[GATED] == "UNAVAILABLE"

"""Servers for tests: one of tiny engines for a session, and repositories of a model that does what a test says."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from tiny_engines import tiny_engine

from tests.vit_engines import TOME, vit_engine
from trtpass.deploy.repository import Request as Deployment
from trtpass.deploy.repository import deploy
from trtpass.errors import InputError
from trtpass.server.install import installed
from trtpass.server.process import Server
from trtpass.serving.text_request import INPUTS, OUTPUTS

GATED = "gated"  # the model of gated_model.py
PATIENCE = 30.0  # seconds for what takes much less


@dataclass(frozen=True)
class Served:
    """A running server and the engines that it serves, by the names of their models.

    ``dense``, ``sparse`` and ``kvzap`` are text models of 96 tokens, one token a byte, ``vit`` is an encoder.
    """

    process: Server
    engines: dict[str, Path]

    @property
    def http(self) -> str:
        return self.process.http

    @property
    def grpc(self) -> str:
        return self.process.grpc

    @property
    def metrics(self) -> str:
        return self.process.metrics

    @property
    def models(self) -> tuple[str, ...]:
        """The text models."""
        return tuple(name for name in self.engines if name != "vit")


def needed() -> None:
    """Skip where there is no server; ``test_the_server_is_there`` fails where there should be one."""
    try:
        installed()
    except InputError as error:
        pytest.skip(str(error))


def tiny_engines(factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model -> engine folder. Not to be changed: copy first."""
    text = {name: tiny_engine(factory, name) for name in ("dense", "sparse", "kvzap")}
    return {**text, "vit": vit_engine(factory, TOME)[1]}


@contextmanager
def serve_tiny(factory: pytest.TempPathFactory) -> Iterator[Served]:
    """All tiny engines on one server, one thread each."""
    needed()
    engines, folder = tiny_engines(factory), factory.mktemp("served")
    for name, engine in engines.items():
        deploy(Deployment(engine, folder / "repository", name, threads=1))
    with killed(Server(folder / "repository", log=folder / "server.log")) as server:
        yield Served(server, engines)


def gated(folder: Path) -> Path:
    """A repository of the one model ``gated``."""
    version = folder / GATED / "1"
    version.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("gated_model.py"), version / "model.py")
    lines = [f'name: "{GATED}"', 'backend: "python"', "model_transaction_policy { decoupled: true }"]
    for kind, tensors, more in (("input", INPUTS, " optional: true"), ("output", OUTPUTS, "")):
        lines += [
            f'{kind} {{ name: "{name}" data_type: TYPE_{tensor.type} dims: {list(tensor.dims)}{more} }}'
            for name, tensor in tensors.items()
        ]
    lines.append("instance_group { kind: KIND_CPU count: 1 }")
    (version.parent / "config.pbtxt").write_text("\n".join(lines) + "\n")
    return folder


@contextmanager
def killed(server: Server) -> Iterator[Server]:
    """It runs in the block, and ends without the seconds of a drain."""
    server.start()
    try:
        yield server
    finally:
        server.kill()


def until(true: Callable[[], object], what: str) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, f"still waiting for {what}"
        time.sleep(0.01)


def model_processes(server: Server) -> list[psutil.Process]:
    """Processes of models that run."""
    children = psutil.Process(server.pid).children()
    return [child for child in children if child.status() != psutil.STATUS_ZOMBIE]

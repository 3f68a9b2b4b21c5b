"""One Triton Inference Server as a child process: started, waited for, drained, and gone with its model processes."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from trtpass.errors import InputError
from trtpass.server.control import READY, UNAVAILABLE, Control
from trtpass.server.install import Installation, installed
from trtpass.server.ports import KINDS, LOOPBACK, PortTaken, address, choose, listens

ATTEMPTS = 5  # to find three ports that stay free until the server has them
POLL_SECONDS = 0.05
AFTER_DRAIN_SECONDS = 5  # from the end of the drain to the end of the process: last answers are on their way
# What only an operator may do: loading a model can bring code with it
RESTRICTED = "model-repository,shared-memory,trace,logging"
_ERROR = re.compile(r'^E\d{4} .*?\] "?(.*?)"?\s*$|^error: (.*)$', re.MULTILINE)
_NOISE = ("CudaDriverHelper", "chttp2_server", "No address added")


class Server:
    """A server of one model repository; use it in ``with``, which starts and stops it.

    If this process is killed, the server gets SIGTERM and drains. The thread that starts it has to live as long as it.

    Args:
        repository: the folder of model folders; all of them are loaded.
        host: address to listen on. On any but a loopback address, calls of operators need ``control.headers``.
        http_port, grpc_port, metrics_port: 0 chooses a free one.
        log: file for the server's words; None makes a temporary one, which ``stop`` removes.
        extra: more arguments of tritonserver.
        start_seconds: most time until every model is ready.
        drain_seconds: most time that requests in flight get after SIGTERM.

    Attributes:
        ports: by ``http``, ``grpc``, ``metrics``, once started.
        control: models, readiness, loading and unloading.
    """

    def __init__(
        self,
        repository: str | Path,
        *,
        host: str = LOOPBACK,
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        log: Path | None = None,
        extra: Sequence[str] = (),
        start_seconds: float = 120.0,
        drain_seconds: int = 30,
    ) -> None:
        self.repository, self.host = Path(repository).resolve(), host
        self._public = not address(host).is_loopback
        self._asked = dict(zip(KINDS, (http_port, grpc_port, metrics_port), strict=True))
        self._own_log, self._extra = log is None, tuple(extra)
        self._start_seconds, self._drain_seconds = start_seconds, drain_seconds
        self.log = log or Path(tempfile.gettempdir()) / f"trtpass-server-{secrets.token_hex(6)}.log"
        self.ports: dict[str, int] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self.control = Control("", {})
        self._memory = f"trtpass_{secrets.token_hex(6)}_"  # how its shared memory is named, to be found after a crash

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def http(self) -> str:
        """``http://host:port``, for the generate endpoint and readiness."""
        return f"http://{self._reached}:{self.ports['http']}"

    @property
    def grpc(self) -> str:
        """``host:port``."""
        return f"{self._reached}:{self.ports['grpc']}"

    @property
    def metrics(self) -> str:
        """Where the metrics are, in Prometheus form."""
        return f"http://{self._reached}:{self.ports['metrics']}/metrics"

    @property
    def _reached(self) -> str:
        return LOOPBACK if address(self.host).is_unspecified else self.host

    def start(self) -> None:
        """Start, and wait until every model is ready.

        Raises:
            InputError: no server is installed, no models are there, a port is taken, a model does not load, or it takes
                too long; with the server's own words. Nothing is left running.
        """
        installation = installed()
        _check_repository(self.repository)
        for left in reversed(range(ATTEMPTS)):
            try:
                self._start(installation)
                return
            except PortTaken as taken:
                if not left or self._asked[taken.kind]:
                    raise
            finally:
                if not self.ports:
                    self.kill()

    def _start(self, installation: Installation) -> None:
        ports = choose(self.host, self._asked)
        key = {"trtpass-key": secrets.token_urlsafe(24)} if self._public else {}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-I", "-S", str(Path(__file__).with_name("launch.py")), str(os.getpid()),
                    *self._command(installation, ports, key),
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=installation.variables(),
                process_group=0,  # Ctrl-C is for this process, which then drains the server
            )  # fmt: skip
        self.control = Control(f"http://{self._reached}:{ports['http']}", key)
        self._wait(ports)
        self.ports = ports

    def _command(self, installation: Installation, ports: dict[str, int], key: dict[str, str]) -> list[str]:
        options = ("http-restricted-api", "grpc-restricted-protocol")
        restricted = [f"--{option}={RESTRICTED}:{name}={value}" for name, value in key.items() for option in options]
        return [
            str(installation.program),
            f"--model-repository={self.repository}",
            f"--backend-directory={installation.backends}",
            f"--backend-config=python,shm-region-prefix-name={self._memory}",
            "--model-control-mode=explicit",
            "--load-model=*",
            "--disable-auto-complete-config",  # the configurations are complete; every model would be started twice
            f"--exit-timeout-secs={self._drain_seconds}",
            *(f"--{kind}-address={self.host}" for kind in KINDS),
            *(f"--{kind}-port={port}" for kind, port in ports.items()),
            *restricted,
            *self._extra,
        ]  # fmt: skip

    def _wait(self, ports: dict[str, int]) -> None:
        deadline = time.monotonic() + self._start_seconds
        while True:
            if not self.alive:
                raise _why(self.words(), ports, self.repository)
            if listens(self.pid, ports.values()) and self.control.ready():
                return
            if time.monotonic() > deadline:
                words = "; ".join(self.words()[-1:]) or "it says nothing"
                raise InputError(f"not ready after {self._start_seconds:g} s: {words}", "models that load in time")
            time.sleep(POLL_SECONDS)

    @property
    def pid(self) -> int:
        """The server's process id.

        Raises:
            InputError: it was not started.
        """
        if self.process is None:
            raise InputError("the server was not started")
        return self.process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process is not None and self.process.poll() is None

    def wait(self) -> int:
        """Wait until the server ends by itself; its exit code."""
        return self.process.wait() if self.process is not None else 0

    def words(self) -> list[str]:
        """The errors of the log, each as one line."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        found = ((a or b).split("\\n\\nAt:")[0].replace("\\n", " ").strip() for a, b in _ERROR.findall(text))
        return list(dict.fromkeys(line for line in found if line and not any(n in line for n in _NOISE)))

    def stop(self) -> None:
        """Drain: requests in flight end, new ones are refused. What has not ended after ``drain_seconds`` is killed."""
        if self.process is None:
            return
        family = _family(self.process.pid)
        try:
            if self.alive:
                told = self._drain()
                self.process.send_signal(signal.SIGTERM)
                self.process.wait(AFTER_DRAIN_SECONDS + (0 if told else self._drain_seconds))
        except subprocess.TimeoutExpired:
            pass  # it is killed below
        finally:
            self._end(self.process, family)

    def _drain(self) -> bool:
        """Unload every model: it ends what it has taken, and takes nothing new. After a SIGTERM alone Triton would take
        what comes over gRPC as long as one HTTP connection is open, and wait for those on which nothing happens.

        Returns:
            Whether the server could be told.
        """
        deadline = time.monotonic() + self._drain_seconds
        try:
            while busy := {name: state for name, state in self.control.states().items() if state != UNAVAILABLE}:
                if time.monotonic() > deadline:
                    break
                for name in [name for name, state in busy.items() if state == READY]:
                    self.control.unload(name)
                time.sleep(POLL_SECONDS)
        except InputError:
            return False
        return True

    def kill(self) -> None:
        """End at once; requests in flight are lost."""
        if self.process is not None:
            self._end(self.process, _family(self.process.pid))

    def _end(self, process: subprocess.Popen[bytes], family: list[Any]) -> None:
        """What is left of the server and its model processes, and their shared memory."""
        for member in family:
            with contextlib.suppress(Exception):  # it has ended
                member.kill()
        process.wait()
        self.process, self.ports = None, {}
        for left in Path("/dev/shm").glob(f"{self._memory}*"):
            left.unlink(missing_ok=True)
        if self._own_log:
            self.log.unlink(missing_ok=True)


def _check_repository(repository: Path) -> None:
    if not repository.is_dir():
        raise InputError(f"there is no folder {repository}", "a model repository", "write one with `trtpass deploy`")
    if not any(repository.glob("*/config.pbtxt")):
        raise InputError(
            f"{repository} has no models", "folders with a config.pbtxt", "add one with `trtpass deploy ENGINE -o REPO`"
        )


def _why(words: list[str], ports: dict[str, int], repository: Path) -> InputError:
    """What the log of a server that ended says, as an error."""
    for kind, port in ports.items():
        if any("in use" in line and str(port) in line for line in words):
            return PortTaken(kind, port)
        if any(f"failed to start {kind}".lower() in line.lower() for line in words):
            return PortTaken(kind, port)
    loading = [line for line in words if line.startswith("failed to load '")]
    if loading:
        return InputError("; ".join(loading), "models that load", f"see the models in {repository}")
    return InputError(f"the server ended: {'; '.join(words[-3:]) or 'it says nothing'}", "a server that starts")


def _family(pid: int) -> list[Any]:
    """The process and its children, known by more than their numbers."""
    import psutil

    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.Error:
        return []

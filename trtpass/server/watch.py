"""Noticing that a model's process has died, and bringing it back.

Triton goes on calling such a model ready, and every request to it fails, until it is unloaded and loaded again. What
the dead process was answering never ends on the server's side: clients need a timeout, and the server keeps these
requests and their HTTP connections until it ends.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from trtpass.errors import InputError
from trtpass.server.control import READY
from trtpass.server.process import Server

STUB = "triton_python_backend_stub"


class Watch:
    """A thread that looks after the models of a server, in ``with``.

    A model that an operator has unloaded stays unloaded. One that dies again and again is brought back after longer and
    longer pauses, then unloaded for good, so that requests say that it is not there.

    Args:
        server: a running one.
        say: called with a line for everything that happens.
        interval: seconds between two looks.
        tries: times that a model is brought back within ``within`` seconds.
    """

    def __init__(
        self,
        server: Server,
        say: Callable[[str], None],
        interval: float = 0.5,
        tries: int = 5,
        within: float = 60.0,
    ) -> None:
        self._server, self._say = server, say
        self._interval, self._tries, self._within = interval, tries, within
        self._times: dict[str, list[float]] = {}  # of each model: when it was brought back
        self._down: dict[str, float] = {}  # unloaded by this watch: when to load it
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()

    def _run(self) -> None:
        while not self._end.wait(self._interval) and self._server.alive:
            try:
                self.look()
            except InputError as error:
                if self._server.alive and not self._end.is_set():
                    self._say(f"watch: {error.found}")

    def look(self) -> None:
        """One look at all models.

        Raises:
            InputError: the server does not answer.
        """
        suspects = self._lacking(self._server.control.states())
        # a model that was being loaded or unloaded in between looks dead once, but not twice while it is called ready
        for model in self._lacking(self._server.control.states(), suspects) if suspects else ():
            self._bury(model)
        now = time.monotonic()
        for model in [name for name, when in self._down.items() if when <= now]:
            self._revive(model)

    def _lacking(self, states: dict[str, str], among: list[str] | None = None) -> list[str]:
        """Ready models of the python backend with fewer processes than instances."""
        ready = [name for name, state in states.items() if state == READY and (among is None or name in among)]
        return [name for name in ready if len(self._processes(name)) < self._instances(name)]

    def _instances(self, model: str) -> int:
        try:
            config = self._server.control.config(model)
        except InputError:  # unloaded meanwhile
            return 0
        if config.get("backend") != "python":
            return 0
        return sum(int(group.get("count", 1)) for group in config.get("instance_group", [])) or 1

    def _processes(self, model: str) -> list[Any]:
        """The live processes of a model: the server's children that run its model.py."""
        import psutil

        folder = self._server.repository / model
        found = []
        for process in psutil.Process(self._server.pid).children():
            try:
                words = process.cmdline()  # empty where it has ended
            except psutil.Error:
                continue
            if len(words) > 1 and Path(words[0]).name == STUB and Path(words[1]).is_relative_to(folder):
                found.append(process)
        return found

    def _bury(self, model: str) -> None:
        now = time.monotonic()
        past = [when for when in self._times.get(model, []) if now - when < self._within]
        self._server.control.unload(model)
        if len(past) >= self._tries:
            self._times.pop(model)
            self._say(
                f"watch: the process of '{model}' died {len(past) + 1} times in {self._within:g} s; it stays unloaded: "
                "load it again when the cause is found"
            )
            return
        pause = 0.0 if not past else 2.0 ** (len(past) - 1)
        self._times[model], self._down[model] = [*past, now], now + pause
        self._say(f"watch: the process of '{model}' died; loading it again" + (f" in {pause:g} s" if pause else ""))

    def _revive(self, model: str) -> None:
        if self._end.is_set():
            return
        try:
            self._server.control.load(model)
        except InputError as error:
            if self._end.is_set() or not self._server.alive:
                return
            self._say(f"watch: '{model}' does not load: {error.found}")
            self._failed(model)
            return
        self._down.pop(model, None)
        self._say(f"watch: '{model}' is ready again")

    def _failed(self, model: str) -> None:
        """Try again later, or no more."""
        times = self._times.setdefault(model, [])
        times.append(time.monotonic())
        if len(times) > self._tries:
            self._down.pop(model, None)
            self._times.pop(model)
            self._say(f"watch: '{model}' stays unloaded after {self._tries} attempts")
        else:
            self._down[model] = time.monotonic() + 2.0 ** (len(times) - 1)

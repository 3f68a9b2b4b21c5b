"""One thread that talks to the server, so that no decode step waits for it.

A call into the server goes to another process and comes back: it takes half a millisecond on busy cores, of which
little is work.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

_LOG = logging.getLogger(__name__)
Call = tuple[Callable[..., None], tuple[Any, ...]]


def at_once(call: Callable[..., None], *values: Any) -> None:
    """What ``Outbox.put`` does, on this thread."""
    call(*values)


class Outbox:
    """Makes calls in the order in which they were put, until ``close``."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def put(self, call: Callable[..., None], *values: Any) -> None:
        """Have it made, from any thread. What it raises is logged."""
        self._calls.put((call, values))

    def close(self) -> None:
        """Return when all that was put before has been made."""
        self._calls.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            call, values = item
            try:
                call(*values)
            except Exception:  # noqa: BLE001 - the next ones belong to others
                _LOG.exception("%s failed", getattr(call, "__qualname__", call))

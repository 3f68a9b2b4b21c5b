"""The record of a run: a JSON line for each prompt and policy, appended, so that a run which was stopped goes on."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from trtpass.errors import InputError
from trtpass.staging import disk_errors

NAME = "frontier.jsonl"


class Log:
    """Lines of one run; the first one says of what run.

    Args:
        lines: what is done, in order.
    """

    def __init__(self, path: Path, file: TextIO, lines: list[dict[str, Any]]) -> None:
        self.path, self.lines = path, lines
        self._file = file

    def find(self, **wanted: Any) -> dict[str, Any] | None:
        """The latest line with these values, or None."""
        for line in reversed(self.lines):
            if all(line.get(name) == value for name, value in wanted.items()):
                return line
        return None

    def add(self, line: dict[str, Any]) -> dict[str, Any]:
        """Append a line and see it on the disk; returns it."""
        with disk_errors(self.path):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        self.lines.append(line)
        return line


@contextmanager
def opened(folder: Path, run: dict[str, Any]) -> Iterator[Log]:
    """The log in ``folder``, created if there is none. A last line that a killed run left half-written is dropped.

    Args:
        run: what determines every number of the run; a log of another run is refused.

    Raises:
        InputError: a log of another run, a file that is no log, or a run that is going on in another process.
    """
    path = folder / NAME
    with disk_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"{path} is being written by another run", fix="wait for it, or give another folder"
            ) from error
        file.seek(0)
        content = file.read()
        whole = content[: content.rfind("\n") + 1]
        if len(whole) < len(content):
            file.truncate(len(whole.encode()))
        lines = [_line(path, number, line) for number, line in enumerate(whole.splitlines(), 1)]
        wanted = json.loads(json.dumps(run))
        if lines and lines[0].get("run") != wanted:
            raise InputError(f"{path} belongs to another model, text or plan", fix="give another folder, or remove it")
        log = Log(path, file, lines)
        if not lines:
            log.add({"run": wanted})
        yield log


def _line(path: Path, number: int, text: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: line {number} is not JSON", "a log of this command", "remove it") from error
    if not isinstance(line, dict):
        raise InputError(f"{path}: line {number} is no object", "a log of this command", "remove it")
    return line

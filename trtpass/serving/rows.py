"""What every batch of rows that come and go has: its sizes, its numbers of rows, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from trtpass.engine_checks import RowFailed
from trtpass.errors import InputError
from trtpass.runtime import Engine
from trtpass.serving.request import Limits


class Rows:
    """Of an engine, within limits.

    Attributes:
        rows: most rows at once.
        capacity: tokens that a row may have, prompt and answer.
    """

    def __init__(self, engine: Engine, limits: Limits) -> None:
        for name in ("rows", "prompt_tokens", "new_tokens"):
            if getattr(limits, name) < 1:
                raise InputError(f"{name}={getattr(limits, name)}", "1 or more")
        if engine.provider != "CPUExecutionProvider":
            raise InputError(
                f"an engine on {engine.provider}", "the CPU provider: the host moves the rows' keys and values",
                "open it with provider cpu",
            )  # fmt: skip
        wanted = limits.prompt_tokens + limits.new_tokens
        self.rows = limits.rows
        self.capacity = wanted if engine.context is None else min(wanted, engine.context)
        self._last = 0  # number of the row that joined last; none is used twice

    def _number(self) -> int:
        self._last += 1
        return self._last

    def _check_join(self, prompt: Sequence[int], room: int, running: int) -> None:
        if running == self.rows:
            raise InputError(f"all {self.rows} rows are taken", "a free row", "wait until one leaves")
        if not len(prompt) <= room <= self.capacity:
            raise InputError(
                f"a prompt of {len(prompt)} tokens in a row of {room}", f"a row of at most {self.capacity} tokens",
                "give a shorter prompt, or ask for fewer tokens",
            )  # fmt: skip

    def _check_rows(self, asked: Iterable[int], running: Iterable[int]) -> None:
        unknown = set(asked) - set(running)
        if unknown:
            raise InputError(f"row {min(unknown)} is not running", "a row that has joined and not left")


def renamed(failed: RowFailed, row: int) -> RowFailed:
    """The same failure, under the row's number in the batch."""
    return RowFailed(row, failed.what, failed.where)

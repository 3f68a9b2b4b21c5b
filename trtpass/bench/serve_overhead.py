"""What a server costs over the bare runtime: equal requests through it, through a scheduler, and as a static batch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trtpass.bench.measure import Array, Machine
from trtpass.bench.record import Record
from trtpass.bench.serve_load import (
    CLIENTS,
    SETTLE,
    Prompt,
    Round,
    closed_loop,
    cores,
    median,
    model_name,
    need_same,
    paired,
)
from trtpass.manifest import Manifest
from trtpass.runtime import Engine
from trtpass.server.process import Server
from trtpass.serving.observer import Observer
from trtpass.serving.open_batch import open_batch
from trtpass.serving.request import Limits, Piece, Request
from trtpass.serving.scheduler import Scheduler
from trtpass.text import Tokenizer

SCHEDULER = "the same scheduler and batch in one process, no server and no clients"
GENERATE = "Engine.generate on the same prompts as one batch"


@dataclass(frozen=True)
class Plan:
    """Requests that come at once and are of the same size, so that none waits for another.

    Args:
        clients: how many, one request each.
        lengths: tokens of a prompt.
        new_tokens: of an answer.
        repeats: most of them.
    """

    clients: int = 4
    lengths: tuple[int, ...] = (128,)
    new_tokens: int = 128
    repeats: int = 3


class Counted:
    """A listener that keeps the tokens of one answer."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.error: Exception | None = None
        self.ended = threading.Event()

    def piece(self, piece: Piece) -> None:
        self.tokens += piece.tokens
        if piece.finish:
            self.ended.set()

    def failed(self, error: Exception) -> None:
        self.error = error
        self.ended.set()

    def gone(self) -> bool:
        return False


def run(
    server: Server, folder: Path, given: Sequence[Prompt], plan: Plan, machine: Machine, repeats: int
) -> list[Record]:
    """Records of the server over both, and of the scheduler over the static batch.

    Raises:
        CheckFailed: an answer of one of the three is not that of the others.
    """
    model, manifest = model_name(folder), Manifest.read(folder)
    engine = Engine.open(folder, "cpu", machine.threads, manifest.context)
    longest = max(len(prompt.ids) for prompt in given)
    limits = Limits(plan.clients, plan.clients, longest, plan.new_tokens, None, machine.threads)
    scheduler = Scheduler(open_batch(engine, limits), Tokenizer.open(folder), (), limits, Observer())
    scheduler.start()
    rounds: list[Round] = []

    def served() -> list[tuple[int, ...]]:
        rounds.append(closed_loop(server, model, given, plan.clients, plan.new_tokens, range(len(given))))
        return [answer.tokens for answer in sorted(rounds[-1].answers, key=lambda answer: answer.prompt)]

    def scheduled() -> list[tuple[int, ...]]:
        return _scheduled(scheduler, given, plan.new_tokens)

    def generated() -> list[tuple[int, ...]]:
        steps = [step.tokens for step in engine.generate([prompt.ids for prompt in given], plan.new_tokens)]
        return [tuple(token or 0 for token in row) for row in zip(*steps, strict=True)]

    count = min(repeats, plan.repeats)
    try:
        seconds = _timed((served, scheduled, generated), count)
    finally:
        scheduler.close()
    rates = len(given) * plan.new_tokens / seconds
    load = {"prompt tokens": longest, "new tokens": plan.new_tokens, "repeats": count, "clients are": CLIENTS}
    params = {"engine": model, "clients": plan.clients, "load": load}
    made = []
    for ours, theirs, words in ((0, 1, SCHEDULER), (0, 2, GENERATE), (1, 2, GENERATE)):
        more = {
            "side": ("server", "scheduler")[ours],
            "overhead %": median(100 * (seconds[ours] / seconds[theirs] - 1)),
        }
        busy = {"cores": cores(rounds[-count:])} if ours == 0 else {}
        values = ("serve.overhead", {**params, **more, **busy}, words, "tokens/s")
        made.append(paired(*values, rates[ours], rates[theirs], True, 1.0, machine))
    return made


def _scheduled(scheduler: Scheduler, given: Sequence[Prompt], new_tokens: int) -> list[tuple[int, ...]]:
    """Token ids of all answers."""
    listeners = [Counted() for _ in given]
    for prompt, listener in zip(given, listeners, strict=True):
        scheduler.submit(Request(prompt.ids, new_tokens), listener)
    for listener in listeners:
        listener.ended.wait()
        if listener.error is not None:
            raise listener.error
    return [tuple(listener.tokens) for listener in listeners]


def _timed(sides: Sequence[Callable[[], list[tuple[int, ...]]]], repeats: int) -> Array:
    """Seconds ``[side, repeat]``, sides in turn after one that is not counted; all answers must be the same."""
    seconds = np.zeros((len(sides), repeats))
    for repeat in range(-1, repeats):
        made = []
        for number, side in enumerate(sides):
            time.sleep(SETTLE)
            start = time.perf_counter()
            made.append(side())
            if repeat >= 0:
                seconds[number, repeat] = time.perf_counter() - start
        for answers in made[:-1]:
            for row, (got, expected) in enumerate(zip(answers, made[-1], strict=True)):
                need_same(f"row {row}", got, expected)
    return seconds

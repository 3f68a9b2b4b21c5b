"""One thread that decodes the requests of many clients as one batch: rows join between two steps and leave when done.

A turn of its loop drops what its client has given up, lets at most one request in (strictly first come, first served),
and appends one token to every row. Where memory is short the newest row is paused, and goes on before any new one.
Memory comes free only when a row leaves, so until then nothing that did not fit is tried again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numpy as np

from trtpass.errors import InputError
from trtpass.pages import CacheFull
from trtpass.serving.batch import Batch
from trtpass.serving.job import Job
from trtpass.serving.observer import Observer
from trtpass.serving.request import Cancelled, Finish, Limits, Listener, OverLimit, Piece, Refused, Request
from trtpass.text import Tokenizer

_LOG = logging.getLogger(__name__)
_CLOSING = ("the server is shutting down", "a server that takes requests", "try again later, or another server")
_T = TypeVar("_T")


class Scheduler:
    """Requests in, pieces out, between ``start`` and ``close``.

    Args:
        batch: used by the scheduler's thread alone, from ``start`` on.
        tokenizer: for the text of answers.
        stop_ids: tokens that end an answer.
        limits: of requests and of the queue.
        observer: told about all that happens; what it raises is logged.
    """

    def __init__(
        self, batch: Batch, tokenizer: Tokenizer, stop_ids: Sequence[int], limits: Limits, observer: Observer
    ) -> None:
        self._batch, self._tokenizer, self._limits, self._observer = batch, tokenizer, limits, observer
        self._stop_ids = frozenset(stop_ids)
        self._rows, self._capacity = batch.rows, batch.capacity
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._changed = threading.Condition()  # guards these:
        self._waiting: deque[Job] = deque()
        self._open = 0  # requests that were taken and have not ended
        self._closing = self._closed = False
        # The thread's own, in the order in which they came; all that run came before all that are paused:
        self._running: list[Job] = []
        self._paused: list[Job] = []
        self._short = False  # something did not fit, and no row has left since

    def start(self) -> None:
        """Start the thread. What was submitted before is taken up."""
        self._thread.start()

    def submit(self, request: Request, listener: Listener) -> None:
        """Take a request, from any thread, and return at once; ``listener`` hears the rest.

        Raises:
            Refused: the queue is full, or the scheduler is closing.
            OverLimit: a prompt or an answer that is longer than the limits allow.
            InputError: a value of the request is not in its range.
        """
        reason = "input"
        try:
            job = Job.of(request, listener, self._tokenizer, self._stop_ids, self._limits, self._capacity)
            with self._changed:
                most = self._rows + self._limits.queue
                if self._closing:
                    reason = "closing"
                    raise Refused(*_CLOSING)
                if self._open >= most:
                    reason = "queue"
                    raise Refused(
                        f"{most} requests run or wait", f"fewer than {most}", "try again when some have ended"
                    )
                self._open += 1
                self._waiting.append(job)
                self._changed.notify_all()
        except InputError as error:
            self._safely(self._observer.refused, "limit" if isinstance(error, OverLimit) else reason)
            raise

    def drain(self, seconds: float) -> bool:
        """Take nothing new from now on, and wait until all that was taken has ended; False if it takes longer."""
        with self._changed:
            self._closing = True
            return self._changed.wait_for(lambda: self._open == 0, seconds)

    def close(self) -> None:
        """End the thread after the step that it is at; what has not ended then fails as refused.

        Not to be called by a listener or the observer.
        """
        with self._changed:
            self._closing = self._closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self._fail_all(Refused(*_CLOSING))  # what a thread that was never started has left

    def _run(self) -> None:
        """The thread. Only ``close`` ends it; if anything else does, nobody waits for an answer in vain."""
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._waiting or self._running or self._paused or self._closed)
                    if self._closed:
                        return
                try:
                    self._turn()
                except Exception as error:  # noqa: BLE001 - a mistake in this file: the next requests may do better
                    _LOG.exception("a turn of the scheduler failed")
                    self._fail_all(error)
        finally:
            with self._changed:
                self._closing = True
            self._fail_all(Refused(*_CLOSING))
            self._safely(self._tell_state)

    def _turn(self) -> None:
        for job in self._jobs():
            if self._attempt(job, job.listener.gone):
                self._fail(job, Cancelled("the client has gone"), "cancelled")
        if len(self._running) < self._rows and not (self._short and self._running):
            if self._paused:
                self._resume(self._paused[0])
            elif self._waiting:
                self._join(self._waiting[0])
        self._step()
        self._safely(self._tell_state)

    def _jobs(self) -> list[Job]:
        with self._changed:
            return [*self._running, *self._paused, *self._waiting]

    def _join(self, job: Job) -> None:
        """Read the prompt of the first request that waits, and choose its first token."""
        prompt, begin = job.request.prompt, time.monotonic()
        room = min(len(prompt) + job.request.max_tokens, self._capacity)
        joined = self._attempt(job, self._batch.join, prompt, room)
        if joined is None:
            return
        job.row, logits = joined
        with self._changed:
            self._waiting.popleft()
        self._running.append(job)
        self._safely(self._observer.started, begin - job.submitted, len(prompt))
        self._attempt(job, self._choose, job, logits)

    def _resume(self, job: Job) -> None:
        """Let the first of the paused rows go on."""
        row = self._attempt(job, self._batch.resume, job.paused)
        if row is None:
            return
        self._paused.remove(job)
        job.row, job.paused = row, None
        self._running.append(job)

    def _step(self) -> None:
        """Append its token to every row, pausing the newest ones until that fits, and choose the next tokens."""
        while self._running:
            begin = time.monotonic()
            try:
                logits = self._batch.step({job.row: job.token for job in self._running})
            except CacheFull as full:
                self._make_room(full)
                continue
            except Exception as error:  # noqa: BLE001 - clients are told, and the loop goes on
                self._step_failed(error)
                continue
            self._safely(self._observer.stepped, len(self._running), time.monotonic() - begin)
            for job in list(self._running):
                self._attempt(job, self._choose, job, logits[job.row])
            return

    def _make_room(self, full: CacheFull) -> None:
        """Pause the newest row; one that is alone ends, for no other will make room."""
        job = self._running[-1]
        self._short = True
        if len(self._running) == 1:
            self._unfit(job, full)
            return
        job.paused = self._attempt(job, self._batch.pause, job.row)
        if not job.ended:
            self._running.remove(job)
            self._paused.insert(0, job)
            self._safely(self._observer.paused)

    def _unfit(self, job: Job, full: CacheFull) -> None:
        """End what does not fit even alone: with what it has made, if anything."""
        if job.made:
            self._attempt(job, self._send, job, (), "cache")
        else:
            self._fail(job, full)

    def _step_failed(self, error: Exception) -> None:
        """An error that names a ``row`` has changed nothing for the others: they go on without it."""
        failed = [job for job in self._running if job.row == getattr(error, "row", None)]
        if not failed:
            _LOG.error("a step failed: %s", error, exc_info=not isinstance(error, InputError))
        for job in failed or list(self._running):
            self._fail(job, error)

    def _choose(self, job: Job, logits: np.ndarray) -> None:
        """The row's next token, from ``logits [V]``, and the piece that it makes."""
        job.token, reason = job.sampler.step(logits, self._batch.length(job.row) >= self._capacity)
        job.made += 1
        if job.made == 1:
            self._safely(self._observer.first_token, time.monotonic() - job.submitted)
        wanted = np.array(logits, np.float32) if job.made == 1 and job.request.logits else None
        self._send(job, (job.token,), reason, wanted)

    def _send(self, job: Job, tokens: tuple[int, ...], reason: str | None, logits: np.ndarray | None = None) -> None:
        """The next piece. A ``reason`` makes it the last one, which is sent when the row's memory is free again."""
        text, finish = job.text.finish(reason) if reason else (job.text.take(), None)
        if job in self._running:
            job.kept = self._batch.kept(job.row)
        if finish:
            self._free(job)
        end, count = cast(Finish | None, finish), len(job.request.prompt)
        job.listener.piece(Piece(text, tokens, end, count, job.made, job.kept, logits))
        if finish:
            self._end(job, finish)

    def _attempt(self, job: Job, call: Callable[..., _T], *values: Any) -> _T | None:
        """What a call for one request returns. None where it raised: the request has failed, or, if memory is short
        while others run, stays where it is."""
        try:
            return call(*values)
        except CacheFull as full:
            self._short = True
            if not self._running:
                self._unfit(job, full)
        except Exception as error:  # noqa: BLE001 - its client is told; the others must not notice
            if not isinstance(error, InputError):
                _LOG.exception("a request failed")
            self._fail(job, error)
        return None

    def _fail(self, job: Job, error: Exception, finish: str = "failed") -> None:
        if not job.ended:
            self._free(job)
            self._safely(job.listener.failed, error)
            self._end(job, finish)

    def _fail_all(self, error: Exception) -> None:
        for job in self._jobs():
            self._fail(job, error)

    def _free(self, job: Job) -> None:
        """Take a request out of where it is, if it is anywhere."""
        if job in self._running:
            self._running.remove(job)
            self._short = False
            self._safely(self._batch.leave, job.row)
        elif job in self._paused:
            self._paused.remove(job)
            job.paused = None
        else:
            with self._changed:
                if job in self._waiting:
                    self._waiting.remove(job)

    def _end(self, job: Job, finish: str) -> None:
        job.ended = True
        self._safely(self._observer.ended, finish, job.made, time.monotonic() - job.submitted, job.kept)
        with self._changed:
            self._open -= 1
            self._changed.notify_all()

    def _tell_state(self) -> None:
        batch, running = self._batch, self._running
        kept = sum(job.kept for job in running) / len(running) if running else 1.0
        waiting = len(self._waiting) + len(self._paused)
        self._observer.state(waiting, len(running), batch.pages_held, batch.pages, batch.bytes_held, kept)

    @staticmethod
    def _safely(call: Callable[..., None], *values: object) -> None:
        """Call what must not end the loop, whatever it raises."""
        try:
            call(*values)
        except Exception:  # noqa: BLE001
            _LOG.exception("%s failed", getattr(call, "__qualname__", call))

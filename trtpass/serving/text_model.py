"""The text model that Triton's Python backend loads: prompts in, text and tokens out, one response or many.

Triton hands over requests as they come; the scheduler's thread decodes them together and answers each by itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trtpass.errors import InputError
from trtpass.serving.answers import Answer, array_of
from trtpass.serving.batch import Batch
from trtpass.serving.metrics import TextMetrics
from trtpass.serving.request import OverLimit
from trtpass.serving.settings import Settings
from trtpass.serving.text_request import parse

ENGINE_FOLDER = "engine"  # in the folder of a version


class TritonPythonModel:
    """One engine, one cache, one scheduler."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the engine, run it once, and start to schedule.

        Raises:
            TritonModelException: why the model cannot be loaded, in one line.
        """
        import triton_python_backend_utils as pb

        self._pb = pb
        try:
            self._open(args)
        except InputError as error:
            raise pb.TritonModelException(" ".join(str(error).split())) from error

    def _open(self, args: Mapping[str, str]) -> None:
        from trtpass.manifest import Manifest
        from trtpass.runtime import Engine
        from trtpass.serving.open_batch import open_batch
        from trtpass.serving.scheduler import Scheduler
        from trtpass.text import Tokenizer

        self._settings = settings = Settings.read(json.loads(args["model_config"]))
        folder = Path(args["model_repository"]) / args["model_version"] / ENGINE_FOLDER
        manifest = Manifest.read(folder)
        engine = Engine.open(folder, "cpu", settings.limits.threads, manifest.context)
        batch = open_batch(engine, settings.limits)
        warm_up(batch)
        self._tokenizer = Tokenizer.open(folder)
        self._observer = TextMetrics(self._pb, args["model_name"])
        self._scheduler = Scheduler(batch, self._tokenizer, manifest.stop_ids, settings.limits, self._observer)
        self._scheduler.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Take each request by itself; what is wrong with one is answered to it alone."""
        for request in requests:
            self._take(request)

    def _take(self, request: Any) -> None:
        answer = Answer(self._pb, request.get_response_sender())

        def read(name: str) -> np.ndarray | None:
            tensor = self._pb.get_input_tensor_by_name(request, name)
            return None if tensor is None else array_of(tensor, name)

        try:
            try:
                asked = parse(read, self._tokenizer.encode, self._settings)
            except InputError as error:
                self._observer.refused("limit" if isinstance(error, OverLimit) else "input")
                raise
            answer.stream = asked.stream
            self._scheduler.submit(asked.request, answer)
        except Exception as error:  # noqa: BLE001 - an exception here would fail all requests of the call
            answer.failed(error)

    def finalize(self) -> None:
        """Let rows that run come to their end for a while, then close."""
        if not self._scheduler.drain(self._settings.drain_seconds):
            self._pb.Logger.log_warn(f"requests were still running after {self._settings.drain_seconds} s")
        self._scheduler.close()


def warm_up(batch: Batch) -> None:
    """One prompt of one token and one step, so that the first request finds sessions opened and memory taken.

    Not Triton's ``model_warmup``: that would be counted as a request, and its answer is not looked at. An engine that
    refuses so short a prompt starts cold.

    Raises:
        Exception: the graph does not run here; then the model must not be loaded.
    """
    try:
        row, logits = batch.join([0], min(2, batch.capacity))
    except InputError:
        return
    try:
        if batch.capacity > 1:
            batch.step({row: int(logits.argmax())})
    finally:
        batch.leave(row)

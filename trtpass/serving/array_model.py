"""The model that Triton's Python backend loads for an encoder: named arrays in, named arrays out.

Where the configuration allows batches, requests that Triton's dynamic batcher hands over together run together if all
their other sizes agree. A request that is wrong, or that the graph cannot run, fails alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trtpass.errors import InputError
from trtpass.serving.answers import array_of, error_of
from trtpass.serving.metrics import ARRAYS, Metrics
from trtpass.serving.settings import optional
from trtpass.serving.text_model import ENGINE_FOLDER

Arrays = dict[str, np.ndarray]


class TritonPythonModel:
    """One engine of an encoder."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the engine.

        Raises:
            TritonModelException: why the model cannot be loaded, in one line.
        """
        import triton_python_backend_utils as pb

        from trtpass.encoder_engine import EncoderEngine

        self._pb = pb
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"] / ENGINE_FOLDER
        try:
            self._engine = EncoderEngine.open(folder, "cpu", optional(config, "threads"))
        except InputError as error:
            raise pb.TritonModelException(" ".join(str(error).split())) from error
        self._batches = int(config["max_batch_size"]) > 0
        self._metrics = Metrics(pb, ARRAYS, args["model_name"])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response a request, in their order."""
        found: list[Arrays | Exception] = [self._read(request) for request in requests]
        answers: list[Arrays | Exception] = list(found)
        for group in grouped(found, self._batches):
            feeds = [feed for feed in (found[i] for i in group) if not isinstance(feed, Exception)]
            for i, made in zip(group, self._run(feeds), strict=True):
                answers[i] = made
        return [self._response(r, a) for r, a in zip(requests, answers, strict=True)]

    def _read(self, request: Any) -> Arrays | Exception:
        """The request's arrays in the shapes of the graph, or what is wrong with them."""
        from trtpass.encoder_inputs import checked

        try:
            feed = {}
            for name, port in self._engine.ports.items():
                tensor = self._pb.get_input_tensor_by_name(request, name)
                if tensor is None:
                    raise InputError(f"there is no input '{name}'", str(port))
                array = array_of(tensor, name)
                feed[name] = array.reshape(array.shape[: len(port.shape)]) if _padded(array, len(port.shape)) else array
            return checked(feed, self._engine.ports, "the inputs")
        except Exception as error:  # noqa: BLE001 - the others of the call go on
            return error

    def _run(self, feeds: Sequence[Arrays]) -> list[Arrays | Exception]:
        """Run requests together; each by itself where that fails."""
        try:
            started = time.monotonic()
            joined = (
                {name: np.concatenate([f[name] for f in feeds]) for name in feeds[0]} if len(feeds) > 1 else feeds[0]
            )
            made = self._engine.run(joined)
            rows = [len(next(iter(feed.values()))) if self._batches else 1 for feed in feeds]
            self._metrics.observe("trtpass_array_run_seconds", time.monotonic() - started)
            self._metrics.add("trtpass_array_rows_total", sum(rows))
            if len(feeds) == 1:
                return [made]
            cuts = np.cumsum(rows)[:-1]
            parts = {name: np.split(array, cuts) for name, array in made.items()}
            return [{name: part[i] for name, part in parts.items()} for i in range(len(feeds))]
        except Exception as error:  # noqa: BLE001 - one of several may be what broke the run
            return [error] if len(feeds) == 1 else [self._run([feed])[0] for feed in feeds]

    def _response(self, request: Any, answer: Arrays | Exception) -> Any:
        if isinstance(answer, Exception):
            self._metrics.add("trtpass_array_failed_total")
            return self._pb.InferenceResponse(output_tensors=[], error=error_of(self._pb, answer))
        wanted = request.requested_output_names()
        least = 2 if self._batches else 1  # Triton has no tensors of rank 0 beside the batch
        tensors = [
            self._pb.Tensor(name, np.ascontiguousarray(array.reshape(*array.shape, *[1] * (least - array.ndim))))
            for name, array in answer.items()
            if name in wanted
        ]
        return self._pb.InferenceResponse(output_tensors=tensors)


def grouped(feeds: Sequence[Arrays | Exception], batches: bool) -> list[list[int]]:
    """Positions of the requests that can run together: all sizes but the first agree. Wrong ones are left out."""
    groups: dict[Any, list[int]] = {}
    for i, feed in enumerate(feeds):
        if not isinstance(feed, Exception):
            key = tuple(array.shape[1:] for array in feed.values()) if batches else i
            groups.setdefault(key, []).append(i)
    return list(groups.values())


def _padded(array: np.ndarray, rank: int) -> bool:
    """Whether an array has the one size more that the configuration declares for a tensor without any."""
    return array.ndim == rank + 1 and array.shape[-1] == 1

"""What Triton's Python backend gives a model, in one process: requests in, responses recorded. Imports numpy alone."""

from __future__ import annotations

import queue
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1


class TritonModelException(Exception):
    """Why a model cannot be loaded."""


class TritonError:
    """An error of one response."""

    INTERNAL, INVALID_ARG, UNAVAILABLE, CANCELLED = "internal", "invalid", "unavailable", "cancelled"

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        self.message, self.code = message, code


class Tensor:
    """A named array; ``broken`` ones cannot be read, as texts whose lengths do not add up."""

    def __init__(self, name: str, array: np.ndarray, broken: bool = False) -> None:
        self.array, self.broken, self._name = array, broken, name

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        if self.broken:
            raise RuntimeError("unpack requires a buffer of 4 bytes")
        return self.array


class InferenceResponse:
    """Arrays by name, or an error."""

    def __init__(self, output_tensors: Any = (), error: TritonError | None = None) -> None:
        self.arrays = {tensor.name(): tensor.as_numpy() for tensor in output_tensors}
        self.error = error


class Sender:
    """Of one request. ``sent`` gets a response and whether it is the last."""

    def __init__(self) -> None:
        self.sent: queue.Queue[tuple[InferenceResponse, bool]] = queue.Queue()
        self.cancelled = self.unreachable = False

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        if self.unreachable:
            raise RuntimeError("the response cannot be sent")
        assert response is not None
        self.sent.put((response, bool(flags & TRITONSERVER_RESPONSE_COMPLETE_FINAL)))

    def is_cancelled(self) -> bool:
        return self.cancelled

    def all(self, timeout: float = 60) -> list[InferenceResponse]:
        """Every response up to the last; nothing may follow that."""
        found, last = [], False
        while not last:
            response, last = self.sent.get(timeout=timeout)
            found.append(response)
        assert self.sent.empty()
        return found

    def one(self) -> InferenceResponse:
        """The only response."""
        (response,) = self.all()
        return response


class Request:
    """Tensors by name."""

    def __init__(self, outputs: tuple[str, ...] = (), **tensors: Any) -> None:
        self.sender, self._outputs = Sender(), outputs
        self.tensors = {n: a if isinstance(a, Tensor) else Tensor(n, a) for n, a in tensors.items()}

    def get_response_sender(self) -> Sender:
        return self.sender

    def requested_output_names(self) -> tuple[str, ...]:
        return self._outputs


def get_input_tensor_by_name(request: Request, name: str) -> Tensor | None:
    return request.tensors.get(name)


class MetricFamily:
    """Metrics of one name; ``seen`` has the numbers that each was given, by name and labels."""

    COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
    seen: dict[tuple[str, tuple[tuple[str, str], ...]], list[float]] = {}  # noqa: RUF012 - one server

    def __init__(self, name: str, description: str, kind: str) -> None:
        self.name, self.kind = name, kind
        assert description

    def Metric(self, labels: Mapping[str, str], buckets: list[float] | None = None) -> Metric:
        assert (self.kind == self.HISTOGRAM) == bool(buckets) and sorted(buckets or []) == (buckets or [])
        return Metric(self.kind, self.seen.setdefault((self.name, tuple(sorted(labels.items()))), []))


class Metric:
    """One of them: each kind takes its own call alone."""

    def __init__(self, kind: str, values: list[float]) -> None:
        self._values = values
        setattr(self, {"counter": "increment", "gauge": "set", "histogram": "observe"}[kind], self._take)

    def _take(self, number: float) -> None:
        self._values.append(float(number))


class Logger:
    """The server's log."""

    @staticmethod
    def log_warn(text: str) -> None:
        print(text, file=sys.stderr)


def text(value: str | bytes) -> np.ndarray:
    """A STRING tensor of one element."""
    return np.array([value.encode() if isinstance(value, str) else value], np.object_)

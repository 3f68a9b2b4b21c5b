"""Answers through the server's Python module: errors by their kind, and one request's listener."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trtpass.errors import InputError
from trtpass.serving.request import Cancelled, Piece, Refused
from trtpass.serving.text_request import DTYPES, OUTPUTS

BUSY = "unavailable"  # first word of a refusal: in a stream and over HTTP the server (2.51) keeps no code but 400
ASK_SECONDS = 0.05  # between two questions to the server whether a client has gone: each costs 60 microseconds


def error_of(pb: Any, error: Exception) -> Any:
    """A failure as the server's own: one line and a code, which HTTP and gRPC turn into their own."""
    text = " ".join(str(error).split())[:1000] or type(error).__name__
    if isinstance(error, Cancelled):
        return pb.TritonError(text, pb.TritonError.CANCELLED)
    if isinstance(error, Refused):
        return pb.TritonError(f"{BUSY}: {text}", pb.TritonError.UNAVAILABLE)
    if isinstance(error, InputError):
        return pb.TritonError(text, pb.TritonError.INVALID_ARG)
    return pb.TritonError(f"unexpected {type(error).__name__}: {text}", pb.TritonError.INTERNAL)


def array_of(tensor: Any, name: str) -> np.ndarray:
    """The array of an input.

    Raises:
        InputError: the bytes are not what the type says (texts whose lengths do not add up).
    """
    try:
        array: np.ndarray = tensor.as_numpy()
    except Exception as error:  # whatever the server's deserialiser runs into
        raise InputError(f"'{name}' cannot be read ({error})", "a tensor in the server's own form") from error
    return array


class Answer:
    """Who asked one request: a ``Listener`` that sends what it is told.

    Args:
        pb: the server's Python module.
        sender: of the request.
        stream: every piece at once; else one response with the whole answer.
    """

    def __init__(self, pb: Any, sender: Any, stream: bool = False) -> None:
        self._pb, self._sender, self.stream = pb, sender, stream
        self._texts: list[str] = []
        self._tokens: list[int] = []
        self._logits: np.ndarray | None = None
        self._ended, self._gone, self._asked = False, False, 0.0

    def piece(self, piece: Piece) -> None:
        self._texts.append(piece.text)
        self._tokens += piece.tokens
        if piece.logits is not None:
            self._logits = piece.logits
        if not self.stream and piece.finish is None:
            return
        values: dict[str, Sequence[Any] | np.ndarray] = {
            "text_output": ["".join(self._texts).encode("utf-8", "replace")],
            "token_ids": self._tokens,
            "finish_reason": [(piece.finish or "").encode()],
            "prompt_tokens": [piece.prompt_tokens],
            "completion_tokens": [piece.completion_tokens],
            "kept": [piece.kept],
        }
        if self._logits is not None:
            values["logits"] = self._logits
        self._texts, self._tokens, self._logits = [], [], None
        self._send(self._response(values), piece.finish is not None)

    def failed(self, error: Exception) -> None:
        self._send(self._pb.InferenceResponse(error=error_of(self._pb, error)), True)

    def gone(self) -> bool:
        now = time.monotonic()
        if not self._gone and now - self._asked >= ASK_SECONDS:
            self._asked = now
            self._gone = bool(self._sender.is_cancelled())
        return self._gone

    def _response(self, values: Mapping[str, Sequence[Any] | np.ndarray]) -> Any:
        tensors = [
            self._pb.Tensor(name, np.asarray(value, DTYPES[OUTPUTS[name].type])) for name, value in values.items()
        ]
        return self._pb.InferenceResponse(output_tensors=tensors)

    def _send(self, response: Any, last: bool) -> None:
        """Send once more; nothing after the last. A client that cannot be reached has gone."""
        if self._ended:
            return
        self._ended = last
        try:
            self._sender.send(response, flags=self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0)
        except Exception as error:  # noqa: BLE001 - the other rows of the batch must go on, whatever the server says
            self._gone = True
            self._pb.Logger.log_warn(f"an answer could not be sent: {error}")

"""Asking a server: text over HTTP, at once or as a stream, text over gRPC, arrays over gRPC.

HTTP needs the standard library alone; gRPC needs ``tritonclient`` (``pip install 'trtpass[client]'``). Closing a stream
disconnects, which cancels the request.
"""

from __future__ import annotations

import json
import queue
import re
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np

from trtpass.errors import InputError
from trtpass.serving.answers import BUSY
from trtpass.serving.request import Refused
from trtpass.serving.text_request import DTYPES, INPUTS

TIMEOUT = 600.0  # seconds without a word from the server
UNAVAILABLE = 503
WITH_STATUS = {"triton_grpc_error": "true"}  # errors of a gRPC stream have a status; without, only words


_WORDS = re.compile(r"(.*?)\.?(?: Expected: (.*?)\.)?(?: To do: (.*?)\.)?", re.DOTALL)  # an error of ours in one line


class ServerError(InputError):
    """The server refused a request: its words."""


class Broken(InputError):
    """The connection or the server went away, or fell silent, before the answer was whole."""


@dataclass(frozen=True)
class Answer:
    """An answer, or a piece of one.

    Attributes:
        text: new text.
        tokens: new token ids.
        finish: ``stop``, ``length``, ``context`` or ``cache``; empty where more is to come.
        prompt_tokens, completion_tokens: so far.
        kept: share of its tokens that the row's cache holds.
        logits: float32 ``[V]`` after the prompt, where they were asked for.
    """

    text: str
    tokens: tuple[int, ...]
    finish: str
    prompt_tokens: int
    completion_tokens: int
    kept: float
    logits: np.ndarray | None = None


def join(pieces: Iterable[Answer]) -> Answer:
    """The whole answer of a stream.

    Raises:
        Broken: the last piece is missing.
    """
    every = list(pieces)
    if not every or not every[-1].finish:
        raise Broken("the stream ended before its last piece", "a piece with a finish")
    last, logits = every[-1], [piece.logits for piece in every if piece.logits is not None]
    return Answer(
        "".join(piece.text for piece in every),
        tuple(token for piece in every for token in piece.tokens),
        last.finish, last.prompt_tokens, last.completion_tokens, last.kept, logits[0] if logits else None,
    )  # fmt: skip


def generate(url: str, model: str, prompt: str | Sequence[int], *, timeout: float = TIMEOUT, **options: Any) -> Answer:
    """The whole answer of a text model, over HTTP.

    Args:
        url: ``http://host:port``.
        model: its name in the repository.
        prompt: a text, or token ids.
        timeout: seconds to wait for the answer.
        options: ``max_tokens``, ``stop`` (texts), ``temperature``, ``top_p``, ``seed``, ``return_logits``; what is not
            given is the server's choice.

    Raises:
        ServerError: the request is refused, in the server's words.
        Refused: not now, because the server is full or shuts down. Over HTTP only a proxy says so: tritonserver 2.51
            answers 400 to whatever a model refuses, so that this is a ServerError, too.
        Broken: no answer came.
    """
    fields = _fields(prompt, options)
    with _posted(url, f"/v2/models/{quote(model, safe='')}/generate", fields, timeout) as response:
        return _answer(_parsed(response.read()))


def stream(
    url: str, model: str, prompt: str | Sequence[int], *, timeout: float = TIMEOUT, **options: Any
) -> Iterator[Answer]:
    """The pieces of an answer as they are made, over HTTP; as ``generate``. ``timeout``: seconds between pieces."""
    fields = {**_fields(prompt, options), "stream": True}
    finished = False
    with _posted(url, f"/v2/models/{quote(model, safe='')}/generate_stream", fields, timeout) as response:
        for line in response:
            if line.startswith(b"data:"):
                piece = _answer(_parsed(line[5:]))
                finished = bool(piece.finish)
                yield piece
    if not finished:
        raise Broken("the stream ended before its last piece", "a piece with a finish")


def stream_grpc(
    address: str, model: str, prompt: str | Sequence[int], *, timeout: float = TIMEOUT, **options: Any
) -> Iterator[Answer]:
    """The pieces of an answer as they are made, over gRPC (``address``: ``host:port``); as ``stream``."""
    import tritonclient.grpc as grpc
    from tritonclient.utils import InferenceServerException

    fields = {"stream": True, **_fields(prompt, options)}
    inputs = [_tensor(grpc, name, _array(name, value)) for name, value in fields.items()]
    arrived: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    finished = False
    with closing(grpc.InferenceServerClient(address)) as client:
        client.start_stream(lambda result, error: arrived.put((result, error)), headers=WITH_STATUS)
        try:
            with suppress(InferenceServerException):  # of a stream that has broken: why, comes by the callback
                client.async_stream_infer(model, inputs, enable_empty_final_response=True)
            while not finished:
                try:
                    result, problem = arrived.get(timeout=timeout)
                except queue.Empty as error:
                    raise _silent(address, timeout) from error
                if problem is not None:
                    raise _grpc_error(problem, address)
                final = result.get_response().parameters.get("triton_final_response")
                if result.as_numpy("text_output") is None:
                    raise Broken("the stream ended before its last piece", "a piece with a finish")
                piece = _answer({name: result.as_numpy(name) for name in _names(result)})
                finished = bool(piece.finish)
                yield piece
                if final is not None and final.bool_param and not finished:
                    raise Broken("the stream ended before its last piece", "a piece with a finish")
        finally:
            client.stop_stream(cancel_requests=not finished)


def infer(
    address: str, model: str, arrays: Mapping[str, np.ndarray], *, timeout: float = TIMEOUT
) -> dict[str, np.ndarray]:
    """Outputs by name of a model of arrays, over gRPC.

    Args:
        address: ``host:port``.
        model: its name in the repository.
        arrays: an array for each input.
        timeout: seconds to wait for the answer.

    Raises:
        Refused, ServerError, Broken: as ``generate``.
    """
    import tritonclient.grpc as grpc
    from tritonclient.utils import InferenceServerException

    inputs = [_tensor(grpc, name, array) for name, array in arrays.items()]
    with closing(grpc.InferenceServerClient(address)) as client:
        try:
            result = client.infer(model, inputs, client_timeout=timeout)
        except InferenceServerException as error:
            raise _grpc_error(error, address) from error
        return {name: result.as_numpy(name) for name in _names(result)}


def _fields(prompt: str | Sequence[int], options: Mapping[str, Any]) -> dict[str, Any]:
    known = [name for name in INPUTS if name not in ("text_input", "input_ids")]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise InputError(f"option '{unknown[0]}' of a text model", f"one of {', '.join(known)}")
    asked = {"text_input": prompt} if isinstance(prompt, str) else {"input_ids": [int(i) for i in prompt]}
    given = {name: list(value) if name == "stop" else value for name, value in options.items() if value is not None}
    return {**asked, **given}


def _array(name: str, value: Any) -> np.ndarray:
    """A field as a tensor of one dimension."""
    values = value if isinstance(value, list) else [value]
    return np.array([v.encode() if isinstance(v, str) else v for v in values], DTYPES[INPUTS[name].type])


def _tensor(grpc: Any, name: str, array: np.ndarray) -> Any:
    from tritonclient.utils import np_to_triton_dtype

    tensor = grpc.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    tensor.set_data_from_numpy(np.ascontiguousarray(array))
    return tensor


def _names(result: Any) -> list[str]:
    return [output.name for output in result.get_response().outputs]


def _answer(found: Mapping[str, Any]) -> Answer:
    """From the tensors of a response; JSON has one element as itself."""

    def flat(name: str) -> list[Any]:
        value = found.get(name, [])
        values = value.tolist() if isinstance(value, np.ndarray) else value
        return values if isinstance(values, list) else [values]  # as an array, a text would lose NUL at its end

    def text(name: str) -> str:
        return "".join(v.decode() if isinstance(v, bytes) else str(v) for v in flat(name))

    try:
        return Answer(
            text("text_output"), tuple(int(i) for i in flat("token_ids")), text("finish_reason"),
            int(flat("prompt_tokens")[0]), int(flat("completion_tokens")[0]), float(flat("kept")[0]),
            np.array(flat("logits"), np.float32) if flat("logits") else None,
        )  # fmt: skip
    except (IndexError, ValueError, TypeError) as error:
        raise Broken(f"a response with {', '.join(found)}", "the outputs of a text model of trtpass") from error


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except ValueError as error:
        raise Broken(f"the server answers {body[:200]!r}", "JSON") from error
    if not isinstance(value, dict):
        raise Broken(f"the server answers {body[:200]!r}", "a JSON object")
    if "error" in value:
        words = str(value["error"])
        raise (Refused if words.startswith(f"{BUSY}:") else ServerError)(*_parts(words))
    return value


@contextmanager
def _posted(url: str, path: str, fields: Mapping[str, Any], timeout: float) -> Iterator[HTTPResponse]:
    """The response to a POST of JSON, its status checked; leaving disconnects."""
    where = urlsplit(url)
    if where.scheme != "http" or not where.hostname:
        raise InputError(f"the address '{url}'", "http://host:port")
    connection = HTTPConnection(where.hostname, where.port or 80, timeout=timeout)
    wire: socket.socket | None = None
    try:
        connection.request(
            "POST", path, json.dumps(fields), {"Content-Type": "application/json", "Connection": "close"}
        )
        wire = connection.sock
        response = connection.getresponse()
        if response.status != 200:
            _refuse(response)
        yield response
    except TimeoutError as error:
        raise _silent(url, timeout) from error
    except (OSError, HTTPException) as error:
        raise Broken(f"{url} does not answer: {error or type(error).__name__}", "a running server") from error
    finally:
        if wire is not None:
            with suppress(OSError):  # the other side has closed it
                wire.shutdown(socket.SHUT_RDWR)
        connection.close()


def _refuse(response: HTTPResponse) -> None:
    body = response.read().removeprefix(b"data:")  # a stream's error is its one piece
    kind = Refused if response.status == UNAVAILABLE else ServerError
    try:
        _parsed(body)
    except ServerError as error:
        raise kind(error.found, error.expected, error.fix) from None
    except Broken:
        pass  # no JSON: the words are its own
    raise kind(body[:300].decode(errors="replace") or f"status {response.status}")


def _parts(words: str) -> tuple[str, ...]:
    """Found, expected, to do, of a message that may have them."""
    match = _WORDS.fullmatch(words)
    return tuple(part or "" for part in match.groups()) if match else (words,)


def _silent(where: str, timeout: float) -> Broken:
    return Broken(f"no word came for {timeout:g} s from {where}", "a server that answers")


def _grpc_error(error: Any, address: str) -> InputError:
    status, words = str(error.status() or ""), str(error.message())
    if "DEADLINE" in status or any(text in words for text in ("failed to connect", "Socket closed", "Stream removed")):
        return Broken(f"{address} does not answer: {words}", "a running server")
    return (Refused if "UNAVAILABLE" in status else ServerError)(*_parts(words))

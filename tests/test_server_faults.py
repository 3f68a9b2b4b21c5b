"""What clients do wrong is an error for that request alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serve_clients import (
    WAYS,
    Alone,
    Ask,
    Numbers,
    answer,
    check_same,
    connected,
    request_bytes,
    stub,
    undisturbed,
)
from tests.served import PATIENCE, Served, until
from tests.wrong_requests import FEW, GARBAGE, OURS, RAW, TEXT, THEIRS, Tensor
from trtpass.server.process import Server
from trtpass.serving.text_request import INPUTS

pytestmark = pytest.mark.server

MODEL = "dense"
PROMPT = "a prompt beside those that are none"


@pytest.fixture(scope="module")
def alone(served: Served) -> Alone:
    return Alone(served.engines)


@contextmanager
def nothing_happens(server: Server, model: str = MODEL) -> Iterator[None]:
    """The same process serves the model at the end, and nothing of what ran is left in it."""
    before = stub(server, model)
    yield
    until(lambda: Numbers(server).idle([model]), "a model at rest")
    assert stub(server, model) == before


def post(server: Server, body: bytes | Mapping[str, Any], path: str = "generate") -> tuple[int, str]:
    """Status and the words of the error, of a request of HTTP."""
    connection = HTTPConnection("127.0.0.1", server.ports["http"], timeout=PATIENCE)
    try:
        data = body if isinstance(body, bytes) else json.dumps(body)
        connection.request("POST", f"/v2/models/{MODEL}/{path}", data, {"Connection": "close"})
        response = connection.getresponse()
        text = response.read().decode().removeprefix("data: ")
        return response.status, str(json.loads(text).get("error", "an answer"))
    finally:
        connection.close()


def send(server: Server, tensors: Sequence[Tensor]) -> str:
    """The error of a request of gRPC with these tensors, as raw bytes, or ``an answer``."""
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    request = service_pb2.ModelInferRequest(model_name=MODEL)
    for name, kind, shape, data in tensors:
        tensor = request.inputs.add()
        tensor.name, tensor.datatype = name, kind
        tensor.shape.extend(shape)
        request.raw_input_contents.append(data)
    with grpc.insecure_channel(server.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            found = [response.error_message for response in stub.ModelStreamInfer(iter([request]), timeout=PATIENCE)]
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    assert found, "the server said nothing"
    return next(filter(None, found), "an answer")


def test_wrong_values_over_http(served: Served, alone: Alone) -> None:
    server = served.process
    with nothing_happens(server), undisturbed(server, alone, MODEL):
        before = Numbers(server).refused(MODEL)
        for fields, words in OURS:
            for path in ("generate", "generate_stream"):
                status, error = post(server, {"max_tokens": 3, **fields}, path)
                assert status == 400 and words in error, (str(fields)[:80], status, error)
        refused = Counter(Numbers(server).refused(MODEL)) - Counter(before)
    wrong_ids = sum("token id" in words for _, words in OURS)  # these are the engine's to find
    over = sum("at most 96" in words or "bytes" in words for _, words in OURS)
    assert refused == {"limit": 2 * over, "input": 2 * (len(OURS) - over - wrong_ids)}


def test_requests_over_http_that_are_none(served: Served, alone: Alone) -> None:
    server = served.process
    with nothing_happens(server), undisturbed(server, alone, MODEL):
        for fields, words in THEIRS:
            status, error = post(server, fields)
            assert status in (400, 500) and words in error, (fields, status, error)
        for body, words in GARBAGE:
            for path in ("generate", "generate_stream"):
                status, error = post(server, body, path)
                assert status in (400, 500) and words in error, (body[:80], status, error)


def test_wrong_tensors_over_grpc(served: Served, alone: Alone) -> None:
    server = served.process
    with nothing_happens(server), undisturbed(server, alone, MODEL):
        assert send(server, [TEXT, FEW]) == "an answer"
        for what, tensors, words in RAW:
            error = send(server, tensors)
            assert words in error, (what, error)


SIZES = st.lists(st.integers(-1, 3), max_size=3)
NAMES = st.sampled_from([*INPUTS, "x"])
KINDS = st.sampled_from(["BYTES", "INT64", "INT32", "FP32", "BOOL", "FP16", ""])


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(NAMES, KINDS, SIZES, st.binary(max_size=24)), max_size=4))
def test_any_tensors(served: Served, tensors: list[Tensor]) -> None:
    """An answer or an error, and the model goes on."""
    server = served.process
    with nothing_happens(server):
        assert send(server, [*tensors, FEW])
        assert send(server, [TEXT, FEW]) == "an answer"


def test_clients_that_stop_in_the_middle(served: Served, alone: Alone) -> None:
    """Half a head, half a body, a stream that nobody reads: the others go on, and rows end."""
    server, ask = served.process, Ask(MODEL, PROMPT, 50)
    whole = request_bytes(ask, stream=True, return_logits=True)
    with nothing_happens(server), ExitStack() as wires, undisturbed(server, alone, MODEL):
        before = Numbers(server).ended(MODEL)["length"]
        for sent in [whole[:40], whole[:-5]] * 20 + [whole] * 8:
            wires.enter_context(connected(server, 1024)).sendall(sent)
        until(lambda: Numbers(server).ended(MODEL)["length"] >= before + 8, "rows whose answers nobody reads")
        for way in WAYS:
            check_same(answer(server, ask, way), alone.answer(ask))

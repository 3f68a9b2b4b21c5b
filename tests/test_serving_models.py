"""The models that Triton loads, over a fake of its Python module: requests, answers, errors, metrics, settings."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_engines import tiny_engine

from tests import fake_triton as pb
from tests.vit_engines import TOME, images, vit_engine
from trtpass.deploy.repository import Request as Deployment
from trtpass.deploy.repository import deploy
from trtpass.encoder_engine import EncoderEngine
from trtpass.encoder_inputs import Port
from trtpass.errors import InputError
from trtpass.runtime import Engine
from trtpass.serving import array_model, text_model
from trtpass.serving.answers import Answer, error_of
from trtpass.serving.metrics import TEXT, TextMetrics
from trtpass.serving.observer import Observer
from trtpass.serving.request import Cancelled, Limits, OverLimit, Piece, Refused
from trtpass.serving.settings import Settings
from trtpass.serving.text_request import parse

SETTINGS = Settings(Limits(rows=2, queue=1, prompt_tokens=4, new_tokens=8), 3)
PIECE = Piece("ab", (1, 2), None, 4, 2, 0.5, np.arange(3, dtype=np.float32))
LAST = Piece("c", (3,), "stop", 4, 3, 0.25)


def config_of(deployed: Path) -> str:
    """A model's configuration, in the form in which Triton hands it over, of what our models read."""
    from google.protobuf import text_format  # type: ignore[import-untyped]
    from google.protobuf.json_format import MessageToDict  # type: ignore[import-untyped]
    from tritonclient.grpc import model_config_pb2

    message = text_format.Parse((deployed / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    made = MessageToDict(message, preserving_proto_field_name=True)
    return json.dumps({"max_batch_size": 0, **made})


def load(model: Any, engine: Path, out: Path, **limits: int) -> Any:
    """A deployed model, initialized over the fake."""
    deploy(Deployment(engine, out, "m", threads=1, **limits))
    model.initialize({
        "model_config": config_of(out / "m"), "model_repository": str(out / "m"), "model_version": "1",
        "model_name": "m",
    })  # fmt: skip
    return model


@pytest.fixture(scope="module")
def served() -> Iterator[None]:
    """The fake in the place of Triton's module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton_python_backend_utils", pb)
        yield


@pytest.fixture(scope="module")
def model(served: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A text model: context 96, one token a byte, 2 rows, 1 waits."""
    folder = tmp_path_factory.mktemp("text")
    made = load(text_model.TritonPythonModel(), tiny_engine(tmp_path_factory, "dense"), folder, rows=2, queue=1)
    yield made
    made.finalize()


def ask(model: Any, **tensors: Any) -> list[pb.InferenceResponse]:
    request = pb.Request(**tensors)
    assert model.execute([request]) is None
    return request.sender.all()


def test_an_answer_is_what_the_runtime_generates(model: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    engine = Engine.open(tiny_engine(tmp_path_factory, "dense"), threads=1)
    expected = [step.tokens[0] for step in engine.generate([list(b"hello")], 6)]
    ids = np.array(list(b"hello"), np.int64)
    (whole,) = ask(model, input_ids=ids, max_tokens=np.array([6], np.int32), return_logits=np.array([True]))
    assert whole.arrays["token_ids"].tolist() == expected and whole.arrays["token_ids"].dtype == np.int32
    assert whole.arrays["logits"].argmax() == expected[0] and whole.arrays["logits"].shape == (engine.vocab,)
    assert (whole.arrays["finish_reason"][0], whole.arrays["prompt_tokens"][0]) == (b"length", 5)
    pieces = ask(model, input_ids=ids, max_tokens=np.array([6], np.int32), stream=np.array([True]))
    assert np.concatenate([piece.arrays["token_ids"] for piece in pieces]).tolist() == expected
    assert b"".join(piece.arrays["text_output"][0] for piece in pieces) == whole.arrays["text_output"][0]
    assert [piece.arrays["finish_reason"][0] for piece in pieces] == [b""] * 5 + [b"length"]
    assert all("logits" not in piece.arrays for piece in pieces)


def test_a_bad_request_harms_no_other(model: Any) -> None:
    before = {key: sum(v) for key, v in pb.MetricFamily.seen.items()}
    good = [pb.Request(text_input=pb.text(t), max_tokens=np.array([3], np.int32)) for t in ("hello", "\0 there")]
    bad = [
        pb.Request(), pb.Request(text_input=pb.text(b"\xff")), pb.Request(input_ids=np.array([256])),
        pb.Request(text_input=pb.Tensor("text_input", pb.text("a"), broken=True)),
        pb.Request(text_input=pb.text("a"), temperature=np.array([np.nan], np.float32)),
        pb.Request(text_input=pb.text("a" * (96 * 64 + 1))),
    ]  # fmt: skip
    model.execute([bad[0], good[0], *bad[1:4], good[1], *bad[4:]])
    for request in bad:
        error = request.sender.one().error
        assert error is not None and error.code == pb.TritonError.INVALID_ARG and "\n" not in error.message
    for request in good:
        assert len(request.sender.one().arrays["token_ids"]) == 3
    counted = {key: sum(v) - before.get(key, 0) for key, v in pb.MetricFamily.seen.items()}
    assert counted["trtpass_refused_total", (("model", "m"), ("reason", "input"))] == 4
    assert counted["trtpass_refused_total", (("model", "m"), ("reason", "limit"))] == 1


def test_what_nobody_foresaw_is_an_answer_too(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(model._scheduler, "submit", broken)
    (answer,) = ask(model, text_input=pb.text("a"))
    assert answer.error is not None and answer.error.code == pb.TritonError.INTERNAL
    assert answer.error.message == "unexpected ZeroDivisionError: oh"


@pytest.mark.parametrize(("tensors", "error"), [
    ({}, "without a prompt"),
    ({"text_input": pb.text("a"), "input_ids": np.array([1])}, "both"),
    ({"text_input": pb.text(b"\xed\xa0\x80")}, "not UTF-8 .byte 0"),  # half of a surrogate pair
    ({"text_input": pb.text("a"), "stop": np.array([b"a", b"\xc3"], object)}, "stop is not UTF-8"),
    ({"text_input": np.array([b"a", b"b"], object)}, r"shape \[2\]"),
    ({"text_input": np.array([], object)}, r"shape \[0\]"),
    ({"input_ids": np.array([1], np.int32)}, "int32"),
    ({"input_ids": np.array([[1]])}, r"shape \[1, 1\]"),
    ({"input_ids": np.array([1]), "max_tokens": np.array([1, 2], np.int32)}, r"max_tokens has shape \[2\]"),
    ({"input_ids": np.array([1]), "seed": np.array([1.5])}, "seed is float64"),
])  # fmt: skip
def test_tensors_are_checked(tensors: dict[str, np.ndarray], error: str) -> None:
    with pytest.raises(InputError, match=error):
        parse(tensors.get, lambda text: list(text.encode()), SETTINGS)


def test_a_long_text_is_refused_before_it_is_tokenised() -> None:
    with pytest.raises(OverLimit, match="257 bytes"):
        parse({"text_input": pb.text("a" * 257)}.get, lambda text: pytest.fail("tokenised"), SETTINGS)
    assert parse({"text_input": pb.text("a" * 256)}.get, lambda text: [1], SETTINGS).request.prompt == (1,)


def test_defaults() -> None:
    asked = parse({"text_input": pb.text("ab")}.get, lambda text: list(text.encode()), SETTINGS)
    assert not asked.stream and asked.request.prompt == (97, 98) and asked.request.max_tokens == 3
    assert (asked.request.temperature, asked.request.top_p, asked.request.seed) == (0, 1, 0)
    assert asked.request.stop == () and not asked.request.logits


def test_one_response_or_one_a_piece() -> None:
    whole, stream = pb.Sender(), pb.Sender()
    for sender, answer in ((whole, Answer(pb, whole)), (stream, Answer(pb, stream, stream=True))):
        answer.piece(PIECE)
        assert sender.sent.empty() == (sender is whole)
        answer.piece(LAST)
        answer.failed(InputError("too late"))
    found = whole.one().arrays
    assert (found["text_output"].tolist(), found["token_ids"].tolist()) == ([b"abc"], [1, 2, 3])
    assert found["logits"].tolist() == [0, 1, 2] and found["kept"].dtype == np.float32
    assert [r.arrays["text_output"][0] for r in stream.all()] == [b"ab", b"c"]


def test_a_client_that_cannot_be_reached_has_gone() -> None:
    sender = pb.Sender()
    answer = Answer(pb, sender, stream=True)
    assert not answer.gone()
    sender.unreachable = True
    answer.piece(PIECE)
    assert answer.gone()
    cancelled = pb.Sender()
    cancelled.cancelled = True
    assert Answer(pb, cancelled).gone()


@pytest.mark.parametrize(("error", "code", "text"), [
    (Refused("full", "room"), "unavailable", r"unavailable: full\. Expected: room\."),
    (Cancelled("gone"), "cancelled", r"gone\."),
    (InputError("bad", "good", "mend"), "invalid", r"bad\. Expected: good\. To do: mend\."),
    (KeyError("x" * 5000), "internal", r"unexpected KeyError: 'x{999}"),
])  # fmt: skip
def test_errors_have_a_code_and_one_line(error: Exception, code: str, text: str) -> None:
    made = error_of(pb, error)
    assert made.code == code and re.fullmatch(text, made.message)


def test_every_metric_is_made_and_every_event_is_counted() -> None:
    observer, seen = TextMetrics(pb, "counted"), pb.MetricFamily.seen
    observer.started(0.5, 7)
    observer.first_token(0.75)
    observer.stepped(3, 0.25)
    for finish in TEXT["trtpass_requests_total"].values:
        observer.ended(finish, 5, 1.0, 0.5)
    for reason in TEXT["trtpass_refused_total"].values:
        observer.refused(reason)
    observer.paused()
    observer.state(1, 2, 3, 4, 5, 0.5)
    observer.state(1, 2, 3, 4, 5, 0.5)  # unchanged: not sent again
    found = {(name, labels): v for (name, labels), v in seen.items() if ("model", "counted") in labels}
    assert {name for name, _ in found} == set(TEXT) and all(len(values) == 1 for values in found.values())
    own = (("model", "counted"),)
    assert found["trtpass_prefill_tokens_total", own] == [7] and found["trtpass_decode_tokens_total", own] == [3]
    assert found["trtpass_queue_seconds", own] == [0.5] and found["trtpass_pages", own] == [4]
    events = {name for name in vars(Observer) if not name.startswith("_")}
    assert events == {name for name in vars(TextMetrics) if not name.startswith("_")}


def test_settings_are_read_as_they_are_written() -> None:
    for settings in (SETTINGS, Settings(Limits(pages=7, threads=2), 5, drain_seconds=0), Settings()):
        config = {"parameters": {key: {"string_value": v} for key, v in settings.parameters().items()}}
        assert Settings.read(config) == settings
    assert Settings.read({}) == Settings()


@pytest.mark.parametrize(("key", "value"), [
    ("rows", "0"), ("rows", "x"), ("rows", "-1"), ("rows", "9" * 5000), ("queue", "1.5"), ("pages", ""),
    ("threads", "0"), ("default_max_tokens", "4096"), ("rows", "\u0663"),
])  # fmt: skip
def test_a_wrong_setting_is_named(key: str, value: str) -> None:
    with pytest.raises(InputError, match=f"parameter '{key}'"):
        Settings.read({"parameters": {key: {"string_value": value}}})


def test_a_model_that_cannot_be_loaded_says_why(
    served: None, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    deploy(Deployment(tiny_engine(tmp_path_factory, "dense"), tmp_path, "m"))
    (tmp_path / "m" / "1" / "engine" / "decode.onnx").unlink()
    arguments = {"model_config": "{}", "model_repository": str(tmp_path / "m"), "model_version": "1", "model_name": "m"}
    with pytest.raises(pb.TritonModelException, match=r"decode\.onnx does not exist") as caught:
        text_model.TritonPythonModel().initialize(arguments)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def encoder(served: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    _, engine = vit_engine(tmp_path_factory, TOME)
    return load(array_model.TritonPythonModel(), engine, tmp_path_factory.mktemp("vit"))


def arrays(feed: np.ndarray) -> pb.Request:
    return pb.Request(("features",), image=feed)


def test_requests_of_one_shape_run_together(encoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    run = EncoderEngine.run

    def counted(self: EncoderEngine, feed: dict[str, np.ndarray], *rest: Any) -> dict[str, np.ndarray]:
        runs.append(len(feed["image"]))
        return run(self, feed, *rest)

    monkeypatch.setattr(EncoderEngine, "run", counted)
    feeds = [images(n)["image"] * (n + 1) for n in (1, 3, 2)]
    wrong = [pb.Request(("features",)), arrays(feeds[0][..., :5]), arrays(feeds[0].astype(np.float64))]
    made = encoder.execute([wrong[0], arrays(feeds[0]), wrong[1], *map(arrays, feeds[1:]), wrong[2]])
    assert runs == [6]
    for response, feed in zip([made[1], made[3], made[4]], feeds, strict=True):
        np.testing.assert_allclose(
            response.arrays["features"], run(encoder._engine, {"image": feed})["features"], rtol=1e-5, atol=1e-5
        )
    assert [made[i].error.code for i in (0, 2, 5)] == [pb.TritonError.INVALID_ARG] * 3


def test_a_request_that_breaks_the_run_fails_alone(encoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def picky(self: EncoderEngine, feed: dict[str, np.ndarray], *_: Any) -> dict[str, np.ndarray]:
        if (feed["image"] == 7).any():
            raise InputError("a seven")
        return {"features": feed["image"][:, 0, 0]}

    monkeypatch.setattr(EncoderEngine, "run", picky)
    feeds = [np.full((1, 3, 24, 24), value, np.float32) for value in (5, 7, 6)]
    made = encoder.execute([arrays(feed) for feed in feeds])
    assert made[1].error.message == "a seven." and not made[1].arrays
    assert [made[i].arrays["features"][0, 0] for i in (0, 2)] == [5, 6]


def test_a_tensor_of_one_number_a_row_has_a_size_more_in_the_server(
    encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Doubles:
        ports = {"x": Port(np.dtype(np.float32), ("batch",))}  # noqa: RUF012

        def run(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            assert feed["x"].ndim == 1
            return {"y": 2 * feed["x"]}

    monkeypatch.setattr(encoder, "_engine", Doubles())
    made = encoder.execute([pb.Request(("y",), x=np.array(rows, np.float32)) for rows in ([[1], [2]], [[3]], [[4, 5]])])
    assert [m.arrays["y"].tolist() for m in made[:2]] == [[[2], [4]], [[6]]] and made[2].error is not None


def test_without_a_batch_every_request_runs_alone() -> None:
    one = {"x": np.zeros((2, 3))}
    assert array_model.grouped([one, one], batches=False) == [[0], [1]]
    assert array_model.grouped([one, InputError("no"), one, {"x": np.zeros((9, 4))}], batches=True) == [[0, 2], [3]]

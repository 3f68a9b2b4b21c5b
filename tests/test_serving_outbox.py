"""The thread that talks to the server: everything in order, whatever one call does, and nothing is left behind."""

from __future__ import annotations

import threading

import pytest

from tests import fake_triton as pb
from trtpass.serving.answers import Answer
from trtpass.serving.outbox import Outbox
from trtpass.serving.request import Piece


def piece(text: str, last: bool = False) -> Piece:
    return Piece(text, (1,), "length" if last else None, 1, 1, 1.0)


def test_calls_are_made_in_order_on_a_thread_of_their_own_before_it_closes() -> None:
    outbox, gate, made, threads = Outbox(), threading.Event(), [], set()

    def call(number: int) -> None:
        gate.wait()
        made.append(number)
        threads.add(threading.current_thread().name)

    for number in range(100):
        outbox.put(call, number)
    assert made == [], "nobody has waited for them"
    gate.set()
    outbox.close()
    assert made == list(range(100)) and threads == {"outbox"}


def test_a_call_that_fails_is_logged_and_harms_no_other(caplog: pytest.LogCaptureFixture) -> None:
    outbox, made = Outbox(), []
    outbox.put(lambda: 1 / 0)
    outbox.put(made.append, 1)
    outbox.close()
    assert made == [1] and "ZeroDivisionError" in caplog.text


def test_an_answer_through_it() -> None:
    outbox, sender = Outbox(), pb.Sender()
    answer = Answer(pb, sender, True, outbox.put)
    answer.piece(piece("a"))
    answer.piece(piece("b", True))
    outbox.close()
    assert [r.arrays["text_output"][0] for r in sender.all()] == [b"a", b"b"]


def test_a_client_that_has_gone_is_seen_a_little_later() -> None:
    outbox, sender, gate = Outbox(), pb.Sender(), threading.Event()
    sender.cancelled = True
    answer = Answer(pb, sender, True, outbox.put)
    outbox.put(lambda: gate.wait() and None)
    assert not answer.gone(), "the server has not been asked yet"
    gate.set()
    outbox.close()
    assert answer.gone()


def test_a_piece_that_cannot_be_made_ends_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shared memory may be full: the client gets an error, and no answer with a hole."""

    def full(*_: object) -> None:
        raise MemoryError("no shared memory")

    sender = pb.Sender()
    answer = Answer(pb, sender, True)
    answer.piece(piece("a"))
    with monkeypatch.context() as patch:
        patch.setattr(answer, "_response", full)
        answer.piece(piece("b"))
    answer.piece(piece("c", True))
    assert answer.gone()
    first, error = sender.all()
    assert first.arrays["text_output"][0] == b"a"
    assert error.error is not None and error.error.code == pb.TritonError.INTERNAL

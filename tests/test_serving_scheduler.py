"""The scheduler: every answer is the one that its request gets alone, in order, whatever else goes on or wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from families import Exported
from paged_proofs import paged_engine, save_surrogate
from proofs import raised
from serving_fakes import STOP, TOKENIZER, VOCAB, Client, FakeBatch, Recorder, RowError, alone, logits_after
from serving_fakes import random_request as make

from trtpass import passes
from trtpass.errors import InputError
from trtpass.pages import CacheFull
from trtpass.passes.cache import insert_cache
from trtpass.passes.cache_policy import CachePolicy
from trtpass.passes.lower import lower
from trtpass.runtime import Engine
from trtpass.serving.batch import Batch
from trtpass.serving.observer import Observer
from trtpass.serving.open_batch import open_batch
from trtpass.serving.request import Cancelled, Limits, OverLimit, Refused, Request
from trtpass.serving.scheduler import Scheduler
from trtpass.text import AnswerText

WAIT = 30.0  # seconds until a test fails that would hang
LIMITS = Limits(rows=4, queue=100, prompt_tokens=64, new_tokens=64)
PLAIN = Request((1, 2, 3), 8)
BUSY = Request((7, 7), 60, temperature=2.0)


@contextmanager
def scheduler(
    batch: Batch, limits: Limits = LIMITS, observer: Observer | None = None, stop_ids: Sequence[int] = (STOP,)
) -> Iterator[Scheduler]:
    """Not started. At its end nothing may be left in the batch, and the thread must have ended."""
    made = Scheduler(batch, TOKENIZER, stop_ids, limits, observer or Observer())
    try:
        yield made
    finally:
        made.close()
    assert batch.running == 0 and batch.pages_held == 0
    assert not made._thread.is_alive()


def answers(
    batch: Batch, requests: Sequence[Request], clients: Sequence[Client], observer: Observer | None = None,
    limits: Limits = LIMITS,
) -> None:  # fmt: skip
    """Submit all, then start, and wait for all to end."""
    with scheduler(batch, limits, observer) as made:
        for request, client in zip(requests, clients, strict=True):
            made.submit(request, client)
        made.start()
        assert made.drain(WAIT)


def calls(batch: FakeBatch, *names: str) -> list[str]:
    return [call for call, *_ in batch.log if call in names]


@pytest.mark.parametrize("seed", range(40))
def test_every_answer_is_the_one_alone(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pages = int(rng.choice([0, 7, 12]))
    batch = FakeBatch(int(rng.integers(1, 6)), capacity=int(rng.choice([1000, 24])), pages=pages)
    requests = [make(rng) for _ in range(18)]
    clients = [Client(int(rng.integers(0, 12)) if rng.random() < 0.25 else None) for _ in requests]
    seen = Recorder()
    with scheduler(batch, observer=seen) as made:
        made.start()

        def send(part: int) -> None:
            for request, client in list(zip(requests, clients, strict=True))[part::3]:
                made.submit(request, client)

        threads = [threading.Thread(target=send, args=(part,)) for part in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert made.drain(WAIT)
    for request, client in zip(requests, clients, strict=True):
        text, tokens, finish = alone(request, batch.capacity, pages)
        assert client.ended.is_set()
        if client.errors:
            (error,) = client.errors
            assert isinstance(error, Cancelled) and client.gives_up is not None
            assert tokens[: len(client.pieces)] == client.answer[1] and text.startswith(client.answer[0])
            continue
        assert client.answer == (text, tokens, finish)
        assert [p.completion_tokens for p in client.pieces][-1] == len(tokens)
        assert all(p.text or p.tokens or p.finish for p in client.pieces)
        assert all(p.prompt_tokens == len(request.prompt) and 0 < p.kept <= 1 for p in client.pieces)
        for at, piece in enumerate(client.pieces):
            assert (piece.logits is not None) == (request.logits and at == 0)
        if request.logits:
            np.testing.assert_array_equal(client.pieces[0].logits, logits_after(request.prompt))
    ended = [finish for finish, *_ in seen.all("ended")]
    assert (
        len(ended)
        == len(requests)
        == len(seen.all("started"))
        + ended.count("cancelled")
        - sum(bool(client.errors and client.pieces) for client in clients)
    )
    assert ended.count("cancelled") == sum(bool(client.errors) for client in clients) and "failed" not in ended
    assert seen.all("state")[-1][:3] == [0, 0, 0]


def test_the_workloads_meet_every_end_and_pause_rows() -> None:
    """Of those above: or they would show little."""
    finishes, paused = set[str](), 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        batch, seen = FakeBatch(4, capacity=24 if seed % 2 else 1000, pages=7), Recorder()
        requests = [make(rng) for _ in range(18)]
        answers(batch, requests, [Client() for _ in requests], seen)
        finishes |= {finish for finish, *_ in seen.all("ended")}
        paused += len(seen.all("paused"))
    assert finishes == {"stop", "length", "context", "cache"} and paused > 10


def test_requests_join_in_order_one_between_two_steps() -> None:
    batch = FakeBatch(3)
    requests = [replace(make(np.random.default_rng(i)), max_tokens=6, stop=()) for i in range(12)]
    answers(batch, requests, [Client() for _ in requests])
    joined = [entry[2] for entry in batch.log if entry[0] == "join"]
    assert joined == [request.prompt for request in requests]
    order = calls(batch, "join", "step")
    assert ("join", "join") not in pairwise(order)
    assert max(len(entry[1]) for entry in batch.log if entry[0] == "step") == 3


def test_a_request_that_does_not_fit_waits_and_none_passes_it() -> None:
    batch = FakeBatch(4, pages=10)
    long, short = Request((1,) * 28, 2), Request((2,), 2)
    clients = [Client() for _ in range(3)]
    answers(batch, [Request((3,) * 20, 8), long, short], clients)
    joined = [entry[2] for entry in batch.log if entry[0] == "join"]
    assert joined == [(3,) * 20, long.prompt, short.prompt]
    assert [client.answer[2] for client in clients] == ["length"] * 3
    assert batch.full == 1, "a prompt is not read again before a row has left"


@pytest.mark.parametrize("seed", range(8))
def test_the_newest_row_is_paused_and_goes_on_before_new_ones(seed: int) -> None:
    rng = np.random.default_rng(seed)
    batch, seen = FakeBatch(4, pages=12), Recorder()
    requests = [replace(make(rng), max_tokens=25, stop=()) for _ in range(10)]
    clients = [Client() for _ in requests]
    answers(batch, requests, clients, seen)
    running, paused = list[int](), list[tuple[int, ...]]()  # rows, oldest first; tokens of those that are out
    left = True  # whether a row has left since one was paused
    for call, row, *tokens in batch.log:
        if call == "pause":
            assert row == running.pop() and running, "the newest row, and not the only one"
            paused.append(tokens[0])
            left = False
        elif call == "resume":
            assert left, "nothing can have come free"
            assert tokens[0] == paused.pop(), "the newest was paused first, and the oldest goes on first"
            running.append(row)
        elif call == "join":
            assert not paused, "who came before goes on before"
            running.append(row)
        elif call == "leave":
            running.remove(row)
            left = True
    assert not paused and not running
    assert len(seen.all("paused")) == len(calls(batch, "pause")) > 0
    assert batch.full <= 2 * len(requests) + len(seen.all("paused")), "it is not tried again and again"
    assert [client.answer for client in clients] == [alone(request, pages=12) for request in requests]


def test_the_queue_has_an_end() -> None:
    batch, seen = FakeBatch(2), Recorder()
    with scheduler(batch, Limits(rows=2, queue=3, prompt_tokens=64, new_tokens=64), seen) as made:
        clients = [Client() for _ in range(5)]
        for client in clients:
            made.submit(PLAIN, client)
        with pytest.raises(Refused, match="5 requests run or wait"):
            made.submit(PLAIN, Client())
        made.start()
        assert all(client.ended.wait(WAIT) for client in clients)
        assert made.drain(WAIT)
        with pytest.raises(Refused, match="shutting down"):
            made.submit(PLAIN, Client())
    assert seen.all("refused") == [["queue"], ["closing"]]


@pytest.mark.parametrize(
    ("request_", "reason", "message"),
    [
        (Request((), 4), "input", "without tokens"),
        (Request((1,) * 65, 4), "limit", "a prompt of 65 tokens"),
        (Request((1,), 0), "input", "max_tokens=0"),
        (Request((1,), 65), "limit", "max_tokens=65"),
        (Request((1,), 4, temperature=float("nan")), "input", "temperature=nan"),
        (Request((1,), 4, top_p=float("nan")), "input", "top_p=nan"),
        (Request((1,), 4, seed=-1), "input", "seed=-1"),
        (Request((1,), 4, stop=("x",) * 17), "input", "17 stop texts"),
        (Request((1,), 4, stop=("",)), "input", "0 characters"),
    ],
)
def test_requests_out_of_bounds(request_: Request, reason: str, message: str) -> None:
    seen = Recorder()
    with scheduler(FakeBatch(2), observer=seen) as made:
        with pytest.raises(InputError, match=message) as caught:
            made.submit(request_, Client())
        assert isinstance(caught.value, OverLimit) == (reason == "limit")
    assert seen.all("refused") == [[reason]] and not seen.all("ended")


def test_a_prompt_that_fits_may_ask_for_more_than_there_is_room() -> None:
    client, over = Client(), Client()
    with scheduler(FakeBatch(2, capacity=10), stop_ids=()) as made:
        made.submit(Request((1,) * 10, 60), over)
        made.submit(Request((1,) * 7, 60), client)
        with pytest.raises(OverLimit, match="at most 10"):
            made.submit(Request((1,) * 11, 1), Client())
        made.start()
        assert made.drain(WAIT)
    assert (len(client.answer[1]), client.answer[2]) == (4, "context")
    assert (len(over.answer[1]), over.answer[2]) == (1, "context")


def test_a_prompt_that_can_never_fit_fails_and_names_the_pages() -> None:
    seen, clients = Recorder(), [Client(), Client()]
    answers(FakeBatch(2, pages=3), [Request((1,) * 13, 4), PLAIN], clients, seen)
    (error,) = clients[0].errors
    assert isinstance(error, CacheFull) and "4 pages wanted" in str(error)
    assert clients[1].answer == alone(PLAIN)
    assert sorted(finish for finish, *_ in seen.all("ended"))[0] == "failed"


def test_ids_outside_the_vocabulary_fail_their_request_alone() -> None:
    clients = [Client() for _ in range(3)]
    answers(FakeBatch(2), [PLAIN, Request((VOCAB,), 4), PLAIN], clients)
    assert [str(error) for error in clients[1].errors] == [str(InputError("token id 24", "0 to 23"))]
    assert clients[0].answer == clients[2].answer == alone(PLAIN)


def broken(what: str, when: Callable[[Sequence[int]], bool], error: Exception) -> Callable[[str, Sequence[int]], None]:
    """Raises once, at a call of that name for tokens like that."""
    left = [error]

    def fail(call: str, tokens: Sequence[int]) -> None:
        if left and call == what and when(tokens):
            raise left.pop()

    return fail


@pytest.mark.parametrize("error", [RuntimeError("broken"), InputError("the decode graph failed"), MemoryError()])
def test_a_step_that_fails_ends_its_rows_and_nothing_else(error: Exception) -> None:
    batch, seen = FakeBatch(2), Recorder()
    batch.fail = broken("step", lambda tokens: len(tokens) == 4, error)
    clients = [Client() for _ in range(4)]
    answers(batch, [PLAIN] * 4, clients, seen)
    failed = [client for client in clients if client.errors]
    assert failed == clients[: len(failed)] and 1 <= len(failed) <= 2
    assert all(client.errors == [error] for client in failed)
    assert all(client.answer == alone(PLAIN) for client in clients[len(failed) :])
    assert [finish for finish, *_ in seen.all("ended")].count("failed") == len(failed)


def test_a_row_that_fails_leaves_the_others_alone() -> None:
    batch = FakeBatch(3)
    batch.fail = broken("step", lambda tokens: tokens[0] == 9 and len(tokens) == 6, RowError(2))
    requests = [Request((5, 6), 20), Request((9, 9), 20, temperature=2.0, seed=3), Request((4,), 20)]
    assert len(alone(requests[1])[1]) > 5
    clients = [Client() for _ in requests]
    answers(batch, requests, clients)
    assert [str(error) for error in clients[1].errors] == [str(RowError(2))] and len(clients[1].pieces) == 5
    for at in (0, 2):
        assert clients[at].answer == alone(requests[at])


def test_a_join_that_breaks_fails_its_request_alone() -> None:
    batch = FakeBatch(3)
    batch.fail = broken("join", lambda tokens: tokens[0] == 9, RuntimeError("broken"))
    clients = [Client() for _ in range(3)]
    answers(batch, [PLAIN, Request((9,), 4), PLAIN], clients)
    assert [str(error) for error in clients[1].errors] == ["broken"]
    assert clients[0].answer == clients[2].answer == alone(PLAIN)


def test_a_listener_that_raises_loses_its_request_alone() -> None:
    class Lost(Client):
        def gone(self) -> bool:
            raise OSError("no answer")

    class Deaf(Client):
        def piece(self, piece: object) -> None:
            raise OSError("not now")

        def failed(self, error: Exception) -> None:
            super().failed(error)
            raise OSError("not that either")

    seen = Recorder()
    last = len(alone(PLAIN)[1]) - 1
    clients = [Client(), Client(raises=2), Lost(), Client(raises=last), Deaf(), Client()]
    answers(FakeBatch(3), [PLAIN] * 6, clients, seen)
    assert clients[0].answer == clients[5].answer == alone(PLAIN)
    assert [str(client.errors) for client in clients[1:5]] == [
        "[RuntimeError('the client broke')]", "[OSError('no answer')]", "[RuntimeError('the client broke')]",
        "[OSError('not now')]",
    ]  # fmt: skip
    assert [finish for finish, *_ in seen.all("ended")].count("failed") == 4


def test_an_observer_that_raises_changes_nothing() -> None:
    class Broken(Observer):
        def __getattribute__(self, name: str) -> Callable[..., None]:
            def fail(*values: object) -> None:
                raise ValueError(name)

            return fail

    clients = [Client() for _ in range(5)]
    answers(FakeBatch(2, pages=4), [PLAIN] * 5, clients, Broken())
    assert all(client.answer == alone(PLAIN) for client in clients)


def test_who_gives_up_frees_its_row_or_its_place() -> None:
    batch, seen = FakeBatch(1), Recorder()
    with scheduler(batch, observer=seen) as made:
        first, second, third = Client(gives_up=3), Client(gives_up=0), Client()
        for client in (first, second, third):
            made.submit(BUSY if client is first else PLAIN, client)
        made.start()
        assert made.drain(WAIT)
    assert [len(client.pieces) for client in (first, second)] == [3, 0]
    assert all(isinstance(client.errors[0], Cancelled) for client in (first, second))
    assert third.answer == alone(PLAIN)
    assert calls(batch, "join", "leave") == ["join", "leave"] * 2
    assert sorted(ended[:2] for ended in seen.all("ended"))[:2] == [["cancelled", 0], ["cancelled", 3]]


def test_draining_and_closing() -> None:
    batch, seen = FakeBatch(1), Recorder()
    step, go = threading.Event(), threading.Event()

    def hold(call: str, tokens: Sequence[int]) -> None:
        if call == "step":
            step.set()
            assert go.wait(WAIT)

    batch.fail = hold
    with scheduler(batch, observer=seen, stop_ids=()) as made:
        clients = [Client(), Client()]
        for client in clients:
            made.submit(PLAIN, client)
        made.start()
        assert step.wait(WAIT)
        assert not made.drain(0) and not any(client.ended.is_set() for client in clients)
        with pytest.raises(Refused, match="shutting down"):
            made.submit(PLAIN, Client())
        closer = threading.Thread(target=made.close)
        closer.start()
        go.set()
        closer.join(WAIT)
        assert not closer.is_alive()
        made.close()
    for client in clients:
        (error,) = client.errors
        assert isinstance(error, Refused) and "shutting down" in str(error)
    assert 1 <= len(clients[0].pieces) < 8 and not clients[1].pieces
    assert seen.all("state")[-1][:2] == [0, 0] and len(seen.all("ended")) == 2


def test_closing_before_starting() -> None:
    with scheduler(FakeBatch(1)) as made:
        client = Client()
        made.submit(PLAIN, client)
    assert isinstance(client.errors[0], Refused)


def test_nothing_turns_while_nothing_is_to_do() -> None:
    seen = Recorder()
    with scheduler(FakeBatch(2), observer=seen, stop_ids=()) as made:
        made.start()
        for turn in (1, 2):
            client = Client()
            made.submit(PLAIN, client)
            assert client.ended.wait(WAIT)
            for _ in range(3000):  # work enough for a loop without rest to show itself
                with pytest.raises(InputError):
                    made.submit(Request((), 1), Client())
            assert len(seen.all("state")) == 7 * turn, "8 tokens, of which the prompt gives one and each turn one"


def test_what_the_observer_hears_of_one_request() -> None:
    seen = Recorder()
    with scheduler(FakeBatch(2), observer=seen, stop_ids=()) as made:
        client = Client()
        made.submit(PLAIN, client)
        made.start()
        assert made.drain(WAIT)
    names = [name for name, *_ in seen.said if name != "state"]
    assert names == ["started", "first_token", *["stepped"] * 7, "ended"]
    ((queued, prompt),), ((first,),) = seen.all("started"), seen.all("first_token")
    ((finish, tokens, seconds, kept),) = seen.all("ended")
    assert prompt == 3 and 0 <= queued <= first <= seconds and (finish, tokens) == ("length", 8)
    assert kept == pytest.approx(1 / 10) and [rows for rows, _ in seen.all("stepped")] == [1] * 7
    assert seen.all("state")[0] == [0, 1, 0, 0, 32, pytest.approx(1 / 4)]


@pytest.fixture(scope="module")
def engines(tiny_export: Callable[[str], Exported], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Engine]:
    """Vocabulary 128; the context of the dense one is 96."""
    plain = raised(tiny_export("llama"))
    policy = passes.parse(
        f"kvzap:threshold=0,window=12,weights={save_surrogate(tmp_path_factory.mktemp('scheduler') / 'w.safetensors')}"
    )
    assert isinstance(policy, CachePolicy)
    graphs = {phase: lower(insert_cache(plain, phase), "cpu").model for phase in ("prefill", "decode")}
    return {"dense": Engine.open(graphs, threads=1, context=96), "kvzap": paged_engine(plain, policy, page=8)}


def generated(engine: Engine, request: Request) -> tuple[str, list[int], str]:
    """The answer of the runtime to one request."""
    text, whole, made = AnswerText(TOKENIZER, request.stop), "", list[int]()
    for step in engine.generate(
        [request.prompt], request.max_tokens, [STOP], request.temperature, request.seed, None, request.top_p,
        lambda row, token: text.push(token),
    ):  # fmt: skip
        made.append(int(step.tokens[0] or 0))
        reason = step.stopped[0]
        if reason:
            break
    assert reason
    whole, finish = text.finish(reason)
    return whole, made, finish


@pytest.mark.parametrize(("kind", "pages"), [("dense", None), ("kvzap", None), ("kvzap", 30)])
def test_many_at_once_are_what_the_runtime_generates_alone(
    engines: dict[str, Engine], kind: str, pages: int | None
) -> None:
    engine, rng, seen = engines[kind], np.random.default_rng(7), Recorder()
    requests = [
        Request(
            prompt=tuple(rng.integers(0, 128, length).tolist()), max_tokens=24,
            stop=tuple(chr(rng.integers(97, 123)) for _ in range(i % 3)),
            temperature=(0.0, 0.8, 1.5)[i % 3], top_p=(1.0, 0.9)[i % 2], seed=i,
        )
        for i, length in enumerate([3, 88, 40, 1, 61, 17, 90, 30, 9, 55, 24, 80])
    ]  # fmt: skip
    clients = [Client() for _ in requests]
    limits = Limits(rows=5, prompt_tokens=90, new_tokens=24, pages=pages)
    answers(open_batch(engine, limits), requests, clients, seen, limits)
    expected = [generated(engine, request) for request in requests]
    assert [client.answer for client in clients] == expected
    assert {finish for *_, finish in expected} == {"stop", "length"} | ({"context"} if kind == "dense" else set())
    assert bool(seen.all("paused")) == (pages is not None)
    assert max(rows for rows, _ in seen.all("stepped")) >= 4
    assert seen.all("state")[-1][2] == seen.all("state")[-1][4] == 0

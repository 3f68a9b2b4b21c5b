"""Many clients at once: every answer is the runtime's, and nothing stays behind."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import psutil
import pytest
from tiny_engines import CONTEXT, tiny_engine

from tests.serve_clients import WAYS, Alone, Ask, Numbers, Way, answer, begin, check_begins, check_same, stub
from tests.served import Served, killed, needed, until
from trtpass.deploy.repository import Request as Deployment
from trtpass.deploy.repository import deploy
from trtpass.generate import generate
from trtpass.server.process import Server

pytestmark = pytest.mark.server

MODELS = ("dense", "sparse", "kvzap")
CLIENTS, REQUESTS = 16, 500
PROMPT = "once upon a time there was a cache, and it was full"
GROWTH = 2 << 20  # bytes that a model's process may grow by in 375 requests: the allocator's own doing
T = TypeVar("T")


@pytest.fixture(scope="module")
def alone(served: Served) -> Alone:
    return Alone(served.engines)


def at_once(clients: int, call: Callable[[T], None], work: Iterable[T]) -> None:
    """So many threads share the work; the first failure is raised."""
    with ThreadPoolExecutor(clients) as pool:
        for done in [pool.submit(call, one) for one in work]:
            done.result()


def random_ask(chance: random.Random, models: Sequence[str] = MODELS) -> Ask:
    length = chance.randint(1, 60)
    text = "".join(chance.choices("abcdefgh \N{LATIN SMALL LETTER E WITH ACUTE}", k=length // 2 + 1))
    return Ask(
        chance.choice(models),
        chance.choice([text, tuple(chance.choices(range(256), k=length))]),
        chance.choice([chance.randint(1, 20), chance.randint(60, CONTEXT)]),
        chance.choice([(), ("a",), ("zz", "\N{REPLACEMENT CHARACTER}" * 3)]),
        chance.choice([0.0, 0.0, 0.7, 1.5]),
        chance.choice([1.0, 0.9]),
        chance.choice([0, 7, 2**63 - 1]),
    )


@pytest.mark.parametrize("model", MODELS)
def test_an_answer_alone_is_that_of_trtpass_generate(served: Served, model: str) -> None:
    """Greedy and sampled, with a stop text that the answer has and with one that it has not."""
    asks = [Ask(model, PROMPT, 30), Ask(model, PROMPT, 24, (), 0.9, 0.8, 3), Ask(model, PROMPT, 24, (), 0.9, 0.8, 4)]
    texts = [answer(served.process, ask, "generate").text for ask in asks]
    assert len(set(texts)) == 3  # a seed is a stream of its own
    asks += [
        Ask(model, PROMPT, 30, ("not there", texts[0][9:12])),
        Ask(model, PROMPT, 24, (texts[1][-1],), 0.9, 0.8, 3),
    ]
    for ask in asks:
        [right] = generate(served.engines[model], [PROMPT], threads=1, **ask.options)
        for way in WAYS:
            found = answer(served.process, ask, way)
            assert (found.text, list(found.tokens), found.finish) == (right["text"], right["tokens"], right["stopped"])
            assert (found.prompt_tokens, found.completion_tokens) == (right["prompt_tokens"], len(right["tokens"]))
            assert abs(found.kept - right.get("cache", {"kept": 1})["kept"]) < 1e-4
        assert (right["stopped"] == "stop") == bool(ask.stop)


@pytest.mark.parametrize("model", MODELS)
def test_sixteen_clients_of_different_lengths(served: Served, alone: Alone, model: str) -> None:
    asks = [
        Ask(model, tuple((7 * i + k) % 256 for k in range(1 + 5 * i)), 60, (), (i % 2) * 1.2, 0.95, i)
        for i in range(CLIENTS)
    ]
    expected = [alone.answer(ask) for ask in asks]
    before, barrier = Numbers(served.process), threading.Barrier(CLIENTS)

    def one(i: int) -> None:
        barrier.wait()
        check_same(answer(served.process, asks[i], WAYS[i % 3]), expected[i])

    at_once(CLIENTS, one, range(CLIENTS))
    after = Numbers(served.process)

    def grown(name: str) -> float:
        return after.of(name, model) - before.of(name, model)

    made = sum(len(right.tokens) for right in expected)
    assert grown("trtpass_prefill_tokens_total") == sum(len(ask.prompt) for ask in asks)
    assert grown("trtpass_decode_tokens_total") == made - CLIENTS  # the first token of each is the prompt's
    assert grown("trtpass_time_per_output_token_seconds_count") < (made - CLIENTS) / 2  # they did run together
    assert grown("trtpass_time_to_first_token_seconds_count") == grown("trtpass_queue_seconds_count") == CLIENTS


class Footprint(NamedTuple):
    """Of a process when nothing runs."""

    bytes: int
    files: int
    threads: int

    @classmethod
    def of(cls, process: psutil.Process) -> Footprint:
        return cls(process.memory_info().rss, process.num_fds(), process.num_threads())


class Visit(NamedTuple):
    """One request of the load, and after how many pieces its client hangs up; None: it stays."""

    ask: Ask
    way: Way
    pieces: int | None


def test_500_requests_and_clients_that_hang_up(served: Served, alone: Alone) -> None:
    chance, server = random.Random(20), served.process
    pool = [random_ask(chance) for _ in range(60)]
    for ask in pool:
        alone.answer(ask)
    visits = [
        Visit(chance.choice(pool), chance.choice(WAYS), chance.choice([None, None, chance.randint(1, 5)]))
        for _ in range(REQUESTS)
    ]
    models = [stub(server, model) for model in MODELS]
    watched = [*models, psutil.Process(server.pid)]

    def visit(one: Visit) -> None:
        right = alone.answer(one.ask)
        if one.pieces is None:
            check_same(answer(server, one.ask, one.way), right)
        else:
            check_begins(begin(server, one.ask, one.way, one.pieces), right)

    def idle() -> bool:
        return Numbers(server).idle(MODELS)

    until(idle, "an idle server")
    before = Numbers(server)
    at_once(CLIENTS, visit, visits[: REQUESTS // 4])
    until(idle, "an idle server after a quarter")
    quarter = [Footprint.of(process) for process in watched]
    at_once(CLIENTS, visit, visits[REQUESTS // 4 :])
    until(idle, "an idle server after all")

    def ended(model: str) -> Counter[str]:
        return Counter(Numbers(server).ended(model)) - Counter(before.ended(model))

    sent = Counter(one.ask.model for one in visits)
    until(lambda: all(ended(model).total() == sent[model] for model in MODELS), "the end of every request")
    every = sum((ended(model) for model in MODELS), Counter[str]())
    whole = Counter(alone.answer(one.ask).finish for one in visits if one.pieces is None)
    assert set(every) == {"stop", "length", "context", "cancelled"}
    assert all(every[finish] >= whole[finish] for finish in ("stop", "length", "context"))
    assert every["cancelled"] >= 10  # of about 165 that hung up; the others had been answered by then
    assert all(Numbers(server).refused(model) == before.refused(model) for model in MODELS)

    for process, then in zip(watched, quarter, strict=True):
        until(lambda: process.num_fds() <= then.files, f"files that {process} closes")  # noqa: B023
        assert Footprint.of(process).bytes - then.bytes < GROWTH, (process, then)
    assert all(Footprint.of(model).threads <= then.threads for model, then in zip(models, quarter, strict=False))
    assert models == [stub(server, model) for model in MODELS]  # none has died in between


@pytest.fixture(scope="module")
def short_of_pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """``few``: pages for one row, or for some that share them. ``fewer``: not even for one whole row."""
    needed()
    engine, folder = tiny_engine(tmp_path_factory, "kvzap"), tmp_path_factory.mktemp("pages")
    for name, pages in (("few", 26), ("fewer", 12)):
        deploy(Deployment(engine, folder, name, rows=8, pages=pages, threads=1))
    with killed(Server(folder)) as server:
        yield server


def test_rows_that_wait_for_pages(short_of_pages: Server, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Rows are paused and go on; with clients that hang up while they are paused, too."""
    server, chance = short_of_pages, random.Random(21)
    alone = Alone({"few": tiny_engine(tmp_path_factory, "kvzap")})
    asks = [random_ask(chance, ["few"]) for _ in range(24)]
    for ask in asks:
        alone.answer(ask)

    def one(i: int) -> None:
        ask, way = asks[i % len(asks)], WAYS[i % 3]
        if i % 5:
            check_same(answer(server, ask, way), alone.answer(ask))
        else:
            check_begins(begin(server, ask, way, 1), alone.answer(ask))

    at_once(CLIENTS, one, range(96))
    until(lambda: Numbers(server).idle(["few"]), "an idle server")
    until(lambda: sum(Numbers(server).ended("few").values()) == 96, "the end of every request")
    numbers = Numbers(server)
    assert numbers.of("trtpass_paused_total", "few") > 0
    assert numbers.of("trtpass_pages", "few") == 2 * 26  # of two layers
    assert not numbers.ended("few")["cache"] and not numbers.ended("few")["failed"]


@pytest.mark.parametrize("way", WAYS)
def test_an_answer_that_the_pages_end(
    short_of_pages: Server, tmp_path_factory: pytest.TempPathFactory, way: Way
) -> None:
    engine = tiny_engine(tmp_path_factory, "kvzap")
    ask = Ask("fewer", PROMPT, 90)
    [right] = generate(engine, [PROMPT], threads=1, pages=12, **ask.options)
    found = answer(short_of_pages, ask, way)
    assert right["stopped"] == found.finish == "cache" and list(found.tokens) == right["tokens"]
    assert found.text == right["text"] and len(found.tokens) == found.completion_tokens > 0
    until(lambda: Numbers(short_of_pages).idle(["fewer"]), "pages that return")

"""Benchmarks of a server at toy size: what they report, and that nothing is reported for wrong answers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import nullcontext
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_engines import tiny_engine
from typer.testing import CliRunner

from tests.served import needed
from trtpass import bench
from trtpass.bench import measure, serve, serve_load, serve_overhead
from trtpass.bench.record import Record
from trtpass.bench.serve_load import Prompt, Round, Timed
from trtpass.errors import CheckFailed, InputError
from trtpass.manifest import Manifest
from trtpass.runtime import Engine
from trtpass.server import client
from trtpass.server.process import Server
from trtpass.text import Tokenizer

MACHINE = measure.Machine("a processor", 1, 1, "1", 100.0, 0.0)
TEXT = "".join(f"Sentence {i} of a text. " for i in range(2000))  # a token a byte
PLAN = serve.Plan((1, 2), (2, 3), (8, 40), 4, 2, serve_overhead.Plan(2, (16,), 4, 1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Dense and sparse, beside each other as those of one model are."""
    home = tmp_path_factory.mktemp("engines") / serve.MODEL
    home.mkdir()
    made = [home / "dense.cpu", home / "token-sparse.cpu"]
    for folder, name in zip(made, ("dense", "sparse"), strict=True):
        folder.symlink_to(tiny_engine(tmp_path_factory, name))
    return made


@pytest.fixture(scope="module")
def given(folders: list[Path]) -> list[Prompt]:
    return serve_load.prompts(Tokenizer.open(folders[0]), TEXT, PLAN.lengths, 3)


@pytest.fixture(scope="module")
def server(folders: list[Path], given: list[Prompt]) -> Iterator[Server]:
    needed()
    with serve.served(folders, PLAN, given, 1) as running:
        yield running


@pytest.fixture
def measured(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """``serve.run`` on the server that runs already."""
    monkeypatch.setattr(serve, "served", lambda *_: nullcontext(server))
    monkeypatch.setattr(serve, "text_corpus", lambda: TEXT)


def quiet(_: str) -> None: ...


def timed(tokens: tuple[int, ...], first: float, gaps: tuple[float, ...]) -> Timed:
    return Timed(0, tokens, first, gaps)


@pytest.mark.server
@pytest.mark.usefixtures("measured")
def test_all(folders: list[Path]) -> None:
    records = serve.run(serve.NAMES, folders, MACHINE, 2, quiet, PLAN)
    dense, sparse = (folder.name for folder in folders)
    rates = [r for r in records if r.name == "serve.throughput"]
    assert [(r.params["clients"], r.params["engine"]) for r in rates] == [
        (1, dense), (1, sparse), (2, dense), (2, sparse)
    ]  # fmt: skip
    for record in rates:
        requests = record.params["load"]["requests"]
        assert requests == (2 if record.params["clients"] == 1 else 3)
        rounds = record.value / 4  # requests a second, from tokens a second
        assert record.params["requests/s"] == pytest.approx(rounds, rel=1e-2)
        prompt = {2: 48, 3: 56}[requests]
        assert record.params["total tokens/s"] == pytest.approx(rounds * (prompt / requests + 4), rel=1e-2)
        assert set(record.params["cores"]) == {"model", "server", "clients", "others"}
        assert (record.baseline_value is None) == (record.params["engine"] == dense)
    assert rates[1].baseline_value == rates[0].value and rates[1].ratio_min <= rates[1].ratio <= rates[1].ratio_max  # type: ignore[operator]
    waits = [r for r in records if r.name == "serve.latency"]
    assert len(waits) == 4 * 4 and {r.params["wait for"] for r in waits} == {"first token", "next token"}
    for median, worst in zip(waits[::2], waits[1::2], strict=True):
        assert (median.params["percentile"], worst.params["percentile"]) == (50, 99)
        assert 0 < median.value <= worst.value
    over = [r for r in records if r.name == "serve.overhead"]
    assert [(r.params["side"], r.baseline) for r in over] == [
        ("server", serve_overhead.SCHEDULER), ("server", serve_overhead.GENERATE),
        ("scheduler", serve_overhead.GENERATE),
    ]  # fmt: skip
    for record in over:
        assert record.limit == 1.0 and record.ratio == pytest.approx(
            1 / (1 + record.params["overhead %"] / 100), rel=1e-3
        )
    assert len(rates) + len(waits) + len(over) == len(records)
    console = Console(width=200, record=True, file=StringIO())
    console.print(bench.render(records))
    assert "the server costs nothing" in console.export_text()


@pytest.mark.server
def test_models_do_not_stop_by_themselves(server: Server, folders: list[Path]) -> None:
    for folder in folders:
        assert Manifest.read(server.repository / folder.name / "1" / "engine").stop_ids == []


@pytest.mark.server
@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("names", [["serve.throughput"], ["serve.overhead"]])
def test_wrong_answers_are_red(folders: list[Path], names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is right and the runtime is not: one of them is wrong."""

    def spoiled(self: Engine, *rest: Any) -> Any:
        steps = list(generate(self, *rest))
        steps[2] = dataclasses.replace(steps[2], tokens=tuple(255 - (token or 0) for token in steps[2].tokens))
        return steps

    generate = Engine.generate
    monkeypatch.setattr(Engine, "generate", spoiled)
    said: list[str] = []
    with pytest.raises(CheckFailed, match="token 2 of the answer"):
        serve.run(names, folders, MACHINE, 1, said.append, PLAN)
    assert not any("round" in line for line in said), "before anything is timed"


@pytest.mark.server
def test_wrong_answers_of_a_timed_round_are_red(server: Server, folders: list[Path], given: list[Prompt]) -> None:
    side = serve._side(server, folders[0], given, PLAN, 1, quiet)
    right = side.expected[1]
    serve._ask(server, side, given, 2, 4, range(3))
    wrong = dataclasses.replace(side, expected={1: (*right[:3], 255 - right[3])})
    with pytest.raises(CheckFailed, match="prompt 1: token 3 of the answer"):
        serve._ask(server, wrong, given, 2, 4, range(3))


@pytest.mark.server
def test_answers_that_are_not_whole_are_red(
    server: Server, folders: list[Path], given: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = client.stream_grpc
    monkeypatch.setattr(client, "stream_grpc", lambda *a, **k: list(stream(*a, **k))[1:])
    with pytest.raises(CheckFailed, match="an answer of 3 tokens that ends with 'length'"):
        serve_load.closed_loop(server, folders[0].name, given, 1, 4, [0])


@pytest.mark.server
def test_a_refused_request_is_an_error(server: Server, folders: list[Path], given: list[Prompt]) -> None:
    with pytest.raises(InputError, match="max_tokens=5"):
        serve_load.closed_loop(server, folders[0].name, given, 2, 5, range(3))


def test_a_round() -> None:
    made = Round(2.0, (timed((1, 2, 3), 0.5, (0.1, 0.3)), timed((4, 5), 1.5, (0.2,))), {"model": 3.0})
    assert made.tokens == 5
    assert made.quantile("first", 50) == pytest.approx(1000) and made.quantile("gaps", 50) == pytest.approx(200)
    assert made.quantile("gaps", 100) == pytest.approx(300)
    assert serve_load.cores([made]) == {"model": 1.5}


def test_prompts_have_their_lengths(given: list[Prompt]) -> None:
    assert [len(prompt.ids) for prompt in given] == [8, 40, 8]
    assert "".join(prompt.text for prompt in given) == TEXT[serve_load.START :][:56]


def test_a_text_that_is_too_short(folders: list[Path]) -> None:
    with pytest.raises(InputError, match="at least 50000"):
        serve_load.prompts(Tokenizer.open(folders[0]), TEXT, [50_000], 1)


def test_names_that_a_model_can_have() -> None:
    assert (
        serve_load.model_name(Path("a/token-sparse_coverage=0.3,layers=all.cpu"))
        == "token-sparse_coverage-0.3-layers-all.cpu"
    )
    assert len(serve_load.model_name(Path("a" * 100))) == 64


class TestEngines:
    def test_the_dense_one_comes_first(self, folders: list[Path], tmp_path: Path) -> None:
        assert serve.find(folders[::-1], tmp_path) == folders
        assert serve.find(folders[1:], tmp_path) == folders, "found beside the other"

    def test_those_of_the_default_model(self, folders: list[Path]) -> None:
        assert serve.find([], folders[0].parents[1]) == folders

    def test_none(self, folders: list[Path], tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no dense engine among none") as raised:
            serve.find([], tmp_path)
        assert "make engine MODEL=smollm2-135m PASSES=none" in raised.value.fix
        with pytest.raises(InputError, match="no rewritten engine"):
            serve.find(folders[:1], tmp_path)

    def test_of_one_model_and_by_different_names(self, folders: list[Path], tmp_path: Path) -> None:
        with pytest.raises(InputError, match="different names"):
            serve._check([folders[0], folders[0]])
        other = Manifest.read(folders[0]).model_copy(update={"model": "another"})
        other.write(tmp_path)
        with pytest.raises(InputError, match="and another"):
            serve._check([folders[0], tmp_path])

    def test_this_process_s_clock_is_refused(self, folders: list[Path]) -> None:
        with pytest.raises(InputError, match="--clock wall"):
            serve.run(serve.NAMES, folders, dataclasses.replace(MACHINE, clock="cpu"), 1, quiet)


class TestCommand:
    @pytest.fixture(autouse=True)
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        asked: list[Any] = []

        def run(names: list[str], folders: list[Path], *_: Any) -> list[Record]:
            asked.append((list(names), folders))
            return []

        monkeypatch.setattr(measure, "describe", lambda _threads, _clock: MACHINE)
        monkeypatch.setattr(serve, "run", run)
        return asked

    def test_folders_after_serve(self, folders: list[Path], asked: list[Any]) -> None:
        from trtpass.cli import app

        result = CliRunner().invoke(app, ["bench", "--serve", *map(str, folders), "--json"])
        assert result.exit_code == 0 and json.loads(result.stdout) == []
        assert asked == [(list(serve.NAMES), folders)]

    def test_by_name(self, folders: list[Path], asked: list[Any]) -> None:
        assert bench.run(["serve.overhead"], engine=folders[1]) == []
        assert asked == [(["serve.overhead"], folders)]

    def test_left_out_unless_asked_for(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        said: list[str] = []
        assert bench._serve(["serve.latency"], False, MACHINE, 1, [], said.append) == []
        assert said == ["serve.latency left out: no dense engine among none: there are no engines"]
        with pytest.raises(InputError, match="no dense engine"):
            bench.run(["serve.latency"])

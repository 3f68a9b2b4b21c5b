"""Benchmarks: records and limits, a comparison that is red stops the report, and the whole at toy size."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from trtpass import bench, native
from trtpass.bench import compiling, dense, inputs, layer, measure, merging, prefill, ragged, record, sparse
from trtpass.bench.layer import Heads
from trtpass.errors import CheckFailed, InputError
from trtpass.passes.lower import lower

TINY = Heads(heads=6, kv_heads=2, width=16, window=16, pool=3, min_tokens=32)
MACHINE = measure.Machine("a processor", 1, 1, "1", 100.0, 0.0)


def text_of(records: list[record.Record]) -> str:
    console = Console(width=220, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    console.print(bench.render(records))
    return console.export_text()


def sample(tokens: int, ratio: float, **params: Any) -> record.Record:
    return record.Record("tsa.attention", {"tokens": tokens, **params}, "b", "ms", 1.0, ratio, ratio, ratio, ratio, 2.0)


class TestLimits:
    def test_without_scoring(self) -> None:
        assert record.attention_limit(8192, [4096], None) == 8192 * 8193 / (4096 * 4097)

    def test_with_scoring(self) -> None:
        assert record.attention_limit(8192, [4096], 128) == 8192 * 8193 / (4096 * 4097 + 128 * 8192)

    def test_costs_are_averaged_not_ratios(self) -> None:
        assert record.attention_limit(100, [100, 10], None) == 100 * 101 / ((100 * 101 + 10 * 11) / 2)

    def test_a_decode_step_reads_every_key_once(self) -> None:
        assert record.decode_limit(8192 * 3, 2048 * 3) == 4.0
        assert record.decode_limit(100, 0) == 100.0

    def test_a_time_is_ratio_of_pairs(self) -> None:
        made = record.timed("x", {}, "b", np.array([1.0, 2.0, 4.0]), np.array([2.0, 2.0, 2.0]), 3.0, {})
        assert (made.value, made.baseline_value, made.ratio) == (2000.0, 2000.0, 1.0)
        assert (made.ratio_min, made.ratio_max) == (0.5, 2.0)


class TestPays:
    def test_between_two_lengths(self) -> None:
        (text,) = bench.pays_from([sample(1000, 0.5), sample(4000, 2.0)]).values()
        assert text == "pays from about 2000 tokens"

    def test_at_the_shortest(self) -> None:
        (text,) = bench.pays_from([sample(1000, 1.5), sample(4000, 2.0)]).values()
        assert text == "pays at 1000 tokens already, the shortest measured"

    def test_never(self) -> None:
        (text,) = bench.pays_from([sample(1000, 0.5), sample(4000, 0.9)]).values()
        assert text == "does not pay up to 4000 tokens"

    def test_series_are_apart(self) -> None:
        assert len(bench.pays_from([sample(1000, 0.5, scoring=True), sample(1000, 0.5, scoring=False)])) == 2


class TestMeasure:
    def test_sides_take_turns_over_all_sets(self) -> None:
        seen: list[str] = []
        sides = [[lambda s=s, i=i: seen.append(f"{s}{i}") for i in range(4)] for s in "AB"]
        seconds = measure.interleave(sides, repeats=2, warm=1)
        assert seconds.shape == (2, 2) and (seconds > 0).all()
        assert [text[0] for text in seen] == ["A", "B"] * 12
        assert all(a[1] != b[1] for a, b in itertools.pairwise(seen))  # never the same buffers one after the other

    def test_the_clock_of_the_process_is_for_one_thread(self) -> None:
        with pytest.raises(InputError, match="cpu with one thread"):
            measure.describe(2, "cpu")
        seconds = measure.interleave([[lambda: time.sleep(0.05)]], 1, "cpu")
        assert 0 <= seconds[0, 0] < 0.04

    def test_unequal_sides_are_refused(self) -> None:
        with pytest.raises(InputError, match="equally many"):
            measure.interleave([[lambda: None], []], 1)

    def test_rotation_defeats_the_cache(self) -> None:
        size = 1 << 20
        assert measure.sets_for(size, most=10**6) * size >= measure.CACHE_FACTOR * measure.cache_bytes()

    def test_poison_shows(self) -> None:
        with pytest.raises(CheckFailed, match="2 of 2 values differ"):
            measure.require_close("x", measure.poisoned((2,)), np.zeros(2), 1e9, 1e9)
        assert measure.poisoned((1,), np.int32)[0] < 0

    def test_the_peak_is_a_rate(self) -> None:
        assert measure.matmul_peak(1, size=64, repeats=2) > 0


class TestOracles:
    def made(self, keep: int, select: str = "head") -> tuple[sparse.Set, dict[str, Any]]:
        graphs = sparse.sessions(TINY, 1)
        form = dense.CONTRIB
        item = sparse._sets(graphs.dense[form], form, TINY, inputs.seeded(TINY, 96), 96)[0]
        _, made = sparse._scored(graphs.scoring[select], TINY, item, select, keep)
        return item, made

    @pytest.mark.parametrize("select", sparse.SELECT)
    def test_right_results_pass(self, select: str) -> None:
        item, made = self.made(50, select)
        sparse._check("x", TINY, item, made, 50)
        assert made["keep"].tolist() == [50]

    @pytest.mark.parametrize(
        ("role", "spoil"),
        [
            ("out", lambda x: x[0].__setitem__((95, 3), x[0][95, 3] + 1e-3)),
            ("index", lambda x: x[0, 0].__setitem__(0, x[0, 0, 1])),
            ("count", lambda x: x.__setitem__((0, 1), 49)),
            ("keep", lambda x: x.__setitem__(0, 49)),
        ],
    )
    def test_wrong_results_are_red(self, role: str, spoil: Any) -> None:
        item, made = self.made(50)
        spoil(made[role])
        with pytest.raises(CheckFailed):
            sparse._check("x", TINY, item, made, 50)

    def test_a_lower_score_kept_is_red(self) -> None:
        item, made = self.made(50)
        kept = made["index"][0, 0, :50]
        dropped = np.setdiff1d(np.arange(80), kept)
        made["mass"][0, 0, dropped[0]] = made["mass"][0, 0].max() + 1
        with pytest.raises(CheckFailed, match="highest-scoring"):
            inputs.check_selection(made["mass"], made["keep"], made["index"], made["count"], TINY, 16, "x")
        assert item.checked

    def test_a_dropped_row_that_is_not_zero_is_red(self) -> None:
        item, made = self.made(50)
        dropped = np.setdiff1d(np.arange(96), made["index"][0, 0, :50])[0]
        made["out"][0, dropped, 0] = 1e-30
        with pytest.raises(CheckFailed, match="dropped rows"):
            sparse._check("x", TINY, item, made, 50)

    def test_dense_is_checked(self) -> None:
        q, k, v = inputs.seeded(TINY, 40).take(0, 40)
        with pytest.raises(CheckFailed):
            dense.check_dense("x", q, k, v, np.zeros((1, 40, 96), np.float32), TINY)


def test_one_layer_at_toy_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "sets_for", lambda _size: 2)
    monkeypatch.setattr(sparse, "sets_for", lambda _size: 2)
    real = dataclasses.replace(inputs.seeded(TINY, 160), real=True)
    records = dense.run([96, 160], real, TINY, MACHINE, 2)
    records += sparse.run(["tsa.attention", "tsa.overhead"], [96, 160], real, TINY, MACHINE, 2)
    assert {r.name for r in records} == {"dense.attention", "tsa.attention", "tsa.overhead"}
    attention = [r for r in records if r.name == "tsa.attention"]
    assert len(attention) == 2 * 4 * 4  # lengths, kept fractions and the coverage's own, scoring x select
    for r in attention:
        expected = {"tokens", "batch", "threads", "window", "kept", "scoring", "select", "keep"}
        assert expected <= r.params.keys() and r.ratio is not None and r.limit is not None
        if isinstance(r.params["keep"], float):
            kept = round(r.params["keep"] * r.params["tokens"])
            limit = record.attention_limit(r.params["tokens"], [kept], 16 if r.params["scoring"] else None)
            assert r.limit == pytest.approx(limit, abs=1e-4)
            assert abs(r.params["kept"] - r.params["keep"]) < 0.01
    assert json.loads(json.dumps([dataclasses.asdict(r) for r in records]))
    text = text_of(records)
    assert "GroupQueryAttention" in text and "tokens" in text and "a processor" in text


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """A folder with a tiny dense graph and its weights."""
    from tests.tiny import decoder
    from trtpass import io

    folder = tmp_path / "tiny" / "dense.cpu"
    folder.mkdir(parents=True)
    io.save(decoder(), folder / "dense.onnx")
    return folder


def test_prefill_at_toy_size(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.random.default_rng(0).integers(0, 64, (1, 160))
    monkeypatch.setattr(prefill, "text_ids", lambda _folder, tokens: ids[:, :tokens])
    spec = "token-sparse:window=16,min_tokens=32,layers=1,pool=3"
    records = prefill.run([96, 160], engine, MACHINE, 2, spec)
    assert [r.params["keep"] for r in records] == [*sparse.KEPT, sparse.OWN] * 2
    for r in records:
        assert r.params["sparse layers"] == "1/2" and 0 < r.params["attention"] < 1
        assert r.limit is not None and 0.5 < r.limit < 2  # below 1 where nothing is dropped: scoring costs
        if r.params["keep"] != sparse.OWN:
            assert abs(r.params["kept"] - r.params["keep"]) < 0.01


TINY_SCENES = (merging.Shape(3, 30, 32, 2, 5), merging.Shape(1, 60, 16, 1, 6))


def test_merging_at_toy_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "sets_for", lambda _size: 2)
    records = merging.run(MACHINE, 2, TINY_SCENES)
    assert [r.params["steps"] for r in records] == [2, 1]
    for r, shape in zip(records, TINY_SCENES, strict=True):
        assert 1 < r.params["final"] <= r.params["representatives"] < shape.all / 2
        counts = [r.params["representatives"], r.params["final"]][: shape.steps]
        floor = merging.operations(shape, counts) / 100e9  # MACHINE has 100 GFLOP/s; the counts are a mean, rounded
        assert r.params["floor_ms"] == pytest.approx(floor * 1e3, rel=0.1, abs=1e-3)
        assert r.params["times_floor"] > 1 and r.limit is not None and r.baseline_value is not None
    assert "scc.components" in text_of(records)


def test_products_of_components_are_counted_once() -> None:
    assert merging.operations(merging.Shape(2, 4, 8, 2, 1), [3, 2]) == 2 * 8 * (2 * 6 + 3 + 8 * 2)
    assert merging.operations(merging.Shape(1, 4, 8, 1, 1), [3]) == 2 * 8 * 6


@pytest.mark.parametrize(
    ("role", "spoil"),
    [
        ("numbered", lambda x: x.__setitem__((0, 5), x[0, 5] + 1)),
        ("final", lambda x: x.__setitem__(0, x[0] - 1)),
        ("match", lambda x: x.__setitem__((0, 7), 99)),
        ("merged", lambda x: x.__setitem__((0, 1, 2), x[0, 1, 2] + 1)),
        ("merged", lambda x: x.__setitem__((0, -1, 0), 1e-30)),
        ("size", lambda x: x.__setitem__((0, 0), 0)),
    ],
)
def test_wrong_merging_is_red(role: str, spoil: Any) -> None:
    shape = TINY_SCENES[0]
    x = merging.scene(0, shape)
    right = merging.in_numpy(x, shape.steps)
    permille = [1000, 1000]
    graph = measure.Graph(lower(merging.two_steps(shape, permille), "cpu").model, 1)
    call, made = merging.bound(graph, x, shape, permille)
    call()
    merging.check(made, right)
    spoil(made[role])
    with pytest.raises(CheckFailed):
        merging.check(made, right)


class TestRaggedDecode:
    @pytest.fixture
    def library(self) -> None:
        if isinstance(reason := native.find(), str):
            pytest.skip(reason)

    @pytest.mark.usefixtures("library")
    def test_at_toy_size(self) -> None:
        records = ragged.run(MACHINE, 2, TINY, context=256, batches=(1, 2), layers=2)
        assert len(records) == 2 * (1 + len(ragged.KEPT) * len(ragged.PAGES))
        for r in records:
            assert (r.params["page"] is None) == (r.params["form"] == dense.CONTRIB)
            assert r.ratio is not None and r.limit == pytest.approx(1 / r.params["kept"], rel=2e-3)
        for batch in (1, 2):
            everything = [r for r in records if (r.params["kept"], r.params["batch"]) == (1.0, batch)]
            assert min(r.value for r in everything) == everything[0].baseline_value  # the fastest is the baseline
        assert "dense keys / held keys" in text_of(records)

    @pytest.mark.parametrize(("batch", "kept", "page"), [(1, 1.0, 16), (1, 0.1, 128), (4, 0.25, 64), (2, 0.004, 32)])
    def test_what_is_held(self, batch: int, kept: float, page: int) -> None:
        held = ragged.hold(np.random.default_rng(0), TINY, 256, batch, kept, page)
        mean = max(1, round(kept * 256))
        assert held.lengths.mean() == mean and (abs(held.lengths - mean) <= 0.2 * mean).all()
        assert kept == 1.0 or mean == 1 or len(np.unique(held.lengths)) > 1
        used = held.table[np.arange(held.table.shape[2]) * page < held.lengths[..., None]]
        assert sorted(used) == list(range(len(used)))  # no page has two owners
        assert (used.max() + 1) * page <= ragged.buffers(np.random.default_rng(0), TINY, 256, batch).pools[0].shape[0]

    @pytest.mark.parametrize("side", ["paged", "contiguous"])
    @pytest.mark.usefixtures("library")
    def test_wrong_results_are_red(self, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def other_scale(text: str) -> Any:
            return layer.parse(text.replace("scale=0.0", "scale=0.7").replace("num_heads=6,", "num_heads=6,scale=0.7,"))

        rng = np.random.default_rng(0)
        stack = [ragged.buffers(rng, TINY, 128, 2)]
        owned = [ragged.hold(rng, TINY, 128, 2, 0.5, 16)]
        for parse in (ragged.parse, other_scale):
            monkeypatch.setattr(ragged, "parse", parse)
            graph = measure.Graph(getattr(ragged, side)(TINY, 1), 1)
            with nullcontext() if parse is layer.parse else pytest.raises(CheckFailed, match="layer 0"):
                if side == "paged":
                    ragged.paged_call(graph, TINY, stack, owned, 16)
                else:
                    ragged.dense_call(graph, TINY, stack)

    def test_without_the_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(native, "find", lambda: "no library")
        monkeypatch.setattr(measure, "describe", lambda _threads, _clock: MACHINE)
        with pytest.raises(InputError, match="no library"):
            bench.run(["ragged.decode"])


@pytest.mark.slow
def test_compiling_a_small_graph() -> None:
    pytest.importorskip("transformers")
    records = compiling.run(MACHINE, repeats=1, layers=2)
    assert [r.unit for r in records] == ["s", "GB", "GB"]
    assert records[0].value > 0 and records[0].ratio is not None
    # So small a graph may fit into pages that the process has already: what the passes add can be nothing.
    assert 0 <= records[1].value < 0.5 and 0 < records[2].value < 1
    assert records[0].params["weights_gb"] > 1  # never read: the file has no content on disk


class TestRequests:
    def test_unknown_name(self) -> None:
        with pytest.raises(InputError, match=r"tsa\.prefil'"):
            bench.run(["tsa.prefil"])

    @pytest.mark.parametrize("given", [{"repeats": 0}, {"threads": 0}, {"tokens": ()}, {"tokens": (0,)}])
    def test_bad_numbers(self, given: dict[str, Any]) -> None:
        with pytest.raises(InputError):
            bench.run(["tsa.attention"], **given)

    def test_prefill_without_an_engine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(measure, "describe", lambda _threads, _clock: MACHINE)
        with pytest.raises(InputError, match="make engine"):
            bench.run(["tsa.prefill"])

    def test_a_folder_that_is_no_engine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(measure, "describe", lambda _threads, _clock: MACHINE)
        with pytest.raises(InputError, match=r"dense\.onnx"):
            bench.run(["tsa.prefill"], engine=tmp_path)

    def test_from_the_command_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from trtpass.cli import app

        monkeypatch.chdir(tmp_path)  # no engine: noise, said so
        monkeypatch.setattr(measure, "matmul_peak", lambda _threads, _clock: 1.0)
        monkeypatch.setattr(sparse, "sets_for", lambda _size: 2)
        command = ["bench", "tsa.overhead", "--tokens", "300", "--repeats", "1", "--threads", "1", "--json"]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        records = json.loads(result.stdout)
        assert [r["name"] for r in records] == ["tsa.overhead"] * 2
        assert set(records[0]) == {field.name for field in dataclasses.fields(record.Record)}
        assert "no engine" in result.stderr

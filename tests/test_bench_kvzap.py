"""Benchmarks of a paged cache at toy size: what they compare, and that they refuse what they cannot compare."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from paged_proofs import save_surrogate
from rich.console import Console
from tiny_engines import tiny_engine, tiny_model

from trtpass import bench, native
from trtpass.bench import cache_memory, inputs, kvzap, measure
from trtpass.build import Request, build
from trtpass.errors import CheckFailed, InputError

MACHINE = measure.Machine("a processor", 1, 1, "1", 100.0, 0.0)
TOKENS = 64


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kvzap-bench")
    weights = save_surrogate(root / "w.safetensors")
    spec = f"kvzap:threshold=0,window=16,weights={weights}"
    return build(Request(str(tiny_model(tmp_path_factory)), [spec], out=root / "engines", page=16))[1]


@pytest.fixture(autouse=True)
def text(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.random.default_rng(0).integers(0, 256, (1, 200))
    for module in (kvzap, inputs):
        monkeypatch.setattr(module, "text_ids", lambda _folder, tokens: ids[:, :tokens])
    monkeypatch.setattr(kvzap, "_other", _nobody)


class _nobody:
    """No kvpress: its process is a matter of its own tests."""

    def __init__(self, *_: object) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def test_decode_attention_and_scorer(engine: Path, library: native.Library) -> None:
    records = kvzap.run(kvzap.NAMES, engine, MACHINE, 1, lambda _: None, [TOKENS])
    by_name = {(r.name, r.params.get("form")): r for r in records}
    assert set(by_name) == {
        ("kvzap.attention", "native"), ("kvzap.attention", "body"), ("kvzap.decode", None), ("kvzap.scorer", None)
    }  # fmt: skip
    for record in records:
        assert record.value > 0 and record.params["threshold"] == 0.0 and record.params["page"] == 16
    decode, attention = by_name["kvzap.decode", None], by_name["kvzap.attention", "native"]
    kept = decode.params["kept"]
    assert 0.3 < kept < 1 and attention.limit == pytest.approx(1 / kept, rel=1e-2)
    assert decode.limit is not None and 1 < decode.limit < 1 / kept, "the weights are read on both sides"
    scorer = by_name["kvzap.scorer", None]
    # two layers of 96 x 2 for scores; 96 x (96 + 32 + 32 + 96 + 3 x 160) for the products of each
    assert scorer.params["flops %"] == pytest.approx(100 * 2 / (96 + 32 + 32 + 96 + 3 * 160), rel=1e-3)
    console = Console(width=200, record=True, file=StringIO())
    console.print(bench.render(records))
    assert "(weights + dense K and V) / (weights + held K and V)" in console.export_text()


def test_memory(engine: Path) -> None:
    ours, theirs = (cache_memory.measure(engine, side, 80, 1) for side in cache_memory.SIDES)
    assert theirs["bytes"] == 2 * 2 * 16 * 4 * 2 * (80 + cache_memory.STEPS)  # K and V, heads, width, float32, layers
    assert 0.3 < ours["kept"] < 1 == theirs["kept"]
    pages = ours["bytes"] / (2 * 16 * 16 * 4)  # K and V of a page
    assert pages == int(pages) and ours["bytes"] >= ours["kept"] * theirs["bytes"]


def test_processes_are_compared(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"paged": {"bytes": 25, "grown": 30, "kept": 0.25, "params": {}}, "dense": {"bytes": 100, "grown": 90}}
    monkeypatch.setattr(cache_memory, "_ask", lambda _folder, side, _tokens, _threads: made[side])
    pages, process = cache_memory.run(engine, MACHINE, [64], lambda _: None)
    assert (pages.ratio, process.ratio, pages.limit) == (4.0, 3.0, 4.0)
    assert (pages.params["bytes of"], process.params["bytes of"]) == ("pages", "process")


def test_a_process_that_fails_is_an_error(engine: Path) -> None:
    with pytest.raises(InputError, match="the process of paged at 90000 tokens failed"):
        cache_memory.run(engine, MACHINE, [90_000], lambda _: None, repeats=1)


def test_wrong_results_are_red(engine: Path, library: native.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(*given: object, **more: object) -> object:
        state = prefill(*given, **more)
        state.logits[0, 3] += 1
        return state

    prefill = kvzap.PagedEngine.prefill
    monkeypatch.setattr(kvzap.PagedEngine, "prefill", spoiled)
    with pytest.raises(CheckFailed, match="prefill of 64 tokens"):
        kvzap.run(["kvzap.decode"], engine, MACHINE, 1, lambda _: None, [TOKENS])


def test_what_cannot_be_run(
    engine: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="has a dense cache"):
        kvzap.run(["kvzap.decode"], tiny_engine(tmp_path_factory, "dense"), MACHINE, 1, lambda _: None, [TOKENS])
    with pytest.raises(InputError, match="multiples of 64"):
        kvzap.run(["kvzap.decode"], engine, MACHINE, 1, lambda _: None, [65])
    with pytest.raises(InputError, match="at most 96 tokens"):
        kvzap.run(["kvzap.decode"], engine, MACHINE, 3, lambda _: None, [TOKENS])
    said: list[str] = []
    dense = tiny_engine(tmp_path_factory, "dense")
    assert bench._kvzap(["kvzap.decode"], False, MACHINE, 1, dense, said.append) == []
    assert "kvzap.decode left out" in said[-1] and "has a dense cache" in said[-1]
    with pytest.raises(InputError, match="has a dense cache"):
        bench._kvzap(["kvzap.decode"], True, MACHINE, 1, dense, said.append)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"kvzap\.decode needs an engine with a cache policy"):
        bench.run(["kvzap.decode"], threads=1, repeats=1)

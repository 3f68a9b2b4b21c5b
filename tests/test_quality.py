"""Quality checks: tasks, numbers, the local error, what is written; and that selections do not depend on threads."""

from __future__ import annotations

import json
import shutil
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import save_tiny

from graphs import resolve
from trtpass import io, passes
from trtpass.build import Request, build
from trtpass.calibrate import read_drift
from trtpass.canonicalize import canonicalize
from trtpass.corpus import text_corpus
from trtpass.errors import CheckFailed, InputError
from trtpass.layers import carry_drift
from trtpass.manifest import Check, Checks, Manifest, PassRecord, artifact, versions
from trtpass.passes.cache import insert_cache
from trtpass.passes.lower import lower
from trtpass.quality import measure, render
from trtpass.quality.local_error import Heads, local_error
from trtpass.quality.measure import measure_plan
from trtpass.quality.plan import FULL, Plan, spread
from trtpass.quality.sides import Decode, Prefill, activations, log_softmax_at
from trtpass.quality.tasks import continuations, passkeys
from trtpass.runtime import Engine
from trtpass.text import Tokenizer

PASS = "token-sparse:coverage=0.3,min_tokens=16,window=8"
PLAN = Plan(
    coverages=(0.0, 0.3, 0.6), passkey=((400, 2),), documents=((96, 3), (192, 2)), continuation=20, bound_tokens=160
)


class Characters:
    """One token a character, for tasks that need no model."""

    def encode(self, text: str, special: bool = True) -> list[int]:
        return [ord(c) for c in text]


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of single ASCII characters, ids below the tiny models' vocabulary."""
    from tokenizers import Tokenizer, decoders, models

    vocab = {c: i for i, c in enumerate(["<unk>", *string.printable])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny engine that prunes, with a tokenizer."""
    root = tmp_path_factory.mktemp("quality")
    model = save_tiny("llama", root / "model")
    write_tokenizer(model)
    manifest, folder = build(Request(str(model), [PASS], out=root / "engines"))
    assert not manifest.checks.failed
    return folder


@pytest.fixture
def engine(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "engine"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list(string.ascii_lowercase), rng.integers(2, 9))) for _ in range(40)]
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(" ".join(rng.choice(words, 800)))
    return file


def test_pass_keys_are_in_the_prompt_at_their_depth_and_asked_for_at_its_end() -> None:
    samples = passkeys(Characters(), 1000, 4)
    again = passkeys(Characters(), 1000, 4)
    places = []
    for sample, same in zip(samples, again, strict=True):
        prompt, key = "".join(map(chr, sample.prompt)), "".join(map(chr, sample.target))
        assert (sample.prompt == same.prompt).all()
        assert len(key) == 6 and prompt.count(f"The pass key is{key}.") == 1
        assert prompt.endswith("The pass key is")
        assert 1000 - 90 < len(prompt) <= 1000
        places.append(prompt.index(key))
    assert places == sorted(places) and len(set(places)) == 4
    assert len({tuple(s.target) for s in samples}) == 4
    with pytest.raises(InputError, match="room for a line"):
        passkeys(Characters(), 200, 1)


def test_a_longer_context_scores_the_same_tokens() -> None:
    tokens = list(range(5000))
    short, long = (continuations(tokens, n, 5, 20, 300) for n in (100, 300))
    for a, b in zip(short, long, strict=True):
        assert (a.target == b.target).all() and (b.prompt[-100:] == a.prompt).all()
        assert a.target[0] == a.prompt[-1] + 1 and len(a.prompt) == 100 and len(b.prompt) == 300
    with pytest.raises(InputError, match="more than"):
        continuations(tokens[:324], 300, 5, 20, 300)


def test_samples_are_spread() -> None:
    for count in (2, 5, 50):
        places = sorted(spread(count, 1000))
        assert places[-1] < 1000 and max(np.diff([0, *places, 1000])) < 3000 / count


def test_a_plan_leaves_out_what_the_context_cannot_hold() -> None:
    fitted = FULL.fit(4400)
    assert [n for n, _ in fitted.passkey] == [1000, 2000, 4000] and [n for n, _ in fitted.documents] == [2048, 4096]
    with pytest.raises(InputError, match="at least 2248"):
        FULL.fit(2200)
    assert FULL.sweep(0.003) == (0.001, 0.0025, 0.003, 0.005, 0.01, 0.02, 0.05)


def test_log_softmax() -> None:
    logits = np.array([[0.0, np.log(3.0)], [1e4, 0.0]], np.float32)
    np.testing.assert_allclose(log_softmax_at(logits, np.array([1, 1])), [np.log(0.75), -1e4], rtol=1e-6)


def test_teacher_forcing_equals_generation(engine: Path, text: Path) -> None:
    """Under teacher forcing, what greedy generation makes is greedy, and a wrong token changes nothing before it."""
    dense = io.load(engine / "dense.onnx")
    steps = [passes.parse(PASS)]
    prompt = np.array([ord(c) % 100 for c in text.read_text()[:120]])
    generated = [s.tokens[0] for s in Engine.open(engine, threads=1).generate([prompt.tolist()], 12)]
    target = np.array(generated)
    prefill, decode = Prefill(dense, steps, "cpu", threads=1), Decode(dense, "cpu", threads=1)
    logs, greedy = decode.log_probabilities(prefill.run(prompt, len(target)), target)
    assert greedy.all()
    wrong = target.copy()
    wrong[5] = (wrong[5] + 1) % 100
    other, still = decode.log_probabilities(prefill.run(prompt, len(target)), wrong)
    assert still[:5].all() and not still[5]
    np.testing.assert_allclose(other[:5], logs[:5], atol=1e-5)
    assert other[5] < logs[5]


def test_local_error_equals_the_operator_and_obeys_the_bound(engine: Path) -> None:
    """o - o' from numpy equals the difference of the dense and the sparse operator's reference."""
    import torch

    from plugins import all_ops

    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((n, 40, 8)).astype(np.float32) * 2 for n in (4, 2, 2))
    sets = [np.sort(rng.choice(40, n, replace=False)) for n in (7, 40, 1, 20)]
    error = local_error(Heads(q, k, v, sets, 0.3))
    attend = all_ops()["TokenSparseAttention"]
    index = np.full((1, 4, 40), 40, np.int32)
    for row, kept in zip(index[0], sets, strict=True):
        row[: len(kept)] = kept
    every = np.tile(np.arange(40, dtype=np.int32), (1, 4, 1))
    count = np.array([[len(s) for s in sets]], np.int32)
    tensors = [torch.from_numpy(x)[None] for x in (q, k, v)]
    sparse = attend(*tensors, torch.from_numpy(index), torch.from_numpy(count), scale=0.3)[0].numpy()
    full = attend(*tensors, torch.from_numpy(every), torch.full((1, 4), 40, dtype=torch.int32), scale=0.3)[0].numpy()
    moved = np.concatenate([np.linalg.norm(sparse[h, s] - full[h, s], axis=-1) for h, s in enumerate(sets)])
    np.testing.assert_allclose(error.moved, moved, atol=2e-6)
    assert (error.moved <= error.bound + 1e-5).all()
    assert error.mass[7:47].max() == 0 and error.mass[:7].max() > 0.1  # the head that keeps all, and one that does not


def test_activations_are_those_of_the_rewritten_model(engine: Path) -> None:
    """Layer 0 sees the same as the dense model, layer 1 does not; and m > 0 where tokens were dropped."""
    dense = io.load(engine / "dense.onnx")
    ids = np.random.default_rng(2).integers(1, 100, 160)
    sparse = activations(dense, [passes.parse(PASS)], ids)
    identity = activations(dense, [passes.parse(PASS.replace("0.3", "0"))], ids)
    np.testing.assert_allclose(sparse[0].q, identity[0].q, atol=1e-5)
    assert np.abs(sparse[1].q - identity[1].q).max() > 1e-2
    assert all(len(s) < 160 for s in sparse[0].sets) and all(len(s) == 160 for s in identity[0].sets)
    assert local_error(sparse[0]).mass.max() > 1e-3 and local_error(identity[0]).mass.max() == 0


def test_measure_writes_all_of_it(engine: Path, text: Path) -> None:
    seen: list[float] = []
    result = measure_plan(engine, PLAN, text=text, report=lambda _, fraction: seen.append(fraction))
    assert seen == sorted(seen) and seen[0] > 0 and seen[-1] <= 1
    assert sorted(p.name for p in (engine / "quality").iterdir()) == [
        ".trtpass", "layers.png", "quality.json", "report.html", "sweep.png"
    ]  # fmt: skip
    assert json.loads((engine / "quality/quality.json").read_text()) == result
    for name in ("layers.png", "sweep.png"):
        assert (engine / "quality" / name).read_bytes().startswith(b"\x89PNG")
    page = (engine / "quality/report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "http" not in page

    names = [row["name"] for row in result["settings"]]
    assert names == ["dense", "coverage 0.3", "coverage 0.6", "coverage 0.3, select=group", "coverage 0.3, mode=paper"]
    dense, mild, strong = result["settings"][:3]
    assert result["identity_max_abs"] < 1e-4
    for row in (mild, strong):
        for length in ("96", "192"):
            entry = row["text"][length]
            gaps = np.subtract(entry["log_likelihoods"], dense["text"][length]["log_likelihoods"])
            assert entry["change"] == pytest.approx(gaps.mean()) and np.abs(gaps).max() > 1e-4
    assert all(0 < strong["kept"]["text 192"][n] < mild["kept"]["text 192"][n] < 1 for n in ("0", "1"))
    assert [row["layer"] for row in result["local_error"]["layers"]] == result["layers"]["used"] == [0, 1]
    assert all(r["moved"][3] <= r["bound"][3] + 1e-4 for r in result["local_error"]["layers"])

    quality = Manifest.read(engine).quality
    assert quality is not None and "20-token continuation after 96 tokens" in quality.metric
    assert quality.dense == dense["text"]["96"]["mean"] and quality.rewritten == mild["text"]["96"]["mean"]
    from rich.console import Console

    console = Console(record=True, width=200)
    console.print(render(result))
    shown = console.export_text()
    assert "coverage 0.6" in shown and "kept fraction" in shown and "sparse layers: 0, 1 (2 of 2)" in shown


def test_a_second_run_replaces_the_first_and_a_failed_one_does_not(
    engine: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(coverages=(), passkey=(), documents=((96, 1),), continuation=4, bound_tokens=64, compare=False)
    first = measure_plan(engine, plan, text=text)
    before = (engine / "quality/quality.json").read_bytes()
    monkeypatch.setattr("trtpass.quality.plots.layers", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure_plan(engine, plan, text=text)
    assert (engine / "quality/quality.json").read_bytes() == before
    monkeypatch.undo()
    second = measure_plan(engine, plan, text=text)
    assert {k: v for k, v in first.items() if k != "seconds"} == {k: v for k, v in second.items() if k != "seconds"}
    assert [p.name for p in engine.iterdir() if p.name.startswith(".quality")] == []


def test_what_cannot_be_measured_is_refused(engine: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 2248"):
        measure(engine, text=text, short=True)  # context 512
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(InputError, match="the text has 9 tokens"):
        measure_plan(engine, PLAN, text=short)
    manifest = Manifest.read(engine)
    spoiled = manifest.model_copy(deep=True)
    spoiled.passes[0].layers = [1]
    spoiled.write(engine)
    with pytest.raises(CheckFailed, match=r"layers \[1\]"):
        measure_plan(engine, PLAN, text=text)
    spoiled.passes = []
    spoiled.write(engine)
    with pytest.raises(InputError, match="no pass with a coverage"):
        measure_plan(engine, PLAN, text=text)
    manifest.write(engine)
    with (engine / "weights.bin").open("r+b") as file:
        file.write(b"\xff")
    with pytest.raises(CheckFailed, match=r"weights\.bin"):
        measure_plan(engine, PLAN, text=text)


def chosen(source: Any, ids: list[int], layers: Sequence[int], threads: int) -> dict[str, np.ndarray]:
    """Index and count of every selection of a prefill."""
    names = [f"layer{n}.token_sparse.{role}" for n in layers for role in ("index", "count")]
    return {n: v for n, v in Engine.open(source, threads=threads).run_named([ids], names).items() if n != "logits"}


def assert_same_sets(source: Any, ids: list[int], layers: Sequence[int]) -> None:
    one, two, again = (chosen(source, ids, layers, threads) for threads in (1, 2, 2))
    for layer in layers:
        assert (one[f"layer{layer}.token_sparse.count"] < len(ids)).any(), f"layer {layer} dropped nothing"
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], name)
        np.testing.assert_array_equal(two[name], again[name], name)


def test_sets_do_not_depend_on_threads(engine: Path) -> None:
    assert_same_sets(engine, np.random.default_rng(3).integers(1, 100, 300).tolist(), (0, 1))


@pytest.fixture(scope="module")
def real(smollm2: Any, smollm2_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What quality needs of an engine of SmolLM2: the dense graph, weights, tokenizer and manifest; nothing checked."""
    folder = tmp_path_factory.mktemp("smollm2-engine")
    model = io.load(smollm2_onnx)
    canonicalize(model)
    drift = read_drift(resolve("smollm2-135m"))
    assert drift is not None
    carry_drift(model, drift)
    io.save(model, folder / "dense.onnx", weights="weights.bin")
    smollm2.tokenizer.save_pretrained(folder)
    step = passes.parse("token-sparse:coverage=0.005")
    result = step(model)
    unchecked = Check.not_run("not built")
    Manifest(
        model="smollm2-135m", origin="smollm2-135m", target="cpu", sm=[], context=smollm2.context,
        passes=[PassRecord(name=step.name, options=step.describe(), sites=len(result.sites),
                           layers=[site.layer for site in result.sites])],
        artifacts=[artifact(folder, folder / "weights.bin")], versions=versions(), seconds=0, peak_memory_bytes=0,
        checks=Checks(export=unchecked, rewrite=unchecked, engine=unchecked),
    ).write(folder)  # fmt: skip
    return folder


@pytest.mark.model
@pytest.mark.slow
def test_sets_of_smollm2_do_not_depend_on_threads(real: Path) -> None:
    dense = io.load(real / "dense.onnx")
    rewritten = dense.clone()
    layers = [site.layer for site in passes.parse("token-sparse:coverage=0.005")(rewritten).sites]
    stateless = {"prefill": rewritten, "decode": dense}
    graphs = {phase: lower(insert_cache(graph, phase), "cpu").model for phase, graph in stateless.items()}
    assert_same_sets(graphs, Tokenizer.open(real).encode(text_corpus()[50_000:60_000], special=False)[:1500], layers)


@pytest.mark.model
@pytest.mark.slow
def test_the_short_form_on_smollm2(real: Path) -> None:
    result = measure(real, short=True)
    dense, mild, strong = result["settings"]
    assert [row["name"] for row in result["settings"]] == ["dense", "coverage 0.005", "coverage 0.02"]
    assert dense["passkey"]["1000"]["exact"] == dense["passkey"]["2000"]["exact"] == 1  # the model can do the task
    assert mild["passkey"]["1000"]["change"] == pytest.approx(0, abs=1e-3)  # dense up to 1152 tokens
    assert -5 < dense["text"]["2048"]["mean"] < -2 and -1 < strong["text"]["2048"]["change"] < 0.1
    assert len(result["layers"]["used"]) == 15 and "drift:0.5" in result["layers"]["rule"]
    for layer, share in strong["kept"]["text 2048"].items():
        assert 0.3 < share < mild["kept"]["text 2048"][layer] < 1
    for row in result["local_error"]["layers"]:
        assert 0 < row["mass"][0] < 0.1 and all(m <= b + 1e-4 for m, b in zip(row["moved"], row["bound"], strict=True))
    quality = Manifest.read(real).quality
    assert quality is not None and quality.rewritten - quality.dense == pytest.approx(mild["text"]["2048"]["change"])

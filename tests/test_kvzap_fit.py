"""Fitting: known targets, R^2 as defined, resume after an interruption, the seed, and what is refused."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import save_tiny
from safetensors.torch import load_file, save_file
from tiny_engines import save_byte_tokenizer

from graphs import resolve
from trtpass import cli
from trtpass.errors import InputError
from trtpass.kvzap import collect, oracle
from trtpass.kvzap.fit import Request, _drawn, fit, perceptron, r_squared, render, ridge
from trtpass.kvzap.surrogate import KEYS, Kind, Surrogate

CONTEXTS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 layers, 2 KV heads and E 96, one token a byte, 256 positions."""
    folder = save_tiny(
        "llama", tmp_path_factory.mktemp("fit") / "tiny", vocab_size=256, max_position_embeddings=256, eos_token_id=None
    )
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 kB of words."""
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefgh"), size=random.integers(2, 8))) for _ in range(99)]
    path = tmp_path_factory.mktemp("corpus") / "words.txt"
    path.write_text(" ".join(random.choice(words, 8000))[:40_000])
    return path


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # such small work only loses by more
    yield
    torch.set_num_threads(before)


@pytest.fixture
def request_of(model: Path, corpus: Path, tmp_path: Path) -> Callable[..., Request]:
    def make(**changes: Any) -> Request:
        plain = Request(str(model), "linear", tmp_path / "x.safetensors", corpus, CONTEXTS, threads=1)
        return replace(plain, **changes)

    return make


def pairs(count: int, noise: float, seed: int = 0) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """Three contexts of a linear target of 2 heads, features of different sizes and offsets; the true weights."""
    random = np.random.default_rng(seed)
    truth = np.random.default_rng(9).normal(size=(2, 12))
    scale = np.logspace(-1, 1, 12)
    made = []
    for _ in range(3):
        x = (random.normal(size=(count, 12)) + 5) * scale
        y = x @ (truth / scale).T - 7 + noise * random.normal(size=(count, 2))
        made.append((x.astype(np.float32), y.astype(np.float32)))
    return made, truth / scale


def held_r2(kind: Kind, layer: dict[str, np.ndarray], held: list[tuple[np.ndarray, np.ndarray]]) -> float:
    guess = [Surrogate(kind, (layer,)).predict(torch.from_numpy(x)[None])[0].T.numpy() for x, _ in held]
    found = [(np.concatenate([y for _, y in held]), np.concatenate(guess))]
    return float(r_squared(found)["head_mean"])


def test_ridge_finds_a_linear_target() -> None:
    made, truth = pairs(500, 0.0)
    layer = ridge(made, [1e-9])
    np.testing.assert_allclose(layer["weight"], truth, rtol=1e-3, atol=1e-7)
    assert held_r2("linear", layer, pairs(500, 0.0, seed=1)[0]) > 0.9999


@pytest.mark.parametrize("noise", [1.0, 3.0])
def test_r2_of_a_noisy_linear_target_is_the_share_that_can_be_known(noise: float) -> None:
    made, truth = pairs(4000, noise)
    signal = ((truth * np.logspace(-1, 1, 12)) ** 2).sum(1)
    expected = float((signal / (signal + noise**2)).mean())
    assert held_r2("linear", ridge(made), pairs(4000, noise, seed=1)[0]) == pytest.approx(expected, abs=0.02)


def test_ridge_is_what_the_whole_data_give_at_once() -> None:
    """Streamed sums against the textbook solution; a constant feature has no weight."""
    made, _ = pairs(50, 1.0)
    made = [(np.concatenate([x, np.full((len(x), 1), 3.5, np.float32)], 1), y) for x, y in made]
    x, y = (np.concatenate([part[i] for part in made]).astype(np.float64) for i in (0, 1))
    z = x - x.mean(0)
    system = z.T @ z / len(z) + 0.05 * x.var(0).mean() * np.eye(13)
    expected = np.linalg.solve(system, z.T @ (y - y.mean(0)) / len(z))
    layer = ridge(made, [0.05])
    np.testing.assert_allclose(x @ layer["weight"].T + layer["bias"], z @ expected + y.mean(0), rtol=1e-4, atol=1e-4)
    assert np.abs(layer["weight"][:, 12]).max() < 1e-9


@pytest.mark.parametrize(("strengths", "best"), [((10.0, 1e-6), 1e-6), ((1e-6, 1e-3, 10.0), None)])
def test_the_strength_is_the_one_that_predicts_left_out_contexts_best(
    strengths: tuple[float, ...], best: float | None
) -> None:
    """Against predictions of each pair of contexts from the others; much data want little, few noisy ones want more."""
    random = np.random.default_rng(0)
    count, noise = (200, 0.1) if best else (4, 30.0)
    made = [(x[:count], y[:count]) for seed in range(4) for x, y in pairs(200, noise, seed)[0][:2]]

    def error(strength: float) -> float:
        total = 0.0
        for fold in range(4):
            rest = [part for i, part in enumerate(made) if i // 2 != fold]
            layer = ridge(rest, [strength])
            total += sum(
                float(((x @ layer["weight"].T + layer["bias"] - y) ** 2).sum())
                for x, y in made[2 * fold : 2 * fold + 2]
            )
        return total

    chosen = min(strengths, key=error)
    assert chosen == (best or 10.0)
    for key, array in ridge(made, [chosen]).items():
        np.testing.assert_array_equal(ridge(made, random.permutation(strengths).tolist())[key], array)


def test_a_perceptron_finds_what_is_not_linear() -> None:
    """A bend of one feature; sizes differ much, so that weights must be folded back to features as they come."""

    def bent(seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
        z = np.random.default_rng(seed).normal(size=(10_000, 64))
        y = np.abs(z[:, 20:21]) * [3, -1] - 8
        return [(((z + 5) * np.logspace(-3, 3, 64)).astype(np.float32), y.astype(np.float32))]

    layer = perceptron(bent(0), seed=0, decay=0.01)
    assert {key: layer[key].shape for key in layer} == {
        "0.weight": (8, 64), "0.bias": (8,), "2.weight": (2, 8), "2.bias": (2,)
    }  # fmt: skip
    small = perceptron(bent(0), seed=0, decay=40.0)
    assert np.abs(small["2.weight"]).max() < np.abs(layer["2.weight"]).max() / 10
    assert held_r2("mlp", layer, bent(1)) > 0.7 > 0.1 > held_r2("linear", ridge(bent(0)), bent(1))


def test_an_mlp_is_fitted_on_a_part_of_too_many_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trtpass.kvzap.fit.PAIRS", 100)
    made = pairs(70, 0.0)[0]
    hidden, score = _drawn(made, 3)
    rows = [int(np.flatnonzero((np.concatenate([x for x, _ in made]) == row).all(1))[0]) for row in hidden]
    assert len(rows) == 100 and rows == sorted(set(rows)) and rows != list(range(100))
    np.testing.assert_array_equal(score, np.concatenate([y for _, y in made])[rows])


def test_r2_is_that_of_its_definition() -> None:
    true = np.array([[[0.0, 10], [2, 12]], [[5, 5], [7, 5]]])  # [layers, T, heads]
    guess = np.array([[[0.0, 11], [2, 11]], [[6, 5], [6, 5]]])
    made = r_squared(list(zip(true, guess, strict=True)))
    assert made["head"] == [[1.0, 0.0], [0.0, None]]  # the last head does not vary
    assert made["head_mean"] == pytest.approx(1 / 3, abs=1e-6)
    assert made["layer"] == pytest.approx([1 - 2 / 104, 1 - 2 / 3], abs=1e-6)
    assert made["all"] == pytest.approx(1 - 4 / ((true - true.mean()) ** 2).sum(), abs=1e-6)


@pytest.mark.parametrize("kind", KEYS)
def test_a_fit_and_the_r2_that_it_reports(kind: Kind, request_of: Callable[..., Request], tmp_path: Path) -> None:
    seen: list[float] = []
    record = fit(request_of(kind=kind, keep_work=True), lambda what, share: seen.append(share))
    assert seen == sorted(seen) and seen[0] >= 0 and seen[-1] < 1
    surrogate = Surrogate.load(tmp_path / "x.safetensors")
    assert surrogate.kind == kind
    surrogate.need(layers=2, width=96, kv_heads=2)
    work = tmp_path / "x.safetensors.work"
    assert len(list(work.glob("fitted-*"))) == CONTEXTS and len(list(work.glob("held-*"))) == collect.MIN_HELD
    held = [load_file(file) for file in sorted(work.glob("held-*"))]
    true = torch.cat([part["score"] for part in held], 2)  # [L, Hkv, T]
    error = (true - torch.cat([surrogate.predict(part["hidden"]) for part in held], 2)) ** 2
    heads = 1 - error.sum(2) / ((true - true.mean(2, keepdim=True)) ** 2).sum(2)
    np.testing.assert_allclose(record["r2"]["head"], heads.numpy(), atol=1e-4)
    assert record["r2"]["all"] == pytest.approx(float(1 - error.sum() / ((true - true.mean()) ** 2).sum()), abs=1e-4)
    assert record["tokens"]["held"] == true.shape[2]
    from rich.console import Console

    with Console(width=160).capture() as shown:
        shown._console.print(render(record))
    assert f"{record['r2']['head'][1][1]:.3f}" in shown.get() and str(tmp_path / "x.safetensors") in shown.get()


def test_what_is_collected_is_the_oracle_of_separate_text(request_of: Callable[..., Request]) -> None:
    """Fitted contexts from the first 70% of the text, held-out ones from the next 5%; every second one in chat form."""
    request = request_of()
    assert request.corpus is not None
    loaded, text = resolve(request.model).load(), request.corpus.read_text()
    loaded.tokenizer.chat_template = "{% for m in messages %}<u>{{ m['content'] }}</u>{% endfor %}<a>"
    contexts = collect.cut(loaded, text, 12, 0)
    assert [c.held for c in contexts] == [False] * 12 + [True] * collect.MIN_HELD
    for context in contexts:
        place = text.find(loaded.tokenizer.decode(context.ids))
        low, high = (0.70, 0.75) if context.held else (0, 0.70)
        assert low * len(text) <= place <= high * len(text) - len(context.ids)
    assert {loaded.tokenizer.decode(c.prefix) for c in contexts[0::2]} == {"<u>"}
    assert {len(c.prefix) for c in contexts[1::2]} == {0}
    assert all("Repeat the previous context" in loaded.tokenizer.decode(c.bridge) for c in contexts)
    assert all(len(c.prefix) + 2 * len(c.ids) + len(c.bridge) <= 256 for c in contexts)
    assert len({c.name for c in contexts}) == len(contexts)


def test_lengths_are_spread_from_short_to_long(request_of: Callable[..., Request], corpus: Path) -> None:
    loaded = resolve(request_of().model).load()
    loaded = replace(loaded, context=100_000)
    contexts = collect.cut(loaded, corpus.read_text() * 20, 40, 0)[:40]
    lengths = sorted(len(c.ids) for c in contexts)
    assert collect.SHORTEST <= lengths[0] < 300 and 3000 < lengths[-1] <= collect.LONGEST
    assert sum(length < 946 for length in lengths) == 20  # half lie below the geometric mean
    first = [len(c.ids) for c in contexts[:10]]
    assert min(first) < 600 and max(first) > 1500  # not in order of length


@pytest.mark.parametrize("kind", KEYS)
def test_the_seed_is_all_that_decides(kind: Kind, request_of: Callable[..., Request], tmp_path: Path) -> None:
    def content(name: str, **changes: Any) -> bytes:
        file = tmp_path / f"{name}.safetensors"
        fit(request_of(kind=kind, out=file, **changes))
        assert not file.with_name(file.name + ".work").exists()
        return file.read_bytes()

    torch.manual_seed(1)
    first = content("first")
    torch.manual_seed(2)
    assert content("second") == first
    assert content("third", seed=1) != first


def interrupted(monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException) -> list[int]:
    """The oracle raises after so many contexts; returns a list that grows with every context that it scores."""
    calls: list[int] = []
    scores = oracle.scores

    def counted(module: Any, prefix: Any, ids: Any, bridge: Any) -> Any:
        if len(calls) == after:
            raise error
        calls.append(len(ids))
        return scores(module, prefix, ids, bridge)

    monkeypatch.setattr(oracle, "scores", counted)
    return calls


def test_ctrl_c_loses_at_most_one_context(
    request_of: Callable[..., Request],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    request = request_of(out=tmp_path / "whole.safetensors")
    fit(request)
    out = tmp_path / "x.safetensors"
    line = ["trtpass", "fit", "kvzap", request.model, "--corpus", request.corpus, "--contexts", CONTEXTS, "--out", out]
    monkeypatch.setattr(sys, "argv", [str(part) for part in [*line, "--threads", 1, "--json"]])
    with monkeypatch.context() as patch:
        interrupted(patch, 3, KeyboardInterrupt())
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert stop.value.code == 2 and "interrupted" in capsys.readouterr().err
    work = tmp_path / "x.safetensors.work"
    assert len(list(work.glob("*.safetensors"))) == 3 and not out.exists()
    calls = interrupted(monkeypatch, 99, KeyboardInterrupt())
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    record = json.loads(capsys.readouterr().out)
    assert len(calls) == CONTEXTS + collect.MIN_HELD - 3
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes() and record["out"] == str(out)
    assert not work.exists() and {p.name for p in tmp_path.iterdir()} == {"x.safetensors", "whole.safetensors"}


def test_a_killed_fit_goes_on(request_of: Callable[..., Request], tmp_path: Path) -> None:
    request = request_of(contexts=24)
    work = tmp_path / "x.safetensors.work"
    line = ["fit", "kvzap", request.model, "--corpus", request.corpus, "--contexts", 24, "--threads", 1, "--out"]
    code = "import sys; from trtpass.cli import main; sys.argv[0] = 'trtpass'; main()"
    with subprocess.Popen([sys.executable, "-c", code, *map(str, line), str(request.out)]) as process:
        while len(list(work.glob("fitted-*"))) < 1 and process.poll() is None:
            time.sleep(0.005)
        process.kill()
    assert request.out is not None and not request.out.exists()
    assert 1 <= len(list(work.glob("*.safetensors"))) < 28
    assert fit(request)["contexts"] == {"fitted": 24, "held": 4}
    whole = request_of(contexts=24, out=tmp_path / "whole.safetensors")
    fit(whole)
    assert request.out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes() and not work.exists()


def test_both_kinds_from_one_work_folder(
    request_of: Callable[..., Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    fit(request_of(work=work, keep_work=True))
    calls = interrupted(monkeypatch, 0, RuntimeError("scored again"))
    fit(request_of(work=work, kind="mlp", out=tmp_path / "mlp"))  # a folder
    assert not calls and not work.exists()
    assert Surrogate.load(tmp_path / "mlp").kind == "mlp" and Surrogate.load(tmp_path / "x.safetensors").width == 96


def test_a_work_folder_of_another_request_is_refused(
    request_of: Callable[..., Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: Path
) -> None:
    with monkeypatch.context() as patch:
        interrupted(patch, 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            fit(request_of())
    other = tmp_path / "other.txt.gz"
    other.write_bytes(gzip.compress(corpus.read_bytes() + b"!"))
    another = save_tiny("llama", tmp_path / "another", vocab_size=256, max_position_embeddings=255, rms_norm_eps=1e-3)
    save_byte_tokenizer(another)
    weights = load_file(another / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] += 1e-3
    save_file(weights, another / "model.safetensors", metadata={"format": "pt"})
    for changes, words in (
        ({"seed": 4}, "another request: seed 0, not 4"),
        ({"contexts": 7}, "another request: contexts 6, not 7"),
        ({"corpus": other}, "another request: text "),
        ({"model": str(another)}, "another request: model "),
    ):
        with pytest.raises(InputError, match=words):
            fit(request_of(**changes))
    work = tmp_path / "x.safetensors.work"
    file = work / "fitted-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"fitted-00000\.safetensors cannot be read"):
        fit(request_of())
    (work / "manifest.json").write_text("[")
    with pytest.raises(InputError, match=r"manifest\.json cannot be read"):
        fit(request_of())
    (work / "manifest.json").unlink()
    with pytest.raises(InputError, match="is no work folder of a fit"):
        fit(request_of())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "tree"}, "--kind tree"),
        ({"contexts": 0}, "--contexts 0"),
        ({"seed": -1}, "--seed -1"),
        ({"threads": 0}, "--threads 0"),
        ({"contexts": 999}, "the text is too short: 999 contexts of"),
        ({"model": "none"}, "there is no model 'none'"),
    ],
)
def test_requests_that_cannot_be(request_of: Callable[..., Request], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        fit(request_of(**changes))


def test_a_corpus_too_short(request_of: Callable[..., Request], tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a few words " * 30)
    with pytest.raises(InputError, match="the text is too short"):
        fit(request_of(corpus=short))
    short.write_text("a")
    with pytest.raises(InputError, match="the text is too short"):
        fit(request_of(corpus=short))
    assert {p.name for p in tmp_path.iterdir()} == {"short.txt"}


def test_models_that_cannot_be_fitted(
    request_of: Callable[..., Request], model: Path, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no torch module or no tokenizer"):
        fit(request_of(model=str(tiny_folders["llama"])))
    broken = save_tiny("llama", tmp_path / "broken", vocab_size=256, max_position_embeddings=256)
    save_byte_tokenizer(broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="not finite"):
        fit(request_of(model=str(broken)))
    narrow = save_tiny("llama", tmp_path / "narrow", vocab_size=256, max_position_embeddings=64)
    save_byte_tokenizer(narrow)
    with pytest.raises(InputError, match="a model of 64 positions"):
        fit(request_of(model=str(narrow)))

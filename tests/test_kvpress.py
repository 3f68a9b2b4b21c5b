"""Agreement with NVIDIA's kvpress (docs/kvpress.md): the same weights, the same scores, the same keys evicted.

kvpress runs in its own environment (``make kvpress``); the oracle here is a boolean mask in PyTorch, ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from trtpass.bench.kvpress_worker import Worker, python
from trtpass.errors import InputError
from trtpass.kvzap.surrogate import KEYS, Kind, Surrogate
from trtpass.quiet import quiet

LAYERS, WIDTH, OWNERS = 2, 96, 2  # of the tiny models
KINDS: tuple[Kind, ...] = ("linear", "mlp")


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    try:
        python()
    except InputError as error:
        pytest.skip(str(error))
    with Worker(Path(__file__).with_name("kvpress_worker.py")) as process:
        yield process


def surrogate(kind: Kind, seed: int = 0) -> Surrogate:
    """Seeded weights whose scores spread by about 1 around -3, another mean for each head."""
    rng = np.random.default_rng(seed)
    inner = WIDTH // 8
    shapes = {"weight": (OWNERS, WIDTH), "0.weight": (inner, WIDTH), "2.weight": (OWNERS, inner)}

    def draw(key: str) -> np.ndarray:
        if key.endswith("weight"):
            return rng.standard_normal(shapes[key], np.float32) / math.sqrt(shapes[key][1])
        size = inner if key == "0.bias" else OWNERS
        return (rng.standard_normal(size) - (0 if key == "0.bias" else 3)).astype(np.float32)

    return Surrogate(kind, tuple({key: draw(key) for key in KEYS[kind]} for _ in range(LAYERS)))


def tokens(count: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(1).integers(0, 128, count)]


def evicted(score: np.ndarray, threshold: float, window: int, first: int) -> np.ndarray:
    """Our rule: the keys `[L, Hkv, T]` that a forward whose first query is at ``first`` does not see; no sinks."""
    return (score < threshold) & (np.arange(score.shape[-1]) <= first - 1 - window)


def by_mask(folder: Path, masks: np.ndarray, ids: list[int], starts: list[int]) -> np.ndarray:
    """Logits `[T, V]` of one dense forward over ``ids``; queries of chunk c, from ``starts[c]`` on, do not see the keys
    ``masks[c]`` `[L, Hkv, T]`."""
    visible = torch.ones(*masks.shape[1:3], len(ids), len(ids), dtype=torch.bool).tril()  # [L, Hkv, queries, keys]
    for start, end, mask in zip(starts, [*starts[1:], len(ids)], masks, strict=True):
        visible[:, :, start:end] &= ~torch.from_numpy(mask)[:, :, None]

    def attend(block: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **options: Any) -> Any:
        k, v, seen = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v, visible[block.layer_idx][None]))
        logits = (q @ k.mT * options["scaling"]).masked_fill(~seen, -torch.inf)
        return (logits.softmax(-1) @ v).transpose(1, 2), None

    transformers.AttentionInterface.register("by_mask", attend)
    with quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="by_mask").eval()
    with torch.inference_mode():
        return np.asarray(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0])


def run(worker: Worker, out: Path, **request: Any) -> dict[str, np.ndarray]:
    worker.ask("run", out=str(out), **request)
    with np.load(out) as made:
        return dict(made)


@pytest.mark.parametrize("kind", KINDS)
def test_our_checkpoint_loads_in_kvpress(worker: Worker, tmp_path: Path, kind: Kind) -> None:
    ours = surrogate(kind)
    ours.save(tmp_path / "ours")
    report = worker.ask("load", folder=str(tmp_path / "ours"), out=str(tmp_path / "loaded.npz"))
    assert report and not any(report.values()), report
    with np.load(tmp_path / "loaded.npz") as loaded:
        assert set(loaded) == set(ours.arrays())
        for name, array in ours.arrays().items():
            np.testing.assert_array_equal(loaded[name], array, strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_their_checkpoint_loads_in_us(worker: Worker, tmp_path: Path, kind: Kind) -> None:
    sizes = {"input_dim": WIDTH, "output_dim": OWNERS, "n_modules": LAYERS}
    worker.ask("save", folder=str(tmp_path / "theirs"), hidden_dim=12 if kind == "mlp" else None, **sizes)
    loaded = Surrogate.load(tmp_path / "theirs")
    assert loaded.kind == kind
    loaded.need(LAYERS, WIDTH, OWNERS)
    with np.load(tmp_path / "theirs.npz") as theirs:
        assert set(theirs) == set(loaded.arrays())
        for name, array in loaded.arrays().items():
            np.testing.assert_array_equal(array, theirs[name], strict=True)


@pytest.mark.parametrize(
    ("family", "kind", "prompt", "window", "chunks", "threshold"),
    [
        ("llama", "linear", 127, 128, [1] * 4, -3.0),  # the first keys leave the window while decoding
        ("llama", "mlp", 128, 128, [1] * 4, -3.0),
        ("qwen3", "linear", 129, 128, [1] * 4, -3.0),  # one key is judged at the end of the prefill
        ("qwen3", "mlp", 60, 8, [1] * 32, -3.0),
        ("llama", "linear", 60, 8, [1] * 32, -3.5),
        ("llama", "linear", 60, 8, [1, 3, 1, 2], -3.0),  # later turns of several tokens
        ("llama", "linear", 40, 8, [1] * 4, math.inf),  # everything before the window
        ("llama", "linear", 40, 8, [1] * 4, -math.inf),
        ("llama", "linear", 9, 0, [1] * 4, -3.0),
    ],
)
def test_the_same_keys_are_evicted(
    worker: Worker,
    tiny_folders: dict[str, Path],
    tmp_path: Path,
    family: str,
    kind: Kind,
    prompt: int,
    window: int,
    chunks: list[int],
    threshold: float,
) -> None:
    """Scores, keys hidden from every forward, and logits of what is decoded."""
    ours = surrogate(kind)
    ours.save(tmp_path / "ours")
    ids = tokens(prompt + sum(chunks))
    starts = [prompt + sum(chunks[:i]) for i in range(len(chunks))]
    made = run(
        worker,
        tmp_path / "run.npz",
        model=str(tiny_folders[family]),
        checkpoint=str(tmp_path / "ours"),
        threshold=threshold,
        window=window,
        prompt=ids[:prompt],
        chunks=[ids[start : start + count] for start, count in zip(starts, chunks, strict=True)],
    )
    score = ours.predict(torch.from_numpy(made["hidden"])).numpy()
    np.testing.assert_allclose(made["score"], score, rtol=0, atol=1e-4)
    rule = np.stack([evicted(score, threshold, window, first) for first in starts])
    np.testing.assert_array_equal(made["masked"], rule)
    assert rule.any() == (threshold > -math.inf)
    assert made["leak"].max() < 1e-6
    oracle = by_mask(tiny_folders[family], rule, ids, starts)[prompt:]
    np.testing.assert_allclose(made["logits"], oracle, rtol=0, atol=1e-4)


@pytest.mark.parametrize("count", [4, 6, 8])
def test_logits_differ_by_the_leak_at_most(
    worker: Worker, tiny_folders: dict[str, Path], tmp_path: Path, count: int
) -> None:
    """Queries of one turn share a fake key, which may then have a weight: logits are as far off, within a factor."""
    surrogate("linear").save(tmp_path / "ours")
    ids = tokens(60 + count)
    request = {"model": str(tiny_folders["qwen3"]), "checkpoint": str(tmp_path / "ours"), "window": 8}
    made = run(worker, tmp_path / "run.npz", prompt=ids[:60], chunks=[ids[60:]], threshold=-3.0, **request)
    gap = np.abs(made["logits"] - by_mask(tiny_folders["qwen3"], made["masked"], ids, [60])[60:]).max()
    assert gap <= 1e-4 + 10 * made["leak"].max()


def test_a_long_turn_over_masked_keys_fails_in_kvpress(
    worker: Worker, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    """64 x 3 queries of width 16 leave no direction that all of them ignore."""
    surrogate("linear").save(tmp_path / "ours")
    ids = tokens(124)
    request = {"model": str(tiny_folders["qwen3"]), "checkpoint": str(tmp_path / "ours"), "window": 8}
    with pytest.raises(InputError, match="Could not find fake keys"):
        run(worker, tmp_path / "run.npz", prompt=ids[:60], chunks=[ids[60:]], threshold=-3.0, **request)


def test_a_score_that_is_nan_keeps_the_key(worker: Worker, tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """Of the two heads, the one whose scores are NaN keeps all; ours stops with an error instead."""
    broken = surrogate("linear")
    for layer in broken.layers:
        layer["bias"][0] = np.nan
    broken.save(tmp_path / "broken")
    with pytest.raises(InputError, match="NaN"):
        Surrogate.load(tmp_path / "broken")
    ids = tokens(30)
    request = {"model": str(tiny_folders["llama"]), "checkpoint": str(tmp_path / "broken"), "window": 8}
    made = run(worker, tmp_path / "run.npz", prompt=ids[:29], chunks=[ids[29:]], threshold=math.inf, **request)
    assert not made["masked"][:, :, 0].any()
    assert made["masked"][0, :, 1].sum() == LAYERS * (29 - 8)


def test_the_benchmark_s_process(worker: Worker, tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """Tokens are greedy; masked keys free nothing; what is raised there is an error here."""
    surrogate("linear").save(tmp_path / "ours")
    ids = tokens(40)
    token = 2 * LAYERS * OWNERS * 16 * 4  # bytes
    with Worker() as process:
        with pytest.raises(InputError, match=r"kvpress, load: .*nowhere"):
            process.ask("load", model=str(tmp_path / "nowhere"), threads=1)
        loaded = process.ask("load", model=str(tiny_folders["llama"]), threads=1)
        assert loaded["transformers"] != transformers.__version__ and loaded["threads"] == 1
        dense = process.ask("prefill", tokens=ids)
        assert (dense["context"], dense["cache_bytes"], dense["masked"]) == (40, 40 * token, 0)
        made = process.ask("decode", count=5)["tokens"]
        plain = by_mask(tiny_folders["llama"], np.zeros((1, LAYERS, OWNERS, 45), bool), ids + made, [40])
        assert made == list(plain[39:44].argmax(-1))
        request = {"checkpoint": str(tmp_path / "ours"), "threshold": math.inf, "window": 8}
        pressed = process.ask("prefill", tokens=ids, **request)
        assert (pressed["cache_bytes"], pressed["masked"]) == (40 * token, 32 / 40)
        later = process.ask("decode", count=5)
        assert len(later["seconds"]) == 5 and min(later["seconds"]) > 0
        assert (later["context"], later["cache_bytes"], later["masked"]) == (45, 45 * token, 37 / 45)
        assert later["memory"]["peak"] is None or later["memory"]["peak"] >= later["memory"]["resident"] // 2


def test_where_there_is_no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from trtpass.bench import kvpress_worker

    monkeypatch.setattr(kvpress_worker, "ENVIRONMENT", tmp_path)
    with pytest.raises(InputError, match="make kvpress"):
        Worker()


def test_a_process_that_dies_is_an_error(worker: Worker, tmp_path: Path) -> None:
    file = tmp_path / "dies.py"
    file.write_text("raise SystemExit('no memory, say')")
    with Worker(file) as process, pytest.raises(InputError, match=r"exit code 1.*'load'.*no memory, say"):
        process.ask("load")

"""Quality of an engine with a cache policy, measured by the engine: its likelihoods are those of the oracle."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from families import save_tiny
from paged_proofs import save_surrogate
from tiny_engines import save_byte_tokenizer

from trtpass.build import Request, build
from trtpass.kvzap.frontier.plan import Plan, prompts
from trtpass.manifest import Manifest
from trtpass.masked import MaskedModel
from trtpass.quality import cache, render
from trtpass.text import Tokenizer
from trtpass.validate import pipeline_of

PLAN = Plan(cuts=(), fixed=(), texts=((60, 2),), passkeys=((400, 1),), continuation=12, repeat=16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quality") / "tiny"
    save_tiny("llama", folder, vocab_size=256, max_position_embeddings=512, eos_token_id=None)
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = np.random.default_rng(0).choice(["key", "value", "page", "slot", "token", "head"], 2000)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(words))
    return path


def engine(model: Path, root: Path, threshold: float) -> Path:
    weights = save_surrogate(root / "w.safetensors")
    return build(Request(str(model), [f"kvzap:threshold={threshold},window=16,weights={weights}"], out=root))[1]


def test_likelihoods_are_those_of_the_oracle(model: Path, text: Path, tmp_path: Path) -> None:
    from graphs import resolve

    folder = engine(model, tmp_path, 0.0)
    result = cache.measure(folder, text=text, plan=PLAN)
    manifest = Manifest.read(folder)
    (policy,) = pipeline_of(manifest, folder)
    module = resolve(str(model)).load().module
    expected: dict[tuple[str, str], list[float]] = {}
    for prompt in prompts(Tokenizer.open(folder), text.read_text(), PLAN):
        for probe in prompt.probes:
            ids = np.array([[*prompt.ids, *probe.ids]])
            token = np.arange(ids.shape[1])[None]
            starts = np.where(token < len(prompt.ids), 0, token)
            asked = len(prompt.ids) + np.arange(probe.first, len(probe.ids))[None] - 1
            for side, layers in (("dense", []), ("engine", [0, 1])):
                oracle = MaskedModel(module, policy if layers else None, layers, 16, 4)  # type: ignore[arg-type]
                logits = oracle.run(ids, starts, asked).logits[0].astype(np.float64)
                logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
                wanted = np.array(probe.ids[probe.first :])
                expected.setdefault((probe.name, side), []).append(float(logs[np.arange(len(wanted)), wanted].mean()))
    for (name, side), values in expected.items():
        (cell,) = (sides[side] for sides in result["results"][name].values())
        assert cell["mean"] == pytest.approx(np.mean(values), abs=1e-4), (name, side)
    (sides,) = result["results"]["repeat"].values()
    assert sides["engine"]["kept"] < 0.9 and sides["dense"]["kept"] == 1.0
    assert abs(sides["engine"]["mean"] - sides["dense"]["mean"]) > 1e-3
    assert manifest.quality is not None and "repeated after 60 tokens" in manifest.quality.metric
    assert manifest.quality.rewritten == sides["engine"]["mean"]
    assert json.loads((folder / cache.FILE).read_text()) == result
    assert len(render(result).renderables) == 3 * 4, "a table for each task"


def test_everything_kept_is_dense(model: Path, text: Path, tmp_path: Path) -> None:
    result = cache.measure(engine(model, tmp_path, -math.inf), text=text, plan=PLAN)
    for lengths in result["results"].values():
        for sides in lengths.values():
            assert sides["engine"]["mean"] == pytest.approx(sides["dense"]["mean"], abs=1e-5)
            assert sides["engine"]["kept"] == 1.0 and sides["engine"]["exact"] == sides["dense"]["exact"]

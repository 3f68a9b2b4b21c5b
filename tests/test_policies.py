"""Cache policies: what they add to a graph, what they decide, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import tiny
from families import Exported
from paged_proofs import KV_HEADS, LAYERS, WIDTH, save_surrogate
from proofs import probe, raised

from trtpass import passes
from trtpass.build import Request, build, slug
from trtpass.compare import Ladder
from trtpass.errors import AnchorError, InputError
from trtpass.kvzap.surrogate import Surrogate
from trtpass.masked import MaskedModel
from trtpass.pages import Pages
from trtpass.passes.cache_policy import CachePolicy, policy_of
from trtpass.passes.paged_cache import PagedCacheOptions, insert_paged_cache
from trtpass.passes.random_kv import PRIME, RandomKV, RandomKVOptions

Export = Callable[[str], Exported]
OTHERS = ("streaming-llm:window=9", "random-kv:window=9", "snapkv:window=9")


def policy(text: str) -> CachePolicy:
    made = passes.parse(text)
    assert isinstance(made, CachePolicy)
    return made


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_kvzap_scores_what_feeds_q_k_and_v(tiny_export: Export, tmp_path: Path, family: str, kind: str) -> None:
    """Scores and decisions of the graph = those of the checkpoint on torch's own hidden states; logits unchanged."""
    exported = tiny_export(family)
    step = policy(f"kvzap:threshold=0,window=8,weights={save_surrogate(tmp_path / 'w.safetensors', kind)}")
    dense = raised(exported)
    rewritten = dense.clone()
    result = step(rewritten)
    assert [o.name for o in rewritten.graph.outputs] == ["logits", "keep.0", "keep.1"]
    ladder = Ladder(
        exported.path.parent, dense, rewritten, [step], [result], probe([40, 23]), exported.loaded.module
    )  # fmt: skip
    check = ladder.rewrite()
    assert check.status == "passed" and check.flipped == 0.0, check
    assert 0 < 1 - float(np.mean(list(ladder.kept.values()))) < 1
    plain = MaskedModel(exported.loaded.module, None, [], 0, 0)
    ids, lengths = ladder.probe.input_ids, ladder.probe.lengths
    expected = plain.run(ids, np.zeros_like(ids), (lengths - 1)[:, None]).logits
    assert ladder.module is not None and np.abs(ladder.outputs(_last(rewritten))["logits"] - expected).max() < 1e-4


def _last(model: ir.Model) -> ir.Model:
    from trtpass.passes.logits import LastLogits

    copy = model.clone()
    LastLogits()(copy)
    return copy


@pytest.mark.parametrize("text", OTHERS)
def test_policies_without_a_checkpoint(tiny_export: Export, text: str) -> None:
    exported = tiny_export("llama")
    step = policy(text)
    dense = raised(exported)
    rewritten = dense.clone()
    result = step(rewritten)
    ladder = Ladder(
        exported.path.parent, dense, rewritten, [step], [result], probe([40, 23]), exported.loaded.module
    )  # fmt: skip
    check = ladder.rewrite()
    assert check.status == "passed" and check.flipped == 0.0, check
    alone = Ladder(exported.path.parent, dense, rewritten, [step], [result], probe([40, 23]), None)
    assert alone.rewrite().status == "passed" and alone.kept == ladder.kept
    told = alone.engine("portable")
    assert told.status == "passed" and "in ONNX" in told.reason, told


@pytest.mark.parametrize("torch", [True, False])
def test_a_cache_that_does_not_evict_is_found(
    tiny_export: Export, monkeypatch: pytest.MonkeyPatch, torch: bool
) -> None:
    """Decode steps that keep what leaves the window: both oracles see it."""
    settle = Pages.settle
    monkeypatch.setattr(
        Pages, "settle", lambda self, slot, keep, active: settle(self, slot, np.ones_like(keep), active)
    )
    exported = tiny_export("llama")
    step = policy("random-kv:window=2,keep=0.1")
    dense = raised(exported)
    rewritten = dense.clone()
    result = step(rewritten)
    module = exported.loaded.module if torch else None
    check = Ladder(exported.path.parent, dense, rewritten, [step], [result], probe([40, 23]), module).engine("portable")
    assert check.status == "failed" and "outputs differ" in check.reason


def test_a_wrong_scorer_is_found(tiny_export: Export, tmp_path: Path) -> None:
    """The check fails where the graph's weights are not the checkpoint's."""
    exported = tiny_export("llama")
    step = policy(f"kvzap:threshold=0,window=8,weights={save_surrogate(tmp_path / 'w.safetensors')}")
    dense = raised(exported)
    rewritten = dense.clone()
    result = step(rewritten)
    bias = next(v for n, v in rewritten.graph.initializers.items() if n == "layer1.kvzap.bias")
    bias.const_value = ir.tensor(bias.const_value.numpy() + np.float32(0.3), name=bias.name)  # type: ignore[union-attr]
    ladder = Ladder(
        exported.path.parent, dense, rewritten, [step], [result], probe([40, 23]), exported.loaded.module
    )  # fmt: skip
    assert ladder.rewrite().status == "failed"


def test_chosen_layers_keep_their_policy_and_others_everything(tiny_export: Export, tmp_path: Path) -> None:
    from paged_proofs import paged_engine, tokens

    step = policy(f"kvzap:threshold=inf,window=8,layers=1,weights={save_surrogate(tmp_path / 'w.safetensors')}")
    state = paged_engine(raised(tiny_export("llama")), step).prefill([tokens(60, 0)])
    assert state.pages.held.tolist() == [[[60, 60]], [[13, 13]]]


def test_random_keys_are_about_as_many_as_asked() -> None:
    import torch

    from trtpass.passes.cache_policy import Keys

    positions = torch.arange(4000)[None]
    k = torch.zeros(1, 3, 4000, 4)
    shares = []
    for layer in range(8):
        step = RandomKV(RandomKVOptions(keep=0.3))
        keep = step.decide(Keys(layer, k, k, k, positions, torch.tensor([4000]), 1.0)).keep[0]
        shares += keep.float().mean(-1).tolist()
    assert np.abs(np.array(shares) - 0.3).max() < 0.03
    assert (PRIME - 1) ** 2 < 2**31


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": LAYERS + 1}, "layers 3, layer 0 of the graph has 2"),
        ({"width": WIDTH - 32}, "hidden width 64, layer 0 of the graph has 96"),
        ({"heads": KV_HEADS + 1}, "KV heads 3, layer 0 of the graph has 2"),
    ],
)
def test_a_checkpoint_of_another_model(
    tiny_export: Export, tmp_path: Path, changes: dict[str, int], words: str
) -> None:
    wanted = {"layers": LAYERS, "width": WIDTH, "heads": KV_HEADS, **changes}
    layer = {
        "weight": np.zeros((wanted["heads"], wanted["width"]), np.float32),
        "bias": np.zeros(wanted["heads"], np.float32),
    }
    Surrogate("linear", (layer,) * wanted["layers"]).save(tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=words):
        policy(f"kvzap:weights={tmp_path / 'w.safetensors'}")(raised(tiny_export("llama")))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kvzap:threshold=nan", "threshold=nan"),
        ("kvzap:kind=forest", "kind=forest"),
        ("kvzap:window=-1", "window=-1"),
        ("kvzap:removed=1.5", "removed=1.5"),
        ("streaming-llm:sinks=-1", "sinks=-1"),
        ("snapkv:keep=0", "keep=0"),
        ("snapkv:pool=4", "pool=4"),
        ("snapkv:window=0", "window=0"),
        ("random-kv:keep=1.5", "keep=1.5"),
    ],
)
def test_bad_options(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        passes.parse(text)


def test_what_a_policy_needs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no weights for this graph"):
        policy("kvzap")(tiny.decoder())
    with pytest.raises(InputError, match="there is no file"):
        policy(f"kvzap:weights={tmp_path / 'none.safetensors'}")(tiny.decoder())
    linear = save_surrogate(tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"kind=mlp, but w\.safetensors holds the linear kind"):
        policy(f"kvzap:kind=mlp,weights={linear}")(tiny.decoder())
    with pytest.raises(AnchorError, match="layer 0 cannot use a cache: attention is bidirectional"):
        policy("streaming-llm")(tiny.decoder(causal=False))
    model = tiny.decoder()
    policy("streaming-llm")(model)
    with pytest.raises(InputError, match="the graph already has a policy"):
        policy("random-kv")(model)
    with pytest.raises(InputError, match="cache policies streaming-llm, random-kv"):
        policy_of([policy("streaming-llm"), policy("random-kv")])


def test_requests_that_are_refused(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    model = str(tiny_folders["llama"])
    with pytest.raises(InputError, match="pages of 48 slots for a context of 512 tokens"):
        build(Request(model, ["streaming-llm"], out=tmp_path, page=48))
    with pytest.raises(InputError, match="the cache policy streaming-llm alone"):
        build(Request(model, ["token-sparse", "streaming-llm"], out=tmp_path))
    with pytest.raises(InputError, match="pages of 0 slots"):
        insert_paged_cache(tiny.decoder(), PagedCacheOptions(page=0))
    assert not list(tmp_path.rglob("*.onnx"))


def test_an_engine_carries_its_checkpoint(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """The folder is whole: it validates after the checkpoint that it was built from is gone."""
    from trtpass.manifest import Manifest
    from trtpass.validate import validate

    weights = save_surrogate(tmp_path / "w.safetensors", "mlp")
    request = Request(str(tiny_folders["llama"]), [f"kvzap:threshold=inf,window=16,weights={weights}"], out=tmp_path)
    manifest, folder = build(request)
    assert not manifest.checks.failed and manifest.checks.engine.status == "passed", manifest.checks
    assert "boolean-mask oracle" in manifest.checks.engine.reason
    assert manifest.page == 64 and manifest.passes[0].options["weights"] == "policy.safetensors"
    assert manifest.passes[0].warnings and manifest.passes[0].pruned is not None and manifest.passes[0].pruned > 0.5
    assert folder.name == slug([policy(f"kvzap:threshold=inf,window=16,weights={weights}")], "cpu")
    assert str(tmp_path) not in folder.name
    weights.unlink()
    assert validate(folder).engine.status == "passed"
    assert Manifest.read(folder).checks.rewrite.status == "passed"


def test_infinities_are_legal() -> None:
    assert policy(f"kvzap:threshold={-math.inf}").warnings() == ()
    assert len(policy("kvzap:threshold=inf").warnings()) == 1


def test_a_share_names_a_threshold(tmp_path: Path) -> None:
    """Where the checkpoint says what its scores are; a threshold that is given goes before it."""
    plain = Surrogate.load(save_surrogate(tmp_path / "plain.safetensors"))
    assert plain.threshold(0.5) is None
    scores = tuple(float(x) for x in np.linspace(-10, 0, 101))
    Surrogate(plain.kind, plain.layers, scores).save(tmp_path / "told.safetensors")
    told = Surrogate.load(tmp_path / "told.safetensors")
    assert told.quantiles == pytest.approx(scores, abs=1e-4)
    assert [told.threshold(x) for x in (0.0, 0.25, 0.755, 1.0)] == [-math.inf, -7.5, -2.45, math.inf]

    def described(text: str) -> dict[str, object]:
        return policy(f"kvzap:weights={tmp_path}/{text}").describe()

    assert described("told.safetensors,removed=0.25")["threshold"] == -7.5
    assert described("told.safetensors")["threshold"] == -2.5
    assert described("told.safetensors,removed=1")["threshold"] == "inf"
    assert described("told.safetensors,removed=0.25,threshold=-3")["threshold"] == -3.0
    with pytest.raises(InputError, match=r"no threshold, and the checkpoint has none for removed=0\.75"):
        described("plain.safetensors")
    again = type(policy("kvzap")).described(described("told.safetensors,removed=1"))
    assert again.options.threshold == math.inf


@pytest.mark.parametrize("text", ["[1, 2]", "nonsense", str([3.0] * 100 + [2.0]), str(["x"] * 101)])
def test_broken_quantiles_are_refused(tmp_path: Path, text: str) -> None:
    from safetensors.numpy import save_file

    arrays = Surrogate.load(save_surrogate(tmp_path / "w.safetensors")).arrays()
    save_file(arrays, tmp_path / "bad.safetensors", metadata={"trtpass.quantiles": text})
    with pytest.raises(InputError, match=r"metadata 'trtpass\.quantiles' is"):
        Surrogate.load(tmp_path / "bad.safetensors")

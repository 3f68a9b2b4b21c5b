"""A paged cache on ONNX Runtime = the boolean-mask oracle in torch, and what a user of it may do."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from families import Exported, save_tiny
from paged_proofs import KV_HEADS, LAYERS, Proof, paged_engine, proof, save_surrogate, tokens
from proofs import raised

from trtpass import passes
from trtpass.errors import InputError
from trtpass.kvzap.surrogate import Surrogate
from trtpass.masked import MaskedModel
from trtpass.paged import CacheFull, PagedEngine
from trtpass.passes.cache_policy import CachePolicy
from trtpass.runtime import Engine

STEPS = 64
ATOL = 1e-4  # the issue's: float32 on both sides, logits of a few units
Export = Callable[[str], Exported]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kvzap")
    return {kind: save_surrogate(root / f"{kind}.safetensors", kind) for kind in ("linear", "mlp")}


@pytest.fixture(scope="module")
def long_export(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A tiny Llama with a context of 8192 tokens."""
    from graphs import resolve
    from trtpass import io
    from trtpass.export import export

    root = tmp_path_factory.mktemp("long")
    loaded = resolve(str(save_tiny("llama", root / "tiny-long", max_position_embeddings=8192))).load()
    path = root / "model.onnx"
    model = export(loaded.module, loaded.config, context=loaded.context)
    io.save(model, path)
    return Exported(loaded, model, path)


def kvzap(path: Path, threshold: float, **options: object) -> str:
    more = "".join(f",{key}={value}" for key, value in options.items())
    return f"kvzap:threshold={threshold},weights={path}{more}"


def check(one: Proof, lengths: list[int], steps: int = STEPS, evicts: bool = True) -> None:
    rows = [tokens(n, i) for i, n in enumerate(lengths)]
    later = [tokens(steps, 100 + i) for i in range(len(lengths))]
    state, got, forced, free = one.run(rows, later)
    assert np.abs(got - forced.logits).max() < ATOL
    assert np.abs(got - free.logits).max() < ATOL, "no decision of these texts lies on the cut"
    if evicts:
        dense = MaskedModel(one.oracle.module, None, [], 0, 0)
        ids, starts, asked, prompt = one.text(rows, later)
        assert np.abs(got - dense.run(ids, starts, asked, None, prompt).logits).max() > 100 * ATOL, "nothing was hidden"
        assert state.kept().min() < 0.95


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [127, 128, 129, 1000])
def test_engine_is_the_oracle(long_export: Exported, weights: dict[str, Path], length: int, batch: int) -> None:
    """Around the window of 128: the first key that may be evicted is hidden from the query at position 129 + sinks."""
    for threshold in (-0.5, 0.5):
        one = proof(long_export, kvzap(weights["linear"], threshold))
        check(one, [length, length // 2 + 70, length - 20][:batch])


@pytest.mark.parametrize(("threshold", "batch"), [(-0.5, 1), (0.0, 3), (0.5, 1)])
def test_engine_is_the_oracle_after_4000_tokens(
    long_export: Exported, weights: dict[str, Path], threshold: float, batch: int
) -> None:
    check(proof(long_export, kvzap(weights["mlp"], threshold), page=64), [4000, 2070, 3980][:batch])


@pytest.mark.parametrize(
    ("family", "target", "page"), [("qwen3", "portable", 1), ("qwen3", "cpu", 7), ("llama", "portable", 64)]
)
def test_other_families_targets_and_pages(
    tiny_export: Export, weights: dict[str, Path], family: str, target: str, page: int
) -> None:
    one = proof(tiny_export(family), kvzap(weights["mlp"], 0.0, window=16, sinks=0), target, page)
    check(one, [70, 9, 33], 24)


@pytest.mark.parametrize(
    "text", ["streaming-llm:window=12", "random-kv:window=12,keep=0.3", "snapkv:window=12,keep=0.4",
             "random-kv:window=0,keep=0.3,sinks=1,layers=1"],
)  # fmt: skip
def test_other_policies(tiny_export: Export, text: str) -> None:
    check(proof(tiny_export("llama"), text), [70, 9, 33], 24)


def test_everything_kept_is_the_dense_engine(tiny_export: Export, weights: dict[str, Path]) -> None:
    """-inf: bit for bit the engine without a policy, and the dense cache to rounding."""
    from trtpass.passes.cache import insert_cache
    from trtpass.passes.lower import lower

    dense = raised(tiny_export("llama"))
    policy = passes.parse(kvzap(weights["linear"], -math.inf))
    assert isinstance(policy, CachePolicy)
    rows, later = [tokens(150, 0), tokens(40, 1)], [tokens(30, 2), tokens(30, 3)]

    def run(engine: Engine) -> np.ndarray:
        state = engine.prefill(rows)
        return np.stack([state.logits, *(engine.decode(state, list(t)) for t in zip(*later, strict=True))])

    ours = run(paged_engine(dense, policy))
    assert np.array_equal(ours, run(paged_engine(dense, None)))
    plain = Engine.open({phase: lower(insert_cache(dense, phase), "cpu").model for phase in ("prefill", "decode")})
    assert not isinstance(plain, PagedEngine)
    assert np.abs(ours - run(plain)).max() < 1e-5


def test_nothing_kept_leaves_the_window(tiny_export: Export, weights: dict[str, Path]) -> None:
    one = proof(tiny_export("llama"), kvzap(weights["linear"], math.inf, window=16))
    check(one, [70, 33], 24)
    state = one.engine.prefill([tokens(70, 0)])
    assert (state.pages.held == 4 + 16 + 1).all()
    result = passes.parse(kvzap(weights["linear"], math.inf))(raised(tiny_export("llama")))
    assert result.warnings == ("threshold=inf evicts every key that leaves the window of 128",)


def test_a_tie_is_kept(tiny_export: Export, tmp_path: Path) -> None:
    """A score that equals the threshold stays: here all of the first KV head do, and those of the second lie below."""
    bias = np.array([0.5, np.nextafter(np.float32(0.5), np.float32(0))], np.float32)
    layer = {"weight": np.zeros((KV_HEADS, 96), np.float32), "bias": bias}
    Surrogate("linear", (layer,) * LAYERS).save(tmp_path / "tie.safetensors")
    one = proof(tiny_export("llama"), kvzap(tmp_path / "tie.safetensors", 0.5, window=8))
    state = one.engine.prefill([tokens(60, 0)])
    assert state.pages.held.tolist() == [[[60, 4 + 8 + 1]]] * LAYERS


@pytest.mark.parametrize("chunk", [None, 13])
def test_a_later_turn(tiny_export: Export, weights: dict[str, Path], chunk: int | None) -> None:
    """A turn of 50 tokens over a compacted cache sees every key that was kept and, causally, itself; then decode."""
    one = proof(tiny_export("llama"), kvzap(weights["linear"], 0.0, window=16))
    rows, first = [tokens(70, 0), tokens(33, 1)], [tokens(9, 2), tokens(9, 3)]
    turn, last = [tokens(50, 4), tokens(20, 5)], [7, 9]
    state = one.engine.prefill(rows)
    for pair in zip(*first, strict=True):
        one.engine.decode(state, list(pair))
    answers = [one.engine.append(state, turn, chunk).copy(), one.engine.decode(state, last)]
    for b, row in enumerate(rows):
        text = [*row, *first[b], *turn[b], last[b]]
        start = len(row) + len(first[b])
        position = np.arange(len(text))
        starts = np.where(position < len(row), 0, position)
        starts[start : start + len(turn[b])] = start
        asked = np.array([[len(text) - 2, len(text) - 1]])
        expected = one.oracle.run(np.array([text]), starts[None], asked).logits[0]
        assert np.abs(np.stack([a[b] for a in answers]) - expected).max() < ATOL


def test_a_turn_of_some_rows(tiny_export: Export, weights: dict[str, Path]) -> None:
    """A row without tokens is left as it is, and goes on as if the turn had not been."""
    engine = proof(tiny_export("llama"), kvzap(weights["linear"], 0.0, window=16)).engine
    rows = [tokens(70, 0), tokens(33, 1)]
    with_turn, without = engine.prefill(rows), engine.prefill(rows)
    before = with_turn.logits[1].copy()
    engine.append(with_turn, [tokens(20, 2), []])
    assert np.array_equal(with_turn.logits[1], before)
    assert np.abs(engine.decode(with_turn, [1, 2])[1] - engine.decode(without, [1, 2])[1]).max() < 1e-5


def test_chunks_change_nothing_but_the_peak(tiny_export: Export, weights: dict[str, Path]) -> None:
    engine = proof(tiny_export("llama"), kvzap(weights["linear"], 0.0, window=16)).engine
    rows = [tokens(70, 0), tokens(33, 1), tokens(5, 2)]
    whole, pieces = engine.prefill(rows), engine.prefill(rows, chunk=16)
    assert np.abs(whole.logits - pieces.logits).max() < 1e-5
    assert np.array_equal(whole.pages.held, pieces.pages.held)
    assert whole.bytes_held == pieces.bytes_held
    assert np.abs(engine.decode(whole, [1, 2, 3]) - engine.decode(pieces, [1, 2, 3])).max() < 1e-5
    with pytest.raises(CacheFull):  # every key is there until the prompt ends
        engine.prefill(rows, chunk=16, pages=int(whole.pages.pages_held // LAYERS))
    assert engine.prefill(rows, pages=int(whole.pages.pages_held // LAYERS) + 1).pages.pages_held


def test_a_row_that_ends_early_gives_its_pages_back(tiny_export: Export, weights: dict[str, Path]) -> None:
    engine = proof(tiny_export("llama"), kvzap(weights["linear"], 0.0, window=16)).engine
    rows = [tokens(70, 0), tokens(33, 1)]
    both, alone = engine.prefill(rows), engine.prefill(rows[1:])
    held = both.pages.pages_held
    engine.release(both, 0)
    assert both.pages.pages_held == alone.pages.pages_held < held
    for step in range(20):
        mine = engine.decode(both, [5, step], [False, True])[1]
        assert np.abs(mine - engine.decode(alone, [step])[0]).max() < 1e-5
    assert both.pages.pages_held == alone.pages.pages_held, "a row that has ended takes no page"
    assert both.lengths.tolist() == [70, 53]


def test_generate_stops_rows_and_counts_bytes(tiny_export: Export, weights: dict[str, Path]) -> None:
    engine = proof(tiny_export("llama"), kvzap(weights["linear"], 0.0, window=16)).engine
    rows = [tokens(70, 0), tokens(33, 1)]
    alone = [[step.tokens[0] for step in engine.generate([row], 12)] for row in rows]
    end = next(i for i, token in enumerate(alone[1]) if token not in alone[0])
    stop = alone[1][end]
    assert stop is not None
    steps = list(engine.generate(rows, 12, [stop]))
    assert [step.tokens[0] for step in steps] == alone[0]
    assert [step.tokens[1] for step in steps if step.tokens[1] is not None] == alone[1][: end + 1]
    usage = engine.usage
    assert usage is not None and usage.bytes > 0 and (usage.kept > 0).all() and (usage.kept < 1).all()


def test_a_full_cache_is_one_error_and_loses_nothing(tiny_export: Export, weights: dict[str, Path]) -> None:
    engine = proof(tiny_export("llama"), kvzap(weights["linear"], -math.inf), page=8).engine
    prompt = [tokens(30, 0)]
    with pytest.raises(CacheFull, match="the KV cache is full: layer 0 wants 8 pages, and 7 of 7 are free"):
        engine.prefill(prompt, pages=7)
    state = engine.prefill(prompt, pages=8)  # 32 slots for each of two heads
    answers = [engine.decode(state, [t]).copy() for t in (3, 4)]
    with pytest.raises(CacheFull):
        engine.decode(state, [5])
    assert state.lengths.tolist() == [32]
    engine.limit_pages = 8
    made = []
    with pytest.raises(CacheFull):
        made.extend(step.tokens[0] for step in engine.generate(prompt, 20))
    made = []
    try:
        for step in engine.generate(prompt, 20):
            made.append(step.tokens[0])
    except CacheFull:
        pass
    assert len(made) == 3, "two steps fit behind the prompt, and the token after the second is known"
    fresh = engine.prefill(prompt)
    assert np.abs(engine.decode(fresh, [3]) - answers[0]).max() < 1e-5


def test_bad_requests(tiny_export: Export, weights: dict[str, Path]) -> None:
    engine = proof(tiny_export("llama"), kvzap(weights["linear"], 0.0)).engine
    state = engine.prefill([tokens(20, 0)], capacity=24)
    with pytest.raises(InputError, match="row 0 has 20 tokens and 4 slots left for 5"):
        engine.append(state, [tokens(5, 1)])
    with pytest.raises(InputError, match="2 rows of tokens for 1 rows"):
        engine.append(state, [[1], [2]])
    with pytest.raises(InputError, match="token id 128"):
        engine.append(state, [[128]])
    engine.append(state, [tokens(4, 1)])
    with pytest.raises(InputError, match="row 0 has 24 tokens and no slot left"):
        engine.decode(state, [1])
    with pytest.raises(InputError, match="a cache of 0 pages"):
        engine.prefill([tokens(20, 0)], pages=0)


def test_nan_scores_are_one_error(tiny_export: Export, weights: dict[str, Path]) -> None:
    """Where activations overflow: the score of the layer is NaN, and the key counts as kept."""
    exported = tiny_export("llama")
    policy = passes.parse(kvzap(weights["linear"], 0.0, window=4))
    assert isinstance(policy, CachePolicy)
    dense = raised(exported)
    norm = next(v for v in dense.graph.initializers.values() if v.shape is not None and list(v.shape) == [96])
    value = np.array(norm.const_value.numpy())  # type: ignore[union-attr]
    value[:] = np.nan
    import onnx_ir as ir

    norm.const_value = ir.tensor(value, name=norm.name)
    engine = paged_engine(dense, policy)
    with pytest.raises(InputError, match=r"the policy's score of layer 0, KV head 0 is NaN \(row 0, token 0"):
        engine.prefill([tokens(20, 0)])

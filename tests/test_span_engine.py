"""Engines of shortened prompts: caches that hold fewer tokens, decode steps, later turns, whole batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from families import VOCAB, Exported
from proofs import ladder, raised

from trtpass import passes
from trtpass.build import Request, build
from trtpass.errors import InputError
from trtpass.passes.cache import insert_cache
from trtpass.passes.lower import lower
from trtpass.reduction.decoder import SPAN_KEY
from trtpass.runtime import Engine

FASTV, FICOCO = "fastv:span=3:20,layer=1", "ficoco-l:span=3:-5,layers=0,keep=0.5,eps=0.9"
LENGTHS = [40, 27, 33]


@pytest.fixture(scope="module")
def llama(tiny_export: Callable[[str], Exported]) -> Exported:
    return tiny_export("llama")


def opened(exported: Exported, text: str, target: str, **options: int) -> Engine:
    dense = raised(exported)
    rewritten = dense.clone()
    passes.parse(text)(rewritten)
    record = rewritten.metadata_props[SPAN_KEY]
    graphs = {
        "prefill": insert_cache(rewritten, "prefill", **options),
        "decode": insert_cache(dense, "decode", shortened=record, **options),
    }
    return Engine.open({phase: lower(graph, target).model for phase, graph in graphs.items()}, threads=1, context=96)


def prompts(seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length).tolist() for length in LENGTHS]


@pytest.mark.parametrize("target", ["portable", "cpu"])
@pytest.mark.parametrize("text", [FASTV, FICOCO])
def test_the_ladder(llama: Exported, text: str, target: str) -> None:
    """Prefill, its caches, and 16 decode steps of a ragged batch, against the twin, which has no cache."""
    check = ladder(llama, [text], LENGTHS).engine(target)
    assert check.status == "passed" and check.flipped == 0.0 and "16 decode steps" in check.reason, check
    assert check.max_abs is not None and check.max_abs < 1e-3


def test_decode_steps_that_forget_what_was_dropped_fail(llama: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    from trtpass import span_checks

    proof = ladder(llama, [FASTV], LENGTHS)
    honest = span_checks._decode
    monkeypatch.setattr(
        span_checks, "_decode",
        lambda a, b, c, made, ids: honest(a, b, c, {**made, "dropped": np.zeros_like(made["dropped"])}, ids),
    )  # fmt: skip
    assert proof.engine("portable").status == "failed"


@pytest.mark.parametrize("text", [FASTV, FICOCO])
def test_a_batch_is_as_its_rows_alone(llama: Exported, text: str) -> None:
    engine, rows = opened(llama, text, "cpu"), prompts()
    together = [step.tokens for step in engine.generate(rows, 8)]
    for row, ids in enumerate(rows):
        assert [step.tokens[0] for step in engine.generate([ids], 8)] == [tokens[row] for tokens in together]


def test_caches_are_shorter(llama: Exported) -> None:
    state = opened(llama, FASTV, "cpu").prefill(prompts(), capacity=64)
    slots = {name: value.shape()[2] for name, value in state.cache.items()}
    # 17 tokens of the span, 9 of them stay (half up): 8 slots less from layer 1 on
    assert slots == {"past.0.key": 64, "past.0.value": 64, "past.1.key": 56, "past.1.value": 56}
    assert state.dropped is not None and state.dropped.tolist() == [[0, 0, 0], [8, 8, 8]]


def test_the_shorter_cache_takes_every_token_up_to_the_capacity(llama: Exported) -> None:
    engine, rows = opened(llama, FICOCO, "portable"), prompts()
    state = engine.prefill(rows, capacity=44)
    assert state.cache["past.1.key"].shape()[2] < 44
    for _ in range(4):
        engine.decode(state, [1, 2, 3])
    with pytest.raises(InputError, match="no slot left"):
        engine.decode(state, [1, 2, 3])
    roomy = engine.prefill(rows, capacity=96)
    for _ in range(4):
        engine.decode(roomy, [1, 2, 3])
    np.testing.assert_allclose(state.logits, roomy.logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk", [None, 3])
def test_a_later_turn(llama: Exported, chunk: int | None) -> None:
    engine, rows = opened(llama, FICOCO, "cpu"), prompts()
    turn = [[5, 6, 7, 8], [9], []]
    state = engine.prefill(rows)
    stepped = engine.prefill(rows)
    engine.append(state, turn, chunk)
    for step in range(4):
        tokens = [ids[step] if step < len(ids) else 0 for ids in turn]
        engine.decode(stepped, tokens, [step < len(ids) for ids in turn])
        for row, ids in enumerate(turn):
            if step == len(ids) - 1:
                np.testing.assert_allclose(state.logits[row], stepped.logits[row], atol=1e-4, rtol=0)
    assert list(state.lengths) == [44, 28, 33]


def test_a_fixed_capacity(llama: Exported) -> None:
    fixed, free = opened(llama, FASTV, "cpu", capacity=48), opened(llama, FASTV, "cpu")
    state = fixed.prefill(prompts())
    assert fixed.context == 48 and state.cache["past.1.key"].shape()[2] == 40
    np.testing.assert_allclose(state.logits, free.prefill(prompts()).logits, atol=1e-4, rtol=0)


def test_refusals(llama: Exported) -> None:
    engine = opened(llama, FASTV, "cpu")
    for call in (engine.prefill, lambda rows: engine.generate(rows, 4)):
        with pytest.raises(InputError, match="span 3:20 of method 'fastv' needs at least 21 tokens, row 1 has 20"):
            call([[1] * 40, [2] * 20])
    with pytest.raises(InputError, match="whole prompts"):
        engine.prefill(prompts(), chunk=4)


def test_a_row_without_a_span_of_its_own_drops_nothing(llama: Exported) -> None:
    state = opened(llama, FICOCO, "cpu").prefill([[1] * 30, [2] * 6])
    assert state.dropped is not None and state.dropped[1, 0] == 11 and state.dropped[1, 1] == 0


def test_build_refuses(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = str(tiny_folders["llama"])
    with pytest.raises(InputError, match="alone"):
        build(Request(folder, [FASTV, "tome:r=1"], out=tmp_path))
    with pytest.raises(InputError, match="well inside the 512 tokens"):
        build(Request(folder, ["fastv:span=4:510,layer=1"], out=tmp_path))


def test_build_from_an_onnx_file(llama: Exported, tmp_path: Path) -> None:
    """Without a torch model: graphs are compared with each other."""
    manifest, folder = build(Request(str(llama.path), [FASTV], out=tmp_path))
    assert not manifest.checks.failed and manifest.checks.engine.status == "passed"
    assert manifest.whole_prompt == "fastv" and 0 < (manifest.passes[0].pruned or 0) < 1
    steps = list(Engine.open(folder, threads=1).generate(prompts(), 3))
    assert len(steps) == 3

"""Text generation: greedy tokens are transformers' own, ragged batches and chunks change nothing, limits are said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_engines import CONTEXT, tiny_engine, tiny_model

from trtpass.errors import InputError
from trtpass.generate import generate
from trtpass.manifest import Manifest

PROMPTS = ["The quick brown fox", "a", "x = [1, 2,", "Ünïcödé text"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_engine(tmp_path_factory, "dense")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """40 greedy tokens of each prompt by transformers, one prompt at a time."""
    from graphs import resolve

    loaded = resolve(str(tiny_model(tmp_path_factory))).load()
    return [greedy(loaded, prompt, 40) for prompt in PROMPTS]


def greedy(loaded: Any, prompt: str, count: int) -> list[int]:
    import torch

    ids = torch.tensor([loaded.tokenizer(prompt)["input_ids"]])
    with torch.inference_mode():
        out = loaded.module.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
    return [int(token) for token in out[0, ids.shape[1] :]]


def test_greedy_tokens_are_those_of_transformers(dense: Path, expected: list[list[int]]) -> None:
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        (row,) = generate(dense, [prompt], max_tokens=40)
        assert row["tokens"] == tokens and row["stopped"] == "length"
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)


def test_a_ragged_batch_gives_each_row_its_own_tokens(dense: Path, expected: list[list[int]]) -> None:
    rows = generate(dense, PROMPTS, max_tokens=40)
    assert [row["tokens"] for row in rows] == expected
    assert [row["prompt_tokens"] for row in rows] == [len(prompt.encode()) for prompt in PROMPTS]


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_chunks_change_nothing(dense: Path, expected: list[list[int]], chunk: int) -> None:
    rows = generate(dense, PROMPTS, max_tokens=12, chunk=chunk)
    assert [row["tokens"] for row in rows] == [tokens[:12] for tokens in expected]


def test_text_streams_in_pieces_that_join(dense: Path) -> None:
    pieces: list[str] = []
    (row,) = generate(dense, PROMPTS[:1], max_tokens=20, write=pieces.append)
    assert "".join(pieces) == row["text"] + "\n" and len(pieces) > 3


def test_stop_texts_end_rows(dense: Path) -> None:
    whole = generate(dense, PROMPTS, max_tokens=40)
    text = whole[0]["text"]
    stops = [text[7:9], "never in any answer"]
    pieces: list[str] = []
    (row,) = generate(dense, PROMPTS[:1], max_tokens=40, stop=stops, write=pieces.append)
    assert row["text"] == text[: text.index(stops[0])] and row["stopped"] == "stop"
    assert "".join(pieces) == row["text"] + "\n"
    assert row["tokens"] == whole[0]["tokens"][: len(row["tokens"])] and len(row["tokens"]) < 40
    for alone, together in zip(whole, generate(dense, PROMPTS, max_tokens=40, stop=stops), strict=True):
        places = [alone["text"].find(stop) for stop in stops if stop in alone["text"]]
        assert together["text"] == alone["text"][: min(places, default=None)]
        assert together["stopped"] == ("stop" if places else "length")


def test_what_a_stop_text_withheld_is_shown_at_the_end(dense: Path) -> None:
    (whole,) = generate(dense, PROMPTS[:1], max_tokens=12)
    (row,) = generate(dense, PROMPTS[:1], max_tokens=12, stop=[whole["text"][-3:] + "x"])
    assert row == whole


def test_top_p(dense: Path) -> None:
    options: dict[str, Any] = {"max_tokens": 30, "temperature": 1.5, "seed": 3}
    (greedy,) = generate(dense, PROMPTS[:1], max_tokens=30)
    assert generate(dense, PROMPTS[:1], top_p=1e-9, **options) == [greedy]
    sampled = [generate(dense, PROMPTS[:1], top_p=p, **options)[0]["tokens"] for p in (0.5, 0.9, 1.0)]
    assert len({tuple(tokens) for tokens in sampled}) == 3
    for bad in (0.0, 1.5, float("nan")):
        with pytest.raises(InputError, match="top_p"):
            generate(dense, PROMPTS[:1], max_tokens=4, top_p=bad)


def test_a_sparse_engine_generates_and_refuses_chunks(tmp_path_factory: pytest.TempPathFactory) -> None:
    sparse = tiny_engine(tmp_path_factory, "sparse")
    prompt = "A prompt that is long enough for some of its tokens to be dropped."
    (row,) = generate(sparse, [prompt], max_tokens=8)
    assert len(row["tokens"]) == 8
    with pytest.raises(InputError) as caught:
        generate(sparse, [prompt], max_tokens=8, chunk=16)
    message = str(caught.value)
    assert "chunks of 16" in message and "token-sparse" in message and "dense engine" in message


def test_the_context_limit_is_said(dense: Path) -> None:
    with pytest.raises(InputError, match=str(CONTEXT)):
        generate(dense, ["x" * (CONTEXT + 1)], max_tokens=4)
    (row,) = generate(dense, ["x" * (CONTEXT - 3)], max_tokens=20)
    assert row["stopped"] == "context" and 3 <= len(row["tokens"]) <= 4


@pytest.mark.parametrize("chunk", [0, -1])
def test_a_chunk_has_at_least_one_token(dense: Path, chunk: int) -> None:
    with pytest.raises(InputError, match="chunk"):
        generate(dense, ["x"], max_tokens=4, chunk=chunk)


def test_empty_prompts_and_wrong_counts_are_refused(dense: Path) -> None:
    with pytest.raises(InputError, match="no tokens"):
        generate(dense, ["x", ""], max_tokens=4)
    with pytest.raises(InputError, match="tokens"):
        generate(dense, ["x"], max_tokens=0)


def test_plans_do_not_run_here(dense: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(dense)
    manifest.target = "tensorrt-rtx"
    manifest.write(tmp_path)
    with pytest.raises(InputError, match="GPU"):
        generate(tmp_path, ["x"], max_tokens=4)


TEXTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at a temperature of",
    "The three primary colours are",
    "Dear Sir or Madam,\n\nI am writing to",
    "In 1969, Neil Armstrong",
    "Q: What is 12 times 12?\nA:",
    "To make a cup of tea, first",
    "The opposite of hot is cold. The opposite of up is",
]


@pytest.mark.model
@pytest.mark.slow
def test_smollm2_greedy_tokens_are_those_of_transformers(
    smollm2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 tokens of ten prompts, from the graphs of a dense engine (its checks are other tests)."""
    from trtpass import io
    from trtpass.canonicalize import canonicalize
    from trtpass.export import export
    from trtpass.passes.cache import insert_cache
    from trtpass.passes.lower import lower
    from trtpass.runtime import Engine

    model = export(smollm2.module, smollm2.config, context=smollm2.context)
    canonicalize(model)
    graphs = {f"{phase}.onnx": lower(insert_cache(model, phase), "cpu").model for phase in ("prefill", "decode")}
    io.save_shared(graphs, tmp_path)
    engine = Engine.open(tmp_path, "cpu", None, smollm2.context)
    rows = [smollm2.tokenizer(text)["input_ids"] for text in TEXTS]
    found: list[list[int]] = [[] for _ in rows]
    for step in engine.generate(rows, 64, []):
        for row, token in enumerate(step.tokens):
            if token is not None:
                found[row].append(token)
    monkeypatch.setattr(smollm2.module.generation_config, "eos_token_id", None)  # run on, as the engine does here
    assert found[0] == greedy(smollm2, TEXTS[0], 64)
    assert found == [choices(smollm2.module, row, new) for row, new in zip(rows, found, strict=True)]


def choices(module: Any, prompt: list[int], new: list[int]) -> list[int]:
    """The model's most likely token at each place of ``new``, given all before it: equal to ``new`` if and only if
    greedy decoding gives ``new`` (by induction over its tokens), for the price of one pass."""
    import torch

    with torch.inference_mode():
        logits = module(input_ids=torch.tensor([prompt + new]), use_cache=False).logits[0]
    return [int(token) for token in logits[len(prompt) - 1 : -1].argmax(-1)]

"""The oracle against an independent reimplementation: eager attention, every vector spelt out, no chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graphs import resolve
from trtpass.errors import InputError
from trtpass.kvzap import oracle

PREFIX, BRIDGE = [3, 5], [7, 11, 2]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def module(request: pytest.FixtureRequest, tiny_folders: dict[str, Path]) -> Any:
    return resolve(str(tiny_folders[request.param])).load().module


def context(count: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(0).integers(0, 128, count)]


def by_hand(
    module: Any, ids: list[int], kind: str, start: int = 0, stop: int | None = None
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Scores `[layers, Hkv, T]` in plain loops over layers, heads, queries and keys, from eager attention.

    Queries are those of tokens ``start .. stop`` of the second copy, which is cut to them and the 8 tokens before.
    """
    stop = len(ids) if stop is None else stop
    whole = [*PREFIX, *ids, *BRIDGE, *ids[max(0, start - 8) : stop]]
    states: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    hooks = []
    for layer in module.model.layers:
        hooks.append(layer.input_layernorm.register_forward_hook(lambda m, a, out: states.append(out[0])))
        hooks.append(layer.self_attn.v_proj.register_forward_hook(lambda m, a, out: values.append(out[0])))
    before = module.config._attn_implementation
    module.config._attn_implementation = "eager"
    try:
        with torch.no_grad():
            attentions = module.model(input_ids=torch.tensor([whole]), output_attentions=True).attentions
    finally:
        module.config._attn_implementation = before
        for hook in hooks:
            hook.remove()
    heads, owners = module.config.num_attention_heads, module.config.num_key_value_heads
    width = module.config.head_dim
    made = []
    for layer, probability in zip(module.model.layers, attentions, strict=True):
        number = len(made)
        score = np.zeros((owners, len(ids)))
        for head in range(heads):
            projection = layer.self_attn.o_proj.weight[:, head * width : (head + 1) * width]
            owner = head // (heads // owners)
            for i in range(len(ids)):
                key = len(PREFIX) + i
                value = values[number][key, owner * width : (owner + 1) * width]
                added = float((projection @ value).norm()) if kind == "kvzip+" else 1.0
                for j in range(len(whole) - (stop - start), len(whole)):
                    size = float(states[number][j].norm()) if kind == "kvzip+" else 1.0
                    score[owner, i] = max(score[owner, i], float(probability[0, head, j, key]) * added / size)
        made.append(score)
    first = slice(len(PREFIX), len(PREFIX) + len(ids))
    return np.stack(made), [s[first].detach().numpy() for s in states]


@pytest.mark.parametrize("kind", oracle.KINDS)
def test_scores_are_those_of_the_definition(module: Any, kind: str) -> None:
    ids = context(9)
    expected, states = by_hand(module, ids, kind)
    made = oracle.scores(module, PREFIX, ids, BRIDGE, kind)
    np.testing.assert_allclose(made.score.numpy(), expected, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(made.hidden.numpy(), np.stack(states), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("chunk", "starts"), [(4, [0, 3, 7, 11, 15]), (10, [0, 9]), (18, [0, 9]), (19, [0])])
@pytest.mark.parametrize("kind", oracle.KINDS)
def test_chunks_are_repeated_one_by_one_after_the_context(
    module: Any, kind: str, chunk: int, starts: list[int]
) -> None:
    ids = context(19)
    bounds = zip(starts, [*starts[1:], 19], strict=True)
    expected = np.stack([by_hand(module, ids, kind, *bound)[0] for bound in bounds]).max(0)
    made = oracle.scores(module, PREFIX, ids, BRIDGE, kind, chunk=chunk)
    np.testing.assert_allclose(made.score.numpy(), expected, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(made.hidden, oracle.scores(module, PREFIX, ids, BRIDGE, kind).hidden, rtol=0, atol=0)


def test_a_context_that_does_not_fit_twice(module: Any) -> None:
    """300 tokens on 512 positions: two chunks of 150, as if they had been asked for; and what fits is not cut."""
    ids = context(300)
    made = oracle.scores(module, PREFIX, ids, BRIDGE).score
    torch.testing.assert_close(oracle.scores(module, PREFIX, ids, BRIDGE, chunk=150).score, made, rtol=0, atol=0)
    ids = context(253)  # 2 + 253 + 3 + 253 = 511
    whole = oracle.scores(module, PREFIX, ids, BRIDGE).score
    torch.testing.assert_close(oracle.scores(module, PREFIX, ids, BRIDGE, chunk=253).score, whole, rtol=0, atol=0)
    assert not torch.equal(oracle.scores(module, PREFIX, ids, BRIDGE, chunk=150).score, whole)


@pytest.mark.parametrize(("tokens", "chunk", "room", "expected"), [
    (100, None, 100, [0]), (100, None, 99, [0, 50]), (100, None, 58, [0, 50]), (100, None, 57, [0, 33, 66]),
    (100, 200, None, [0]), (100, 40, 48, [0, 33, 66]), (100, 40, 47, [0, 33, 66]), (100, 40, 41, [0, 25, 50, 75]),
])  # fmt: skip
def test_chunks_and_their_leads_fit(tokens: int, chunk: int | None, room: int | None, expected: list[int]) -> None:
    assert oracle._starts(tokens, chunk, room) == expected


def test_only_the_states_that_are_asked_for(module: Any) -> None:
    whole = oracle.scores(module, PREFIX, context(9), BRIDGE)
    some = oracle.scores(module, PREFIX, context(9), BRIDGE, states=[1])
    none = oracle.scores(module, PREFIX, context(9), BRIDGE, states=())
    assert none.hidden.shape == (0, 9, 96) and torch.equal(some.hidden, whole.hidden[1:])
    assert torch.equal(none.score, whole.score) and torch.equal(some.score, whole.score)


def test_no_probabilities_of_the_whole_prompt_are_held(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor that is made has at most a block of queries as rows."""
    largest = 0
    softmax = torch.Tensor.softmax

    def watched(self: torch.Tensor, *args: Any) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, self.numel())
        return softmax(self, *args)

    monkeypatch.setattr(torch.Tensor, "softmax", watched)
    oracle.scores(module, PREFIX, context(230), BRIDGE)
    assert 6 * oracle.ROWS * 230 < largest <= 6 * oracle.ROWS * (2 * 230 + 5)


def test_chunks_of_queries_do_not_matter(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = context(70)
    whole = oracle.scores(module, PREFIX, ids, BRIDGE)
    monkeypatch.setattr(oracle, "ROWS", 7)
    torch.testing.assert_close(oracle.scores(module, PREFIX, ids, BRIDGE).score, whole.score, rtol=1e-5, atol=0)


def test_the_model_is_left_as_it_was(module: Any) -> None:
    before = module.config._attn_implementation
    hooks = [len(layer.self_attn._forward_pre_hooks) for layer in module.model.layers]
    with pytest.raises(InputError, match="a context of 500 tokens leaves 10 of the model's positions"):
        oracle.scores(module, [], context(500), [5, 6])
    with pytest.raises(RuntimeError, match="in the middle"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle._Run, "_ask", _fail)
        oracle.scores(module, [], context(3), [])
    with pytest.raises(InputError, match="not finite"), torch.no_grad():
        weight = module.model.layers[1].self_attn.v_proj.weight
        kept = weight.clone()
        try:
            weight[3, 3] = float("nan")
            oracle.scores(module, [], context(3), [])
        finally:
            weight.copy_(kept)
    oracle.scores(module, [], context(3), [])
    assert module.config._attn_implementation == before
    assert [len(layer.self_attn._forward_pre_hooks) for layer in module.model.layers] == hooks


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(([], [], []), "a context without tokens"), (([], [1], [], "kvzap"), "scores of kind 'kvzap'")],
)
def test_what_cannot_be_scored(module: Any, arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        oracle.scores(module, *arguments)


def test_a_model_without_the_layers_is_refused() -> None:
    with pytest.raises(InputError, match=r"no model.layers with self_attn.o_proj"):
        oracle.scores(torch.nn.Module.__new__(_Bare), [], [1], [])


def _fail(*_: Any) -> None:
    raise RuntimeError("in the middle")


class _Bare(torch.nn.Module):
    config = type("Config", (), {"max_position_embeddings": None})()


@pytest.mark.model
def test_the_prompt_of_a_real_tokenizer(smollm2: Any) -> None:
    """The parts, put together, are the chat that the papers' prompt describes."""
    prefix, ids, bridge = oracle.prompt_parts(smollm2.tokenizer, "The grass is green.")
    text = smollm2.tokenizer.decode([*prefix, *ids, *bridge, *ids])
    assert text.count("The grass is green.") == 2
    assert (
        text.index("<|im_start|>user") < text.index("Repeat the previous context exactly.") < text.rindex("assistant")
    )
    with pytest.raises(InputError, match="no tokens"):
        oracle.prompt_parts(smollm2.tokenizer, "")

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


def by_hand(module: Any, ids: list[int], kind: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """Scores `[layers, Hkv, T]` in plain loops over layers, heads, queries and keys, from eager attention."""
    whole = [*PREFIX, *ids, *BRIDGE, *ids]
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
                for j in range(len(whole) - len(ids), len(whole)):
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


def test_chunks_of_queries_do_not_matter(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = context(70)
    whole = oracle.scores(module, PREFIX, ids, BRIDGE)
    monkeypatch.setattr(oracle, "ROWS", 7)
    torch.testing.assert_close(oracle.scores(module, PREFIX, ids, BRIDGE).score, whole.score, rtol=1e-5, atol=0)


def test_the_model_is_left_as_it_was(module: Any) -> None:
    before = module.config._attn_implementation
    hooks = [len(layer.self_attn._forward_pre_hooks) for layer in module.model.layers]
    with pytest.raises(InputError, match="at most 512"):
        oracle.scores(module, [], context(300), [])
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

"""KVzip and KVzip+ scores: how much each key of a context is looked at while the model repeats that context.

The prompt holds the context twice: ``prefix + context + bridge + context``, the bridge being an instruction to repeat.
For key i of the first copy, over queries j of the second copy and the query heads of i's group::

    s_i  = max a_ji                                  KVzip
    s+_i = max a_ji ||W_O v_i|| / ||h_j||            KVzip+: what the key adds to the residual, relative to the query's

with a the causal softmax over the whole prompt, W_O the query head's slice of the output projection and h what feeds
the projections of q, k and v (KVzip, arXiv 2505.23416; KVzip+, arXiv 2601.07891, section 3).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trtpass.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("kvzip", "kvzip+")
INSTRUCTION = "\n\nRepeat the previous context exactly."
ROWS = 64  # queries whose probabilities are held at once: [H, ROWS, S] float32
_serial = itertools.count()


@dataclass(frozen=True)
class Scores:
    """Of one context of T tokens.

    Args:
        score: float32 `[layers, Hkv, T]`, above 0 (a probability that rounds to 0 is the smallest normal float32).
        hidden: float32 `[layers, T, E]`, what feeds q, k and v at each token of the first copy.
    """

    score: Tensor
    hidden: Tensor


def prompt_parts(tokenizer: Any, context: str) -> tuple[list[int], list[int], list[int]]:
    """Token ids of prefix, context and bridge, in the tokenizer's chat form where it has one.

    Raises:
        InputError: a context without tokens.
    """
    ids = tokenizer(context, add_special_tokens=False)["input_ids"]
    if not ids:
        raise InputError("the context has no tokens", "some text")
    before, after = "", INSTRUCTION + "\n\n"
    if getattr(tokenizer, "chat_template", None):
        mark = "\x00context\x00"
        turns = [{"role": "user", "content": mark + INSTRUCTION}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        before, _, after = text.partition(mark)
    parts = [tokenizer(text, add_special_tokens=False)["input_ids"] if text else [] for text in (before, after)]
    return parts[0], ids, parts[1]


def scores(
    module: Any, prefix: Sequence[int], context: Sequence[int], bridge: Sequence[int], kind: str = "kvzip+"
) -> Scores:
    """Scores of every key of ``context``.

    Memory beside the model: hidden states and, for one layer at a time, q, k, v of the whole prompt and probabilities
    of ``ROWS`` queries.

    Args:
        module: a transformers causal LM of the Llama or Qwen3 kind, in eval mode.
        prefix: ids before the context, such as a chat header; may be empty.
        context: ids to score, T of them.
        bridge: ids between the copies; may be empty.
        kind: one of ``KINDS``.

    Raises:
        InputError: another kind, an empty context, a prompt beyond the model's positions, a model whose attention
            layers are not found, or scores that are not finite.
    """
    import torch
    from transformers import AttentionInterface

    if kind not in KINDS:
        raise InputError(f"scores of kind '{kind}'", f"one of {', '.join(KINDS)}")
    if not context:
        raise InputError("a context without tokens", "at least one")
    ids = [*prefix, *context, *bridge, *context]
    limit = getattr(module.config, "max_position_embeddings", None)
    if limit is not None and len(ids) > limit:
        raise InputError(
            f"a prompt of {len(ids)} tokens (the context twice)", f"at most {limit}", "shorten the context"
        )
    attentions = [layer.self_attn for layer in _layers(module)]
    first = slice(len(prefix), len(prefix) + len(context))
    second = slice(len(ids) - len(context), len(ids))
    found: list[Tensor] = []
    hidden: list[Tensor] = []
    current: list[Tensor] = []

    def remember(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current[:] = [(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])[0]]

    def attend(block: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        states = current[0].float()  # [S, E]
        weight = block.o_proj.weight if kind == "kvzip+" else None
        found.append(_score(q[0].float(), k[0].float(), v[0].float(), states, weight, scaling, first, second))
        hidden.append(states[first].clone())
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None

    config = module.config
    before, key = config._attn_implementation, f"trtpass_oracle_{next(_serial)}"
    hooks = [block.register_forward_pre_hook(remember, with_kwargs=True) for block in attentions]
    AttentionInterface.register(key, attend)
    try:
        config._attn_implementation = key
        with torch.inference_mode():
            positions = torch.arange(len(ids))[None]
            module.model(input_ids=torch.tensor([ids]), position_ids=positions, use_cache=False)
    finally:
        config._attn_implementation = before
        AttentionInterface._global_mapping.pop(key)
        for hook in hooks:
            hook.remove()
    score = torch.stack(found)
    if not bool(score.isfinite().all()):
        raise InputError("the oracle's scores are not finite", "finite weights and activations", "load in float32")
    return Scores(score, torch.stack(hidden))


def _layers(module: Any) -> Sequence[Any]:
    layers = getattr(getattr(module, "model", None), "layers", None)
    if not layers or not hasattr(layers[0].self_attn, "o_proj"):
        raise InputError(
            f"{type(module).__name__} has no model.layers with self_attn.o_proj", "a model of the Llama or Qwen3 kind"
        )
    return list(layers)


def _score(
    q: Tensor, k: Tensor, v: Tensor, states: Tensor, weight: Tensor | None, scaling: float, first: slice, second: slice
) -> Tensor:
    """Scores `[Hkv, T]` of one layer: q `[H, S, D]`, k and v `[Hkv, S, D]`, states `[S, E]`, weight `[E, H D]`."""
    import torch

    heads = q.shape[0]
    group = heads // k.shape[0]
    tokens = k.shape[1]
    added = torch.ones(heads, first.stop - first.start)
    if weight is not None:
        parts = weight.float().unflatten(1, (heads, -1)).permute(1, 0, 2)  # [H, E, Dv]
        gram = parts.transpose(1, 2) @ parts  # [H, Dv, Dv]: norms without vectors of E
        values = v[:, first].repeat_interleave(group, 0)  # [H, T, Dv]
        added = ((values @ gram) * values).sum(-1).clamp(min=0).sqrt()
    best = torch.zeros(heads, first.stop - first.start)
    for start in range(second.start, second.stop, ROWS):
        rows = torch.arange(start, min(start + ROWS, second.stop))
        query = q[:, rows].unflatten(0, (k.shape[0], group))  # [Hkv, G, R, D]
        logits = (query @ k[:, None].transpose(-1, -2)) * scaling
        logits.masked_fill_(torch.arange(tokens) > rows[:, None], -torch.inf)
        probability = logits.softmax(-1)[..., first].flatten(0, 1)  # [H, R, T]
        if weight is not None:
            probability /= states[rows].norm(dim=-1)[:, None]
        best = torch.maximum(best, probability.amax(1))
    score = (best * added).unflatten(0, (k.shape[0], group)).amax(1)
    return score.clamp(min=torch.finfo(torch.float32).tiny)

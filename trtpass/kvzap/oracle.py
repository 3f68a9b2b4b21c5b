"""KVzip and KVzip+ scores: how much each key of a context is looked at while the model repeats that context.

The prompt holds the context twice: ``prefix + context + bridge + context``, the bridge being an instruction to repeat.
For key i of the first copy, over queries j of the second copy and the query heads of i's group::

    s_i  = max a_ji                                  KVzip
    s+_i = max a_ji ||W_O v_i|| / ||h_j||            KVzip+: what the key adds to the residual, relative to the query's

with a the causal softmax over the whole prompt, W_O the query head's slice of the output projection and h what feeds
the projections of q, k and v (KVzip, arXiv 2505.23416; KVzip+, arXiv 2601.07891, section 3).

A context that does not fit twice into the model's positions is repeated in chunks: ``prefix + context`` is run once,
and after its keys and values, for each chunk anew, ``bridge + lead + chunk``; the lead is the last ``LEAD`` tokens
before the chunk, so that its first query knows where the repetition goes on (kvpress does the same). Queries are those
of all chunks; leads do not count.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trtpass.errors import InputError
from trtpass.interception import attention, hidden_states

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("kvzip", "kvzip+")
INSTRUCTION = "\n\nRepeat the previous context exactly."
ROWS = 64  # queries whose probabilities are held at once: [H, ROWS, S] float32
LEAD = 8  # tokens before a chunk that are repeated with it; the first chunk has none
LEAST = 16  # tokens of the shortest chunk that is worth a pass


@dataclass(frozen=True)
class Scores:
    """Of one context of T tokens.

    Args:
        score: float32 `[layers, Hkv, T]`, above 0 (a probability that rounds to 0 is the smallest normal float32).
        hidden: float32 `[n, T, E]`, what feeds q, k and v at each token of the first copy, in the n layers asked for.
    """

    score: Tensor
    hidden: Tensor


def prompt_parts(tokenizer: Any, context: str, chat: bool = True) -> tuple[list[int], list[int], list[int]]:
    """Token ids of prefix, context and bridge; with ``chat`` in the tokenizer's chat form where it has one.

    Raises:
        InputError: a context without tokens.
    """
    ids = tokenizer(context, add_special_tokens=False)["input_ids"]
    if not ids:
        raise InputError("the context has no tokens", "some text")
    before, after = "", INSTRUCTION + "\n\n"
    if chat and getattr(tokenizer, "chat_template", None):
        mark = "\x00context\x00"
        turns = [{"role": "user", "content": mark + INSTRUCTION}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        before, _, after = text.partition(mark)
    parts = [tokenizer(text, add_special_tokens=False)["input_ids"] if text else [] for text in (before, after)]
    return parts[0], ids, parts[1]


def scores(
    module: Any,
    prefix: Sequence[int],
    context: Sequence[int],
    bridge: Sequence[int],
    kind: str = "kvzip+",
    *,
    chunk: int | None = None,
    states: Sequence[int] | None = None,
) -> Scores:
    """Scores of every key of ``context``.

    Memory beside the model: k and v of ``prefix + context`` in every layer, the hidden states that are asked for, and
    probabilities of ``ROWS`` queries.

    Args:
        module: a transformers causal LM of the Llama or Qwen3 kind, in eval mode.
        prefix: ids before the context, such as a chat header; may be empty.
        context: ids to score, T of them.
        bridge: ids between the copies; may be empty.
        kind: one of ``KINDS``.
        chunk: tokens of the context that are repeated in one pass, at most; default: as many as fit.
        states: layers whose hidden states are returned, in this order; default: all.

    Raises:
        InputError: another kind, an empty context, a prompt beyond the model's positions, a model whose attention
            layers are not found, or scores that are not finite.
    """
    import torch

    if kind not in KINDS:
        raise InputError(f"scores of kind '{kind}'", f"one of {', '.join(KINDS)}")
    if not context:
        raise InputError("a context without tokens", "at least one")
    layers = [layer.self_attn for layer in _layers(module)]
    limit = getattr(module.config, "max_position_embeddings", None)
    whole = [*prefix, *context]
    wanted = range(len(layers)) if states is None else states
    run = _Run(len(prefix), {layers[i] for i in wanted}, kind == "kvzip+")
    with torch.inference_mode(), attention(module.config, run.attend), hidden_states(layers, run.see):
        starts = _starts(len(context), chunk, None if limit is None else limit - len(whole) - len(bridge))
        module.model(input_ids=torch.tensor([whole]), position_ids=torch.arange(len(whole))[None], use_cache=False)
        for start, stop in itertools.pairwise([*starts, len(context)]):
            before = [*bridge, *context[max(0, start - LEAD) : start]]
            ids = [*before, *context[start:stop]]
            run.asking = len(before)
            positions = torch.arange(len(whole), len(whole) + len(ids))
            module.model(input_ids=torch.tensor([ids]), position_ids=positions[None], use_cache=False)
        score = torch.stack([run.score(layer) for layer in layers])
    if not bool(score.isfinite().all()):
        raise InputError("the oracle's scores are not finite", "finite weights and activations", "load in float32")
    width = module.config.hidden_size
    hidden = [run.hidden[layers[i]] for i in wanted]
    return Scores(score, torch.stack(hidden) if hidden else torch.empty(0, len(context), width))


def _starts(tokens: int, chunk: int | None, room: int | None) -> list[int]:
    """Where each chunk begins; ``room`` is the number of positions for one of them and its lead."""
    most = tokens if chunk is None else chunk
    if room is not None and min(most, tokens) > room - (LEAD if most < tokens else 0):
        most = room - LEAD
        if most < LEAST:
            raise InputError(
                f"a context of {tokens} tokens leaves {max(0, room)} of the model's positions to repeat it in",
                f"at least {LEAST + LEAD}",
                "shorten the context",
            )
    count = -(-tokens // max(1, most))
    return [tokens * i // count for i in range(count)]  # chunks of the same size, give or take one


@dataclass
class _Run:
    """What the passes over one prompt have in common, by attention layer.

    Args:
        first: where the context begins.
        wanted: layers whose hidden states are kept.
        added: whether keys count by what they add to the residual (KVzip+).
        asking: None in the pass over prefix and context; then the number of tokens before those that repeat.
    """

    first: int
    wanted: set[Any]
    added: bool
    asking: int | None = None
    states: Tensor | None = None  # [S, E], what feeds the layer that runs now
    keys: dict[Any, Tensor] = field(default_factory=dict)  # [Hkv, P, D], P tokens of prefix and context
    values: dict[Any, Tensor] = field(default_factory=dict)  # [Hkv, P, Dv]
    hidden: dict[Any, Tensor] = field(default_factory=dict)  # [T, E]
    best: dict[Any, Tensor] = field(default_factory=dict)  # [H, T]: max of a_ji, or of a_ji / ||h_j||

    def see(self, states: Tensor) -> None:
        """What feeds an attention layer, before it runs `[1, S, E]`."""
        self.states = states[0].float()

    def attend(self, block: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        """Causal attention in the form of transformers' interface: q `[1, H, S, D]`, fresh k, v `[1, Hkv, S, D]`."""
        import torch

        if self.asking is None:
            self.keys[block], self.values[block] = k[0].float().clone(), v[0].float().clone()
            if block in self.wanted and self.states is not None:
                self.hidden[block] = self.states[self.first :].clone()
            sdpa = torch.nn.functional.scaled_dot_product_attention
            return sdpa(q, k, v, is_causal=True, scale=scaling, enable_gqa=True).transpose(1, 2), None
        return self._ask(block, q[0].float() * scaling, k[0].float(), v[0].float()).to(q.dtype)[None], None

    def _ask(self, block: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention `[S, H, Dv]` of a repeating pass over the stored keys and its own; its maxima are taken along."""
        import torch

        asking, states = self.asking or 0, self.states
        past, owners, group = self.keys[block].shape[1], k.shape[0], q.shape[0] // k.shape[0]
        keys = torch.cat([self.keys[block], k], 1)  # [Hkv, P + S, D]
        values = torch.cat([self.values[block], v], 1)
        best = self.best.setdefault(block, torch.zeros(q.shape[0], past - self.first))
        made = []
        for start in range(0, q.shape[1], ROWS):
            stop = min(start + ROWS, q.shape[1])
            count, end = stop - start, past + stop
            queries = q[:, start:stop].reshape(owners, group * count, -1)
            logits = (queries @ keys[:, :end].transpose(1, 2)).view(-1, count, end)  # [H, R, P + stop]
            later = torch.ones(count, count, dtype=torch.bool).triu(1)
            logits[..., past + start :].masked_fill_(later, -torch.inf)
            chance = logits.softmax(-1)
            made.append((chance.view(owners, group * count, end) @ values[:, :end]).view(-1, count, v.shape[-1]))
            if stop > asking:
                counted = slice(max(0, asking - start), count)
                seen = chance[:, counted, self.first : past]
                if self.added and states is not None:
                    seen /= states[start:stop][counted].norm(dim=-1)[:, None]
                torch.maximum(best, seen.amax(1), out=best)
        return torch.cat(made, 1).transpose(0, 1)

    def score(self, block: Any) -> Tensor:
        """Scores `[Hkv, T]` of a layer after all passes."""
        import torch

        best, values = self.best[block], self.values[block][:, self.first :]  # [H, T], [Hkv, T, Dv]
        heads, owners = best.shape[0], values.shape[0]
        if self.added:
            parts = block.o_proj.weight.float().unflatten(1, (heads, -1)).permute(1, 0, 2)  # [H, E, Dv]
            gram = parts.transpose(1, 2) @ parts  # [H, Dv, Dv]: norms without vectors of E
            own = values.repeat_interleave(heads // owners, 0)  # [H, T, Dv]
            best = best * ((own @ gram) * own).sum(-1).clamp(min=0).sqrt()
        return best.unflatten(0, (owners, -1)).amax(1).clamp(min=torch.finfo(torch.float32).tiny)


def _layers(module: Any) -> Sequence[Any]:
    layers = getattr(getattr(module, "model", None), "layers", None)
    if not layers or not hasattr(layers[0].self_attn, "o_proj"):
        raise InputError(
            f"{type(module).__name__} has no model.layers with self_attn.o_proj", "a model of the Llama or Qwen3 kind"
        )
    return list(layers)

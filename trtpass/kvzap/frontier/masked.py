"""A context that is read once, densely, and then asked with some of its keys taken away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trtpass.errors import InputError
from trtpass.interception import attention, hidden_states

if TYPE_CHECKING:
    from torch import Tensor

RECENT = 32  # last queries that are kept for SnapKV


@dataclass(frozen=True)
class Read:
    """What a dense prefill of T tokens left, L layers of Hkv KV heads; all float32.

    Args:
        key, value: of each layer `[Hkv, T, D]`, keys with their rotary position.
        query: of each layer the last `RECENT` queries `[H, min(T, RECENT), D]`.
        hidden: `[L, T, E]`, what feeds q, k and v.
        scaling: what attention multiplies q k^T with.
    """

    key: tuple[Tensor, ...]
    value: tuple[Tensor, ...]
    query: tuple[Tensor, ...]
    hidden: Tensor
    scaling: float

    @property
    def tokens(self) -> int:
        return int(self.key[0].shape[1])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(L, Hkv, T), the shape of scores and of masks."""
        return len(self.key), int(self.key[0].shape[0]), self.tokens


def read(module: Any, ids: Sequence[int]) -> Read:
    """Prefill ``ids`` with the unedited model.

    Args:
        module: a transformers causal LM of the Llama kind (``model.layers[i].self_attn``), float32, eval mode.

    Raises:
        InputError: no tokens, or more than the model's positions.
    """
    import torch

    _need_positions(module, len(ids))
    keys, values, queries, hidden, scale = [], [], [], [], [1.0]

    def attend(block: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        keys.append(k[0].contiguous())
        values.append(v[0].contiguous())
        queries.append(q[0, :, -RECENT:].clone())
        scale[0] = scaling
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None

    blocks = [layer.self_attn for layer in module.model.layers]
    with hidden_states(blocks, lambda states: hidden.append(states[0])):
        _run(module, attend, ids, 0)
    return Read(tuple(keys), tuple(values), tuple(queries), torch.stack(hidden), scale[0])


def ask(module: Any, past: Read, keep: Tensor | None, ids: Sequence[int], first: int) -> tuple[Tensor, Tensor]:
    """How likely ``ids[first:]`` are after the context and ``ids[:first]``, with teacher forcing, in one forward.

    The keys that ``keep`` lacks are left out of the attention of every query, each KV head its own; positions do not
    change. Between new tokens attention is causal and complete.

    Args:
        keep: bool `[L, Hkv, T]`; None keeps everything.
        ids: n tokens that follow the context.
        first: the first one that counts, at least 1: the token after the context is the prefill's own prediction.

    Returns:
        Log-likelihoods in nats `[n - first]` float32, and whether each token has the largest logit `[n - first]` bool.
    """
    import torch

    if not 1 <= first < len(ids):
        raise InputError(f"scoring from token {first} of {len(ids)}", "1 or more, and one token left to score")
    _need_positions(module, past.tokens + len(ids) - 1)

    def attend(block: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        layer, tokens = int(block.layer_idx), q.shape[2]
        owners = k.shape[1]
        outs = []
        for owner, rows in enumerate(q[0].unflatten(0, (owners, -1))):  # [G, n, D]
            chosen = slice(None) if keep is None else keep[layer, owner]
            old_k, old_v = past.key[layer][owner, chosen], past.value[layer][owner, chosen]
            keys, values = torch.cat([old_k, k[0, owner]]), torch.cat([old_v, v[0, owner]])  # [kept + n, D]
            seen = torch.ones(tokens, len(keys), dtype=torch.bool).tril(len(old_k)).repeat(len(rows), 1)  # [G n, ...]
            out = torch.nn.functional.scaled_dot_product_attention(
                rows.flatten(0, 1)[None, None], keys[None, None], values[None, None], seen, scale=scaling
            )
            outs.append(out[0, 0].unflatten(0, (len(rows), tokens)))
        return torch.cat(outs)[None].transpose(1, 2), None

    hidden = _run(module, attend, ids[:-1], past.tokens)
    with torch.inference_mode():
        logits = module.lm_head(hidden[0, first - 1 :]).float()  # [n - first, V]
        target = torch.tensor(list(ids[first:]))
        chosen = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
        return chosen, logits.argmax(-1) == target


def _need_positions(module: Any, tokens: int) -> None:
    limit = getattr(module.config, "max_position_embeddings", None)
    if tokens < 1 or (limit is not None and tokens > limit):
        raise InputError(f"a prompt of {tokens} tokens", f"1 to {limit}, the model's positions", "shorten the context")


def _run(module: Any, attend: Callable[..., Any], ids: Sequence[int], start: int) -> Tensor:
    """The last hidden states `[1, n, E]` of ``ids`` at positions ``start`` and on, with another attention."""
    import torch

    with attention(module.config, attend), torch.inference_mode():
        positions = torch.arange(start, start + len(ids))[None]
        out = module.model(input_ids=torch.tensor([list(ids)]), position_ids=positions, use_cache=False)
        hidden: Tensor = out.last_hidden_state
    return hidden

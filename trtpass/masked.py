"""The oracle of a paged cache: a torch model whose attention hides evicted keys behind a boolean mask.

Nothing is dropped or moved: every token is computed once, and a query sees key t unless t is in its future, or evicted
and out of the window. A forward whose first query is at position T hides key t iff keep is 0 and
sinks <= t <= T - 1 - W: so one pass over a whole text gives the logits of a prefill and of all steps after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trtpass.errors import InputError
from trtpass.interception import attention, hidden_states
from trtpass.passes.cache_policy import CachePolicy, Decision, Keys

if TYPE_CHECKING:
    from torch import Tensor

PROMPT = 0  # ``starts`` of a prompt's tokens


@dataclass
class Masked:
    """What ``MaskedModel.run`` returns.

    Args:
        logits: float32 ``[B, N, V]``, of the tokens that were asked for.
        keep: own decisions by layer, int32 ``[B, Hkv, S]``; a layer without a policy is left out.
        scores: by layer, float32 ``[B, Hkv, S]``, where the policy has scores.
        hidden: float32 ``[B, N, E]``, the final norm's output of the same tokens.
    """

    logits: np.ndarray
    keep: dict[int, np.ndarray]
    scores: dict[int, np.ndarray]
    hidden: np.ndarray


class MaskedModel:
    """A transformers causal LM (Llama, Qwen2, Qwen3, Mistral; eval mode, float32) under a cache policy.

    Args:
        module: the model.
        policy: the policy; None evicts nothing, unless decisions are forced.
        layers: in which it decides.
        window: W. sinks: the first tokens that are never evicted.
    """

    def __init__(
        self, module: Any, policy: CachePolicy | None, layers: Sequence[int], window: int, sinks: int
    ) -> None:  # fmt: skip
        self.module, self.policy, self.layers = module, policy, frozenset(layers)
        self.window, self.sinks = window, sinks

    def run(
        self,
        ids: np.ndarray,
        starts: np.ndarray,
        ask: np.ndarray,
        forced: dict[int, np.ndarray] | None = None,
        prompt: np.ndarray | None = None,
    ) -> Masked:
        """One pass over whole texts.

        Args:
            ids: right-padded ``[B, S]`` int64.
            starts: T of the forward that each token belongs to ``[B, S]``: 0 in the prompt, its own position in a
                decode step, the turn's first position in a later turn.
            ask: positions whose logits are wanted ``[B, N]``.
            forced: decisions by layer, int32 ``[B, Hkv, S]``, in place of the policy's own, which are still recorded.
            prompt: tokens of each row's prompt ``[B]``, for policies that look at its end; None takes all of S.

        Raises:
            InputError: decisions are forced for other layers than the policy's.
        """
        import torch

        if forced is not None and set(forced) != set(self.layers):
            raise InputError(f"decisions are forced for layers {sorted(forced)}", f"layers {sorted(self.layers)}")
        own: dict[int, Decision] = {}
        current: list[Tensor] = []
        text, first_query = (torch.from_numpy(np.ascontiguousarray(x, np.int64)) for x in (ids, starts))
        length = np.full(len(ids), ids.shape[1]) if prompt is None else prompt
        rows = torch.from_numpy(np.ascontiguousarray(length, np.int32))
        positions = torch.arange(ids.shape[1])[None].expand(len(ids), -1)

        def see(states: Tensor) -> None:
            current[:] = [states]

        def attend(block: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any) -> Any:
            layer = int(block.layer_idx)
            keep = None
            if layer in self.layers and self.policy is not None:
                own[layer] = self.policy.decide(Keys(layer, current[0], q, k, positions, rows, float(scaling)))
                keep = own[layer].keep
            if forced is not None and layer in self.layers:
                keep = torch.from_numpy(np.ascontiguousarray(forced[layer], np.int32))
            return self._attend(q, k, v, keep, first_query, float(scaling)).transpose(1, 2), None

        blocks = [layer.self_attn for layer in self.module.model.layers]
        with (
            attention(self.module.config, attend),
            hidden_states(blocks, see),
            torch.inference_mode(),
        ):
            hidden = self.module.model(input_ids=text, position_ids=positions[:1], use_cache=False).last_hidden_state
            wanted = torch.from_numpy(np.ascontiguousarray(ask, np.int64))
            hidden = hidden[torch.arange(len(ids))[:, None], wanted]
            logits = self.module.lm_head(hidden)
        return Masked(
            logits.float().numpy(),
            {layer: made.keep.numpy() for layer, made in own.items()},
            {layer: made.score.numpy() for layer, made in own.items() if made.score is not None},
            hidden.float().numpy(),
        )

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, starts: Tensor, scale: float) -> Tensor:
        """Causal attention, then anew for the queries that some key may be hidden from: ``[B, H, S, Dv]``."""
        import torch

        sdpa: Callable[..., Tensor] = torch.nn.functional.scaled_dot_product_attention
        out = sdpa(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        later = (starts > self.window).any(0).nonzero()[:, 0]  # columns where some row's forward is late enough
        if keep is None or not later.numel():
            return out
        tokens, group = q.shape[2], q.shape[1] // k.shape[1]
        key = torch.arange(tokens)
        late = starts[:, later]  # [B, R]
        old = (key >= self.sinks) & (key <= late[..., None] - 1 - self.window)  # [B, R, S]
        hidden = (keep == 0)[:, :, None] & old[:, None]  # [B, Hkv, R, S]
        visible = (key <= later[:, None]) & ~hidden
        rows = sdpa(q[:, :, later], k, v, attn_mask=visible.repeat_interleave(group, 1), scale=scale, enable_gqa=True)
        out = out.clone()
        out[:, :, later] = rows
        return out

"""The twin (D) of a decoder that drops tokens of a span: a transformers causal LM, a row at a time and without padding.

Layers run as they are, or in two halves with the method between (``trtpass.reduction.twin``); rotations are those of
the original positions. There is no cache: tokens that were generated are computed again behind their prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from trtpass.errors import InputError
from trtpass.interception import attention
from trtpass.reduction.decoder import Cut, Span
from trtpass.reduction.decoder_definition import SpanRow, SpanStep, members_of, shorten, whole
from trtpass.reduction.decoder_options import FicocoLOptions, SpanOptions
from trtpass.reduction.twin import _replaced, _silent, _tensor, halves_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TwinSite:
    """A site: its layer, the budget, the span before it, and whether it lies before its layer (or after attention)."""

    layer: int
    cut: Cut
    span: Span
    before: bool


@dataclass
class SpanRun:
    """Outputs of the twin.

    Args:
        hidden: float32 `[B, S, E]`, below lm_head, all original tokens: a dropped one has the row that it joined.
        logits: float32 `[B, T + 1, V]` of the last tokens, those of T steps behind the prompt last.
        selections: by layer what a site chose by itself, padded as in the graph: ``score [B, S]``, ``keep [B, S]``,
            ``target [B, M * K]`` where tokens joined others.
    """

    hidden: np.ndarray
    logits: np.ndarray
    selections: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)


class SpanTwin:
    """A span method on a torch model.

    Args:
        module: a transformers causal LM (Llama, Qwen2, Qwen3, Mistral) in eval mode, float32.
        options: the pass's options.
        sites: in order.
        seed: tokens go at random.
    """

    def __init__(self, module: Any, options: SpanOptions, sites: Sequence[TwinSite], seed: int | None = None) -> None:
        self.module, self.options, self.seed = module, options, seed
        self.sites = {site.layer: site for site in sites}

    def run(
        self,
        input_ids: np.ndarray,
        lengths: np.ndarray,
        forced: Mapping[int, Mapping[str, np.ndarray]] | None = None,
        steps: int = 0,
    ) -> SpanRun:
        """Run on right-padded ``input_ids [B, S]`` with ``lengths [B]``.

        Args:
            forced: by layer ``keep [B, S]`` and, where tokens join others, ``target [B, M * K]`` of the prompts.
            steps: the last tokens of each row that are no part of its prompt.

        Raises:
            InputError: selections for other layers than there are sites.
        """
        if forced is not None and set(forced) != set(self.sites):
            raise InputError(f"selections are forced for layers {sorted(forced)}", f"layers {sorted(self.sites)}")
        rows, chosen = [], []
        for b, length in enumerate(np.asarray(lengths).tolist()):
            given = None if forced is None else {layer: self._row_of(forced[layer], b) for layer in forced}
            hidden, logits, made = self._row(np.array(input_ids[b, :length]), steps, given)
            rows.append((np.pad(hidden, ((0, input_ids.shape[1] - length), (0, 0))), logits))
            chosen.append(made)
        selections = {layer: self._padded(layer, [made[layer] for made in chosen], forced) for layer in self.sites}
        return SpanRun(np.stack([h for h, _ in rows]), np.stack([x for _, x in rows]), selections)

    def _row_of(self, given: Mapping[str, np.ndarray], b: int) -> tuple[np.ndarray, np.ndarray | None]:
        target = given.get("target")
        return np.array(given["keep"][b]), None if target is None else np.array(target[b])

    def _row(
        self, ids: np.ndarray, steps: int, forced: Mapping[int, tuple[np.ndarray, np.ndarray | None]] | None
    ) -> tuple[np.ndarray, np.ndarray, dict[int, SpanStep]]:
        """Hidden states `[N, E]` and logits `[steps + 1, V]` of one row, and what its sites chose."""
        import torch

        count = len(ids)
        row = SpanRow(torch.empty(0), count - steps, torch.arange(count), torch.arange(count))
        positions = torch.arange(count)[None]

        def run() -> Tensor:
            out = self.module.model(input_ids=torch.from_numpy(ids)[None], position_ids=positions, use_cache=False)
            return out.last_hidden_state[0]

        with torch.inference_mode():
            hidden, made = self.carry(self.module, row, run, forced)
            logits = self.module.lm_head(hidden[count - steps - 1 :])
        return hidden.numpy(), logits.numpy(), made

    def carry(
        self,
        language: Any,
        row: SpanRow,
        run: Callable[[], Tensor],
        forced: Mapping[int, tuple[np.ndarray, np.ndarray | None]] | None,
    ) -> tuple[Tensor, dict[int, SpanStep]]:
        """Hidden states `[N, E]` of all tokens of a row that ``run`` takes through the layers of ``language``, and what
        the sites chose."""
        import torch

        halves = halves_of(language)
        seen: dict[str, Any] = {}
        made: dict[int, SpanStep] = {}

        def attend(_: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **__: Any) -> Any:
            seen.update(q=q[0], k=k[0], scale=scaling)
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scaling, enable_gqa=True
            )
            return out.transpose(1, 2), None

        def site(layer: int, hidden: Tensor) -> Tensor:
            at = self.sites[layer]
            given = None if forced is None else self._given(at, row.prompt, forced[layer])
            row.tokens = hidden[0]
            made[layer] = shorten(
                row, seen["q"], seen["k"], float(seen["scale"]), self.options, at.span, at.cut, self.seed, given
            )
            return row.tokens[None]

        def placed(kwargs: dict[str, Any]) -> dict[str, Any]:
            cos, sin = kwargs["position_embeddings"]
            return {**kwargs, "position_embeddings": (cos[:, row.place], sin[:, row.place]), "attention_mask": None}

        def split(layer: int, block: Any, run: Callable[..., Any]) -> Callable[..., Any]:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
                at = self.sites.get(layer)
                if at is None:
                    return run(hidden_states, *args, **placed(kwargs))
                if at.before:
                    shorter = site(layer, hidden_states)
                    return run(shorter, *args, **placed(kwargs))
                with _silent(halves.mlp(block), False):
                    h = _tensor(run(hidden_states, *args, **placed(kwargs)))
                h = site(layer, h)
                with _silent(halves.attention(block), True):
                    return run(h, *args, **placed(kwargs))

            return forward

        with ExitStack() as stack:
            stack.enter_context(attention(halves.config, attend))
            for layer, block in enumerate(halves.blocks):
                stack.enter_context(_replaced(block, split(layer, block, block.forward)))
            return whole(row, run()), made

    @staticmethod
    def _given(at: TwinSite, prompt: int, forced: tuple[np.ndarray, np.ndarray | None]) -> tuple[Any, Any]:
        """``keep [P]`` and ``target [M, K]`` of this row from those of the batch."""
        import torch

        keep = torch.from_numpy(np.ascontiguousarray(forced[0][:prompt]))
        if forced[1] is None:
            return keep, None
        most = len(forced[0]) - at.cut.kept(len(forced[0]))  # M of the batch
        target = forced[1].reshape(most, -1) if most else np.zeros((0, 1), np.int64)
        return keep, torch.from_numpy(target[: int((keep == 0).sum())].astype(np.int64))

    def _padded(
        self, layer: int, steps: Sequence[SpanStep], forced: Mapping[int, Mapping[str, np.ndarray]] | None
    ) -> dict[str, np.ndarray]:
        """The choices of all rows as the graph pads them: scores +inf, not kept, and no target (S or C)."""
        tokens = max(len(step.score) for step in steps) if forced is None else forced[layer]["keep"].shape[1]
        held = self.sites[layer].cut.kept(tokens)
        score = np.full((len(steps), tokens), np.inf, np.float32)
        keep = np.zeros((len(steps), tokens), np.int32)
        for b, step in enumerate(steps):
            score[b, : len(step.score)], keep[b, : len(step.keep)] = step.score.numpy(), step.keep.numpy()
        made = {"score": score, "keep": keep}
        targets = [step.target.numpy() for step in steps if step.target is not None]
        if targets and isinstance(self.options, FicocoLOptions):
            members = members_of(held, self.options)
            all_targets = np.full((len(steps), tokens - held, members), tokens, np.int32)
            for b, target in enumerate(targets):
                all_targets[b, : len(target)] = held
                all_targets[b, : len(target), : target.shape[1]] = target
            made["target"] = all_targets.reshape(len(steps), -1)
        return made

"""The twin (D) of a multimodal graph with fewer tokens: the torch model itself, with the method in plain torch.

The model runs up to its decoder, its vision tower with its own sites; then each row goes through the decoder alone and
without padding. Only what is left of an image is fed, at the positions of the tokens that stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trtpass.errors import InputError
from trtpass.reduction.decoder_definition import SpanRow, SpanStep
from trtpass.reduction.decoder_options import SpanOptions
from trtpass.reduction.decoder_twin import SpanRun, SpanTwin, TwinSite
from trtpass.reduction.definition import connect_row, open_row
from trtpass.reduction.twin import EncoderTwin, _replaced

if TYPE_CHECKING:
    from torch import Tensor

    from trtpass.reduction.scc import Connected

FEATURES = -1  # the "layer" of what is merged behind the projector

Forced = Mapping[int, Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class MultimodalPlan:
    """What a method does to a multimodal graph.

    Args:
        sites: of the decoder, with the decoder's own numbers of layers.
        first: what is added to these where choices are named by layer.
        tower: makes the twin of the vision tower around a module; None where it is left alone.
        alone: the decoder carries only one token for each group that the tower merged.
        connected: how components of the image features are found; None where they are left alone.
    """

    sites: tuple[TwinSite, ...] = ()
    first: int = 0
    tower: Callable[[Any], EncoderTwin] | None = None
    alone: bool = False
    connected: Connected | None = None


@dataclass
class Prompt:
    """What a model feeds its decoder: embeds `[B, S, E]`, and positions `[B, S]` or `[n, B, S]`, None for 0, 1, ..."""

    embeds: Tensor
    positions: Tensor | None


def part(module: Any, name: str) -> Any:
    """The submodule that is called ``name``, wherever it is.

    Raises:
        InputError: there is none.
    """
    for path, child in module.named_modules():
        if path.rpartition(".")[2] == name:
            return child
    raise InputError(f"the torch model {type(module).__name__} has no '{name}'", "a transformers LLaVA or Qwen2-VL")


@contextmanager
def _stopped(language: Any) -> Iterator[list[Prompt]]:
    """Let a language model keep what it is fed and give it back as its output."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    fed: list[Prompt] = []

    def forward(*, inputs_embeds: Tensor, position_ids: Tensor | None = None, **_: Any) -> Any:
        fed.append(Prompt(inputs_embeds, position_ids))
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)

    with _replaced(language, forward):
        yield fed


class MultimodalTwin(SpanTwin):
    """A reduction of a multimodal torch model.

    Args:
        module: in eval mode, float32; it takes the graph's inputs by name, has a ``language_model`` and an ``lm_head``,
            and a config with ``image_token_id``.
        options: of the decoder's sites.
        plan: what the pass did to the graph.
        seed: tokens of the decoder go at random.
    """

    def __init__(self, module: Any, options: SpanOptions, plan: MultimodalPlan, seed: int | None = None) -> None:
        super().__init__(module, options, plan.sites, seed)
        self.plan = plan
        self.language, self.head = part(module, "language_model"), part(module, "lm_head")
        found = (getattr(getattr(m, "config", None), "image_token_id", None) for m in module.modules())
        image = next((i for i in found if i is not None), None)
        if image is None:
            raise InputError(f"no config of {type(module).__name__} has an image_token_id")
        self.image = int(image)

    def run_inputs(self, inputs: Mapping[str, np.ndarray], forced: Forced | None = None) -> SpanRun:
        """Run on the graph's inputs by name, ``lengths [B]`` among them.

        ``forced``: the graph's choices by layer, which take the place of the twin's own: ``keep`` and ``target``. In
        the result ``hidden`` and ``logits`` have a row for each token `[B, S, ...]`, 0 for padding.
        """
        import torch

        fed = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in inputs.items() if name != "lengths"}
        twin = None if self.plan.tower is None else self.plan.tower(self.module)
        selections: dict[int, dict[str, np.ndarray]] = {}
        with _stopped(self.language) as prompts, torch.inference_mode():
            if twin is None:
                self.module(**fed)
            else:
                given = None if forced is None else {k: v for k, v in forced.items() if k < self.plan.first}
                selections |= twin.run({k: v for k, v in inputs.items() if k != "lengths"}, given).selections
        (prompt,) = prompts
        lengths = np.asarray(inputs["lengths"]).tolist()
        own = None if forced is None else {k - self.plan.first: v for k, v in forced.items() if k >= self.plan.first}
        hidden = torch.zeros(prompt.embeds.shape)
        steps, labels = [], []
        for b, length in enumerate(lengths):
            label = self._label(twin, b, None if forced is None else forced.get(FEATURES))
            with torch.inference_mode():
                row, made, found = self._prompt_row(prompt, fed["input_ids"][b, :length], b, label, own)
            hidden[b, :length] = row
            steps.append(made)
            labels.append(found)
        for layer in self.sites:
            padded = self._padded(layer, [made[layer] for made in steps], own)
            selections[layer + self.plan.first] = padded
        if self.plan.connected is not None:
            selections[FEATURES] = {"target": torch.stack([label.long() for label in labels]).numpy()}
        with torch.inference_mode():
            logits = self.head(hidden)
        return SpanRun(hidden.numpy(), logits.numpy(), selections)

    def _label(self, twin: EncoderTwin | None, b: int, forced: Mapping[str, np.ndarray] | None) -> Tensor | None:
        """The number of the image token that stands for each `[N]`, as the tower merged them; or forced labels."""
        import torch

        if forced is not None:
            return torch.from_numpy(np.array(forced["target"][b]))
        if twin is None or not self.plan.alone:
            return None
        row = twin.rows[b]
        return row.place[row.owner[twin.cls :]] - twin.cls

    def _prompt_row(
        self, prompt: Prompt, ids: Tensor, b: int, label: Tensor | None, forced: Forced | None
    ) -> tuple[Tensor, dict[int, SpanStep], Tensor]:
        """Hidden states `[L, E]` of one row, what its sites chose, and the components of its features `[N]`."""
        import torch

        count = len(ids)
        x, image = prompt.embeds[b, :count].clone(), ids.eq(self.image)
        places = image.nonzero()[:, 0]
        positions = torch.arange(count)[None] if prompt.positions is None else prompt.positions[..., b, :count]
        found = torch.zeros(0)
        if self.plan.connected is not None:
            step = connect_row(open_row(x[places]), self.plan.connected, 0, label)
            if step.target is None:
                raise InputError("no components")
            found = step.target[:, 0]
            x[places] = step.row.tokens[step.row.owner]
            owner = step.row.owner.tolist()
            label = torch.tensor([owner.index(o) for o in owner])
        heir = torch.arange(count)
        if label is not None:
            heir[places] = places[label]
        stays = (heir == torch.arange(count)).nonzero()[:, 0]
        slot = torch.zeros(count, dtype=torch.long)
        slot[stays] = torch.arange(len(stays))
        row = SpanRow(torch.empty(0), len(stays), torch.arange(len(stays)), torch.arange(len(stays)), image[stays])
        at = positions[..., stays]

        def run() -> Tensor:
            position_ids = at if at.shape[0] == 1 else at[:, None]
            made = self.language(inputs_embeds=x[stays][None], position_ids=position_ids, use_cache=False)
            return made.last_hidden_state[0]

        given = None if forced is None else {layer: self._row_of(forced[layer], b) for layer in self.sites}
        hidden, made = self.carry(self.language, row, run, given)
        return hidden[slot[heir]], made, found

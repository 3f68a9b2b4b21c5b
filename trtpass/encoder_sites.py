"""Each site of a reduction alone, against its definition: the proof where there is no torch model to be a twin of.

The graph's own stream, queries and keys go in; what travels with the stream is the definition's own from site to site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trtpass.anchors import Anchors
from trtpass.errors import AnchorError
from trtpass.passes import PassResult
from trtpass.passes.stream_pass import StreamPass
from trtpass.reduction.twin import EncoderTwin


@dataclass(frozen=True)
class SiteInputs:
    """What a site reads: names of the stream ``[B, S, E]``, of q and k ``[B, H, S, D]``, and the scale."""

    layer: int
    tokens: str
    q: str
    k: str
    scale: float

    @property
    def names(self) -> tuple[str, str, str]:
        return self.tokens, self.q, self.k


def site_inputs(anchors: Anchors, layers: Sequence[int]) -> list[SiteInputs]:
    """The inputs of the sites in ``layers``; ``anchors`` are those of the graph before the pass.

    Raises:
        AnchorError: a block without a stream after attention.
    """
    blocks = {block.layer: block for block in anchors.blocks}
    found = []
    for layer in layers:
        block = blocks[layer]
        if block.residual_out is None:
            raise AnchorError(f"block {layer} has no stream after attention: {block.why_no_residual}")
        tokens, q, k = (str(value.name) for value in (block.residual_out, block.q, block.k))
        found.append(SiteInputs(layer, tokens, q, k, block.scale))
    return found


def sites_alone(
    sites: Sequence[SiteInputs],
    step: StreamPass,
    result: PassResult,
    outputs: Mapping[str, np.ndarray],
    forced: Mapping[int, Mapping[str, np.ndarray]],
) -> tuple[dict[int, np.ndarray], dict[int, dict[str, np.ndarray]]]:
    """By layer: the shortened stream ``[B, C, E]``, and what the definition itself would choose (``EncoderRun``).

    Args:
        sites: in order.
        step: the pass.
        result: what it did.
        outputs: what the graph computed for the names of ``sites``.
        forced: the graph's ``keep [B, S]`` and ``target [B, T]`` by layer, which take the place of its own.
    """
    import torch

    twin = EncoderTwin(None, step.options, result.plan, step.step)
    streams, chosen = dict[int, np.ndarray](), dict[int, dict[str, np.ndarray]]()
    state: dict[str, list[object]] = {}
    for site in sites:
        x, q, k = (torch.from_numpy(np.ascontiguousarray(outputs[name])) for name in site.names)
        seen = {"q": q, "k": k, "scale": torch.tensor(site.scale)}
        streams[site.layer] = twin._site(site.layer, x, seen, state, chosen, forced).numpy()  # type: ignore[arg-type]
    return streams, chosen

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
from trtpass.reduction.definition import open_row, reduce_row
from trtpass.reduction.options import Budget, ReductionOptions


@dataclass(frozen=True)
class SiteInputs:
    """What a site reads: names of the stream ``[B, S, E]``, of q and k ``[B, H, S, D]``; the scale; its budget."""

    layer: int
    tokens: str
    q: str
    k: str
    scale: float
    budget: Budget

    @property
    def names(self) -> tuple[str, str, str]:
        return self.tokens, self.q, self.k


def site_inputs(anchors: Anchors, result: PassResult) -> list[SiteInputs]:
    """The inputs of every site of ``result``, in order; ``anchors`` are those of the graph before the pass.

    Raises:
        AnchorError: a block without a stream after attention.
    """
    blocks = {block.layer: block for block in anchors.blocks}
    found = []
    for layer, budget in zip(result.plan.blocks, result.plan.budgets, strict=True):
        block = blocks[layer]
        if block.residual_out is None:
            raise AnchorError(f"block {layer} has no stream after attention: {block.why_no_residual}")
        names = (str(value.name) for value in (block.residual_out, block.q, block.k))
        found.append(SiteInputs(layer, *names, block.scale, budget))
    return found


def sites_alone(
    sites: Sequence[SiteInputs],
    options: ReductionOptions,
    result: PassResult,
    outputs: Mapping[str, np.ndarray],
    forced: Mapping[int, Mapping[str, np.ndarray]],
) -> tuple[dict[int, np.ndarray], dict[int, dict[str, np.ndarray]]]:
    """By layer: the shortened stream ``[B, C, E]``, and the definition's own ``score``, ``keep`` and ``target``.

    Args:
        sites: in order.
        options: the pass's.
        result: the pass's.
        outputs: what the graph computed for the names of ``sites``.
        forced: the graph's ``keep [B, S]`` and ``target [B, T]`` by layer, which take the place of its own.
    """
    import torch

    streams, chosen = dict[int, np.ndarray](), dict[int, dict[str, np.ndarray]]()
    rows = None
    for site in sites:
        x, q, k = (torch.from_numpy(np.ascontiguousarray(outputs[name])) for name in site.names)
        rows = [open_row(row) for row in x] if rows is None else rows
        steps = []
        for b, row in enumerate(rows):
            row.tokens = x[b]
            keep = torch.from_numpy(forced[site.layer]["keep"][b].copy())
            target = forced[site.layer].get("target")
            given = None if target is None else torch.from_numpy(target[b].copy()).long()
            members = None if given is None else given.reshape(max(int((keep == 0).sum()), 1), -1)
            steps.append(
                reduce_row(
                    row, q[b], k[b], site.scale, options, site.budget, result.plan.cls, result.plan.columns,
                    (keep, members),
                )
            )  # fmt: skip
        rows = [step.row for step in steps]
        streams[site.layer] = np.stack([row.tokens.numpy() for row in rows])
        own = {"score": [s.score for s in steps], "keep": [s.keep for s in steps]}
        own["target"] = [s.target.reshape(-1) for s in steps if s.target is not None]
        chosen[site.layer] = {role: torch.stack(parts).numpy() for role, parts in own.items() if parts}
    return streams, chosen

"""What the sites of a shortened stream choose: compared between two sides, or fed to a graph from outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from trtpass.passes import PassResult, Site

# A score is a cosine or a mean of probabilities. Inputs that differ by 1e-5 move it by about that share of the range
# that the scores of a row have: far less than this.
MARGIN = 1e-3
FORCED = ("keep", "target")  # roles that are fed instead of computed
SEEN = ("score", *FORCED)  # roles that a comparison looks at

Selections = Mapping[int, Mapping[str, np.ndarray]]


def reducing(results: Sequence[PassResult]) -> tuple[Site, ...]:
    """The sites at which a stream becomes shorter, in order."""
    sites = [site for result in results for site in result.sites if "tokens" in site.values]
    return tuple(sorted(sites, key=lambda site: site.layer))


@dataclass
class Flips:
    """Free choices of two sides over all rows and sites."""

    decisions: int = 0
    flipped: int = 0
    worst: float = 0.0  # distance from the cut of the worst flipped token, as a share of the row's range of scores

    @property
    def share(self) -> float:
        return self.flipped / self.decisions if self.decisions else 0.0


def flips(left: Selections, right: Selections) -> Flips:
    """Compare ``keep [B, S]`` by the right side's ``score [B, S]`` (highest kept), and ``target [B, T]``, by layer.

    A target has no cut of its own: it is counted alone, and the numbers of the forced run are what bounds it.
    """
    found = Flips()
    for layer, mine in right.items():
        other = left[layer]
        if "keep" in mine and "keep" in other:
            for keep, seen, score in zip(mine["keep"] != 0, other["keep"] != 0, mine["score"], strict=True):
                found.decisions += keep.size
                found.flipped += int((keep != seen).sum())
                found.worst = max(found.worst, _distance(keep, keep != seen, score))
        if "target" in mine and "target" in other:
            found.decisions += mine["target"].size
            found.flipped += int((mine["target"] != other["target"]).sum())
    return found


def _distance(keep: np.ndarray, differs: np.ndarray, score: np.ndarray) -> float:
    """How far from the cut the worst differing token of a row lies, all ``[S]``; infinite without a finite score."""
    finite = np.isfinite(score)
    if not differs.any():
        return 0.0
    if not finite[differs].all() or not (finite & keep).any():
        return float("inf")
    cut = float(score[finite & keep].min())
    reach = max(float(np.ptp(score[finite])), 1e-6 * float(np.abs(score[finite]).max()), 1e-30)
    return float(np.abs(score[differs] - cut).max()) / reach


def force(model: ir.Model, sites: Sequence[Site]) -> dict[str, tuple[int, str]]:
    """Feed the choices of every site from new graph inputs, in place; the graph still makes its own, to be compared.

    Returns:
        Input name -> (layer, role).
    """
    values = {v.name: v for node in model.graph for v in node.outputs}
    given: dict[str, tuple[int, str]] = {}
    for site in sites:
        for role in FORCED:
            if role not in site.values:
                continue
            own = values[site.values[role]]
            value = ir.Value(name=f"forced.{own.name}", type=own.type, shape=own.shape)
            model.graph.inputs.append(value)
            for node, index in list(own.uses()):
                node.replace_input_with(index, value)
            given[str(value.name)] = (site.layer, role)
    return given

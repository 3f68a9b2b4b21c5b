"""Cache policies: passes that say, for each key of each KV head, whether the cache keeps it once it is old.

A policy leaves the model's own outputs as they are and adds one for each chosen layer::

    keep.{layer} int32 [B, Hkv, S]    1: kept, 0: evicted when it leaves the window, -1: the decision came out as NaN

It is the raw decision: sinks and window are protected by the paged cache (``trtpass.passes.paged_cache``), which reads
these outputs. A forward whose first query is at position T hides key t iff keep is 0 and sinks <= t <= T - 1 - window.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from trtpass import layers
from trtpass.anchors import Anchors, AttentionBlock
from trtpass.errors import AnchorError, InputError
from trtpass.passes import Pass, PassResult, Site, need_blocks

if TYPE_CHECKING:
    from torch import Tensor

WINDOW_KEY, SINKS_KEY = "trtpass.cache.window", "trtpass.cache.sinks"  # properties of a graph with a policy
KEPT = "keep"  # role of a site's value


def keep_name(layer: int) -> str:
    """The graph output that holds the decisions of a layer."""
    return f"keep.{layer}"


def need_cache_options(name: str, window: int, sinks: int) -> None:
    """Raises InputError for a window or sinks out of range."""
    for key, value in (("window", window), ("sinks", sinks)):
        if not 0 <= value <= 65536:
            raise InputError(f"{name}: {key}={value}", f"{key} from 0 to 65536 tokens")


@dataclass(frozen=True)
class Decision:
    """Of one layer: ``keep`` int32 ``[B, Hkv, S]``, and ``score`` of that shape where the policy has scores."""

    keep: Tensor
    score: Tensor | None = None


@dataclass(frozen=True)
class Keys:
    """What a policy may look at in one layer, in torch.

    Args:
        layer: its index.
        hidden: what feeds q, k and v `[B, S, E]`.
        q: `[B, H, S, D]` after RoPE.
        k: `[B, Hkv, S, D]` after RoPE.
        positions: logical positions `[B, S]` int64.
        lengths: valid tokens of each row `[B]` int32.
        scale: factor of the attention's scores.
    """

    layer: int
    hidden: Tensor
    q: Tensor
    k: Tensor
    positions: Tensor
    lengths: Tensor
    scale: float


class CachePolicy(Pass):
    """A pass that decides what a KV cache holds. Its options have ``window``, ``sinks`` and ``layers``."""

    cache_policy: ClassVar[bool] = True

    def requires(self, model: ir.Model, anchors: Anchors) -> None:
        """Causal attention in every layer, and nothing rewritten yet."""
        need_blocks(anchors, self.name)
        chosen = self.chosen(model, anchors)
        for block in anchors.blocks:
            if not block.causal:
                raise AnchorError(
                    f"pass '{self.name}': layer {block.layer} cannot use a cache: {block.why_not_causal}",
                    "causal attention in every layer",
                )
        taken = [name for name in (keep_name(i) for i in chosen) if any(o.name == name for o in model.graph.outputs)]
        if taken:
            raise InputError(f"pass '{self.name}': the graph already has a policy ('{taken[0]}')", "one cache policy")

    def chosen(self, model: ir.Model, anchors: Anchors) -> tuple[int, ...]:
        """Indices of the layers in which keys may be evicted."""
        return layers.resolve(self.options.layers, len(anchors.blocks), layers.carried_drift(model))

    def call(self, model: ir.Model, anchors: Anchors) -> PassResult:
        sites = []
        for layer in self.chosen(model, anchors):
            block = anchors.blocks[layer]
            roles = self.insert(model, anchors, block)
            keep = roles[KEPT]
            keep.name = keep_name(layer)
            model.graph.outputs.append(keep)
            sites.append(Site(layer, {role: str(value.name) for role, value in roles.items()}))
        model.metadata_props[WINDOW_KEY] = str(self.options.window)
        model.metadata_props[SINKS_KEY] = str(self.options.sinks)
        return PassResult(self.name, bool(sites), tuple(sites), (), self.describe(), self.warnings())

    def decode(self) -> CachePolicy | None:
        """The policy of keys that decoding adds; None keeps all of them."""
        return self

    def warnings(self) -> tuple[str, ...]:
        """What is legal and probably not meant, in words."""
        return ()

    def files(self) -> Mapping[str, Any]:
        """Option -> file that the pass reads, so that an engine can carry it."""
        return {}

    def distance(self, score: np.ndarray, keep: np.ndarray) -> np.ndarray:
        """How far each score is from what separates kept from evicted, all ``[B, Hkv, S]``: relative to the lowest
        score that is kept."""
        cut = np.where(keep != 0, score, np.inf).min(-1, keepdims=True)
        away: np.ndarray = np.abs(score - cut) / np.maximum(np.abs(cut), 1e-30)
        return away

    @abc.abstractmethod
    def insert(self, model: ir.Model, anchors: Anchors, block: AttentionBlock) -> dict[str, ir.Value]:
        """Add the decision's nodes to the graph; the values by role, ``keep`` int32 ``[B, Hkv, S]`` among them."""

    @abc.abstractmethod
    def decide(self, keys: Keys) -> Decision:
        """The same in torch: the reference."""


def policy_of(steps: Any) -> CachePolicy | None:
    """The cache policy of a pipeline.

    Raises:
        InputError: there are several.
    """
    found = [step for step in steps if isinstance(step, CachePolicy)]
    if len(found) > 1:
        raise InputError(f"cache policies {', '.join(p.name for p in found)}", "at most one")
    return found[0] if found else None

"""KVzap (arXiv 2601.07891): a learned score of each key, from the hidden state that made it, says what the cache keeps.

In each chosen layer, from the tensor h that feeds q, k and v::

    score = h W^T + b                          [B, Hkv, S]    linear; or W2 gelu(W1 h + b1) + b2, an MLP
    keep  = score >= threshold                 judged once, when a key leaves the window

The score predicts the logarithm of KVzip+ (``trtpass.kvzap.oracle``), so one threshold means the same in all layers and
heads. ``trtpass fit kvzap`` makes the weights; published checkpoints have the same layout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from trtpass.anchors import Anchors, AttentionBlock
from trtpass.errors import AnchorError, InputError
from trtpass.ir import constant, dims, make_node
from trtpass.passes import plain
from trtpass.passes.cache_policy import KEPT, CachePolicy, Decision, Keys, need_cache_options

if TYPE_CHECKING:
    from trtpass.kvzap.surrogate import Surrogate

RECIPE_KEY = "trtpass.recipe"  # property of a graph: the known model that it was exported from


@dataclass(frozen=True)
class KVzapOptions:
    """Options of ``kvzap``.

    Args:
        threshold: keys whose predicted log score is below it are evicted; -inf keeps all, +inf none but the window's.
            None takes the one that ``removed`` names.
        removed: share of the keys that would be evicted from the text that the checkpoint was measured on, window and
            sinks not counted; for checkpoints of ``trtpass fit kvzap``, which say so.
        window: W, the last keys that are always kept, in tokens; W + 1 with the query's own.
        sinks: the first keys, always kept; 0 is the paper.
        kind: ``auto``, or ``linear`` or ``mlp`` where the checkpoint must be of that kind.
        weights: a checkpoint in safetensors; empty takes the one that comes with a known model.
        layers: ``all``, ``drift:0.5``, or ``3+5+10-20``; other layers keep everything.
    """

    threshold: float | None = None
    removed: float = 0.75
    window: int = 128
    sinks: int = 4
    kind: str = "auto"
    weights: str = ""
    layers: str = "all"

    def __post_init__(self) -> None:
        if self.threshold is not None and math.isnan(self.threshold):
            raise InputError("kvzap: threshold=nan", "a number, -inf or inf")
        if not 0.0 <= self.removed <= 1.0:
            raise InputError(f"kvzap: removed={self.removed}", "a share in [0, 1]")
        if self.kind not in ("auto", "linear", "mlp"):
            raise InputError(f"kvzap: kind={self.kind}", "auto, linear or mlp")
        need_cache_options("kvzap", self.window, self.sinks)


class KVzap(CachePolicy):
    """Score keys by a surrogate of KVzip+, and let the cache drop those below a threshold."""

    name: ClassVar[str] = "kvzap"
    summary: ClassVar[str] = "the cache keeps, per KV head, the keys whose learned score passes a threshold"
    source: ClassVar[str] = "KVzap, arXiv 2601.07891"
    Options: ClassVar[type] = KVzapOptions
    options: KVzapOptions

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self._model = ""

    def requires(self, model: ir.Model, anchors: Anchors) -> None:
        """As every policy; one tensor that feeds q, k and v; and a checkpoint that fits the model."""
        super().requires(model, anchors)
        self._model = model.metadata_props.get(RECIPE_KEY, "")
        for layer in self.chosen(model, anchors):
            block = anchors.blocks[layer]
            if block.qkv_input is None:
                raise AnchorError(
                    f"pass 'kvzap': layer {layer}: {block.why_no_qkv_input}", "one tensor above q, k and v"
                )
            width = (dims(block.qkv_input) or [None])[-1]
            if not isinstance(width, int):
                raise AnchorError(f"pass 'kvzap': layer {layer}: '{block.qkv_input.name}' has no fixed width")
            self.surrogate.need(len(anchors.blocks), width, block.kv_heads, f"layer {layer} of the graph")
        self.threshold  # noqa: B018 - raises where there is none

    @cached_property
    def surrogate(self) -> Surrogate:
        """The checkpoint.

        Raises:
            InputError: there is none for this model, or it is not one.
        """
        from trtpass.kvzap.surrogate import Surrogate

        path = Path(self.options.weights) if self.options.weights else Surrogate.shipped(self._model)
        if path is None:
            raise InputError(
                f"pass 'kvzap' has no weights for {f'the model {self._model!r}' if self._model else 'this graph'}",
                "weights=FILE, a KVzap checkpoint in safetensors",
                "fit one with `trtpass fit kvzap MODEL`",
            )
        loaded = Surrogate.load(path)
        if self.options.kind not in ("auto", loaded.kind):
            raise InputError(f"kvzap: kind={self.options.kind}, but {path.name} holds the {loaded.kind} kind")
        return loaded

    @property
    def threshold(self) -> float:
        """The threshold that was given, or the one that the checkpoint names for ``removed``.

        Raises:
            InputError: it was not given, and the checkpoint does not say.
        """
        if self.options.threshold is not None:
            return self.options.threshold
        found = self.surrogate.threshold(self.options.removed)
        if found is None:
            raise InputError(
                f"kvzap: no threshold, and the checkpoint has none for removed={self.options.removed}",
                "threshold=NUMBER, such as -4 (published checkpoints state theirs)",
                "give a threshold, or fit a checkpoint with `trtpass fit kvzap`",
            )
        return found

    def describe(self) -> dict[str, Any]:
        """The options, with the threshold that is used."""
        return {**super().describe(), "threshold": plain(self.threshold)}

    def files(self) -> Mapping[str, Any]:
        return {"weights": self.surrogate}

    def warnings(self) -> tuple[str, ...]:
        if self.threshold == math.inf:
            return (f"threshold=inf evicts every key that leaves the window of {self.options.window}",)
        return ()

    def distance(self, score: np.ndarray, keep: np.ndarray) -> np.ndarray:
        """In units of the score, a natural logarithm."""
        away: np.ndarray = np.abs(score - self.threshold)
        return away

    def insert(self, model: ir.Model, anchors: Anchors, block: AttentionBlock) -> dict[str, ir.Value]:
        graph, hidden = model.graph, block.qkv_input
        if hidden is None:  # excluded by requires
            raise AnchorError(block.why_no_qkv_input)
        label = f"layer{block.layer}.kvzap"
        batch, tokens, _ = dims(hidden)  # type: ignore[misc]
        dtype = hidden.dtype or ir.DataType.FLOAT
        new: list[ir.Node] = []

        def add(
            op: str, inputs: list[ir.Value], name: str, shape: list[Any], kind: ir.DataType, **attrs: Any
        ) -> ir.Value:
            new.append(make_node(op, inputs, [(f"{label}.{name}", kind, shape)], attrs, name=f"{label}.{name}.{op}"))
            return new[-1].outputs[0]

        def dense(x: ir.Value, key: str) -> ir.Value:
            """``x [B, S, in]`` times the checkpoint's ``[out, in]``, plus its bias."""
            prefix = f"{key}." if key else ""
            weight = self.surrogate.layers[block.layer][f"{prefix}weight"]
            bias = self.surrogate.layers[block.layer][f"{prefix}bias"]
            shape = [batch, tokens, weight.shape[0]]
            weights = constant(graph, f"{label}.{prefix}weight", np.ascontiguousarray(weight.T, dtype.numpy()))
            made = add("MatMul", [x, weights], f"{prefix}product", shape, dtype)
            return add("Add", [made, constant(graph, f"{label}.{prefix}bias", bias.astype(dtype.numpy()))],
                       f"{prefix}sum", shape, dtype)  # fmt: skip

        if self.surrogate.kind == "linear":
            flat = dense(hidden, "")
        else:
            inner = dense(hidden, "0")
            flat = dense(add("Gelu", [inner], "gelu", dims(inner) or [], dtype, approximate="none"), "2")
        shape = [batch, block.kv_heads, tokens]
        score = add("Transpose", [flat], "score", shape, dtype, perm=[0, 2, 1])
        limit = constant(graph, "kvzap.threshold", np.array(self.threshold, dtype.numpy()))
        passes = add("GreaterOrEqual", [score, limit], "passes", shape, ir.DataType.BOOL)
        number = add("Cast", [passes], "number", shape, ir.DataType.INT32, to=int(ir.DataType.INT32))
        broken = add("IsNaN", [score], "broken", shape, ir.DataType.BOOL)
        minus = constant(graph, "kvzap.broken", np.array(-1, np.int32))
        keep = add("Where", [broken, minus, number], "keep", shape, ir.DataType.INT32)
        graph.insert_before(block.node, new)
        return {"score": score, KEPT: keep}

    def decide(self, keys: Keys) -> Decision:
        import torch

        batch, tokens, _ = keys.hidden.shape
        layer = replace(self.surrogate, layers=(self.surrogate.layers[keys.layer],))
        flat = layer.predict(keys.hidden.flatten(0, 1)[None])[0]  # [Hkv, B S]
        score = flat.unflatten(1, (batch, tokens)).transpose(0, 1)
        keep = (score >= self.threshold).int()
        return Decision(torch.where(score.isnan(), -1, keep).int(), score)

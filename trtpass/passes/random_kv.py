"""A control: the cache keeps keys at random. A method that is worth its name beats it at the same kept fraction.

Whether a key is kept depends on its position, layer and KV head alone, by integers that are the same everywhere:
``h = (x^2 mod P)^2 mod P, x = (a position + b owner + seed) mod P``, kept where h < keep * P, with P = 46337, the
largest prime of which squares fit into int32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from trtpass.anchors import Anchors, AttentionBlock
from trtpass.errors import AnchorError, InputError
from trtpass.ir import constant, dims, make_node
from trtpass.passes.cache_policy import KEPT, CachePolicy, Decision, Keys, need_cache_options

PRIME, STEP, OWNER, SEED = 46337, 7919, 10007, 104729


@dataclass(frozen=True)
class RandomKVOptions:
    """Options of ``random-kv``.

    Args:
        keep: share of the keys to keep, in [0, 1], beside window and sinks.
        window: the last keys that are always kept, in tokens.
        sinks: the first keys, always kept.
        layers: ``all`` or ``3+5+10-20``; other layers keep everything.
        seed: another choice of keys.
    """

    keep: float = 0.25
    window: int = 128
    sinks: int = 4
    layers: str = "all"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.keep <= 1.0:
            raise InputError(f"random-kv: keep={self.keep}", "a share in [0, 1]")
        need_cache_options("random-kv", self.window, self.sinks)

    @property
    def cut(self) -> int:
        """Hashes below it are kept."""
        return round(self.keep * PRIME)


class RandomKV(CachePolicy):
    """Keep keys at random, the same ones on every target."""

    name: ClassVar[str] = "random-kv"
    summary: ClassVar[str] = "the cache keeps keys at random: a control for other policies"
    source: ClassVar[str] = "none: a control"
    Options: ClassVar[type] = RandomKVOptions
    options: RandomKVOptions

    def requires(self, model: ir.Model, anchors: Anchors) -> None:
        super().requires(model, anchors)
        if anchors.positions is None:
            raise AnchorError(f"pass 'random-kv' found no positions: {'; '.join(anchors.missing)}")

    def _owners(self, layer: int, heads: int) -> np.ndarray:
        """What is added for each KV head `[1, Hkv, 1]` int64."""
        owner = layer * heads + np.arange(heads, dtype=np.int64)
        return ((OWNER * owner + SEED * (self.options.seed + 1)) % PRIME)[None, :, None]

    def insert(self, model: ir.Model, anchors: Anchors, block: AttentionBlock) -> dict[str, ir.Value]:
        graph, positions = model.graph, anchors.positions
        if positions is None:  # excluded by requires
            raise AnchorError("no positions")
        batch, heads, tokens, _ = dims(block.k)  # type: ignore[misc]
        label, int64 = f"layer{block.layer}.random_kv", ir.DataType.INT64
        shape = [batch, heads, tokens]
        new: list[ir.Node] = []

        def add(op: str, inputs: list[ir.Value], name: str, dtype: ir.DataType = int64, **attrs: Any) -> ir.Value:
            new.append(make_node(op, inputs, [(f"{label}.{name}", dtype, shape)], attrs, name=f"{label}.{name}.{op}"))
            return new[-1].outputs[0]

        prime = constant(graph, "random_kv.prime", np.array(PRIME, np.int64))
        wide = make_node("Cast", [positions], [(f"{label}.wide", int64, dims(positions))], {"to": int(int64)})
        row = make_node("Unsqueeze", [wide.outputs[0], constant(graph, "random_kv.axis", np.array([1], np.int64))],
                        [(f"{label}.row", int64, None)])  # fmt: skip
        new += [wide, row]
        # Positions may be [1, S], the same for all rows: k's shape decides.
        size = make_node("Shape", [block.k], [(f"{label}.size", int64, [3])], {"start": 0, "end": 3})
        new.append(size)
        spread = add("Expand", [row.outputs[0], size.outputs[0]], "positions")
        scaled = add("Mul", [spread, constant(graph, "random_kv.step", np.array(STEP, np.int64))], "scaled")
        owner = constant(graph, f"{label}.owners", self._owners(block.layer, heads))
        x = add("Mod", [add("Add", [scaled, owner], "sum"), prime], "x")
        once = add("Mod", [add("Mul", [x, x], "squared"), prime], "once")
        twice = add("Mod", [add("Mul", [once, once], "squared_again"), prime], "hash")
        kept = add("Less", [twice, constant(graph, "random_kv.cut", np.array(self.options.cut, np.int64))], "kept",
                   ir.DataType.BOOL)  # fmt: skip
        keep = add("Cast", [kept], "keep", ir.DataType.INT32, to=int(ir.DataType.INT32))
        graph.insert_before(block.node, new)
        return {KEPT: keep}

    def decide(self, keys: Keys) -> Decision:
        import torch

        heads = keys.k.shape[1]
        x = (keys.positions[:, None] * STEP + torch.from_numpy(self._owners(keys.layer, heads))) % PRIME
        return Decision(((x * x % PRIME) ** 2 % PRIME < self.options.cut).int())

"""SnapKV (arXiv 2404.14469) as a cache policy: at the end of the prompt, the keys that its last queries look at.

Scores are summed over the query heads of a group, because the cache holds keys per KV head. What is decoded later is
kept. The method looks at the last queries of the prompt, so it is defined on whole prompts only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from plugins import all_ops
from plugins._library import function
from trtpass.anchors import Anchors, AttentionBlock
from trtpass.errors import InputError
from trtpass.ir import add_input, constant, dims, make_node
from trtpass.op import DOMAIN, VERSION
from trtpass.passes import WHOLE_PROMPT_KEY, PassResult
from trtpass.passes.cache_policy import KEPT, CachePolicy, Decision, Keys, need_cache_options

PPM = 1_000_000


@dataclass(frozen=True)
class SnapKVOptions:
    """Options of ``snapkv``.

    Args:
        keep: share of a prompt's keys to keep in each KV head, in (0, 1]; the window counts.
        window: the last queries, which vote and whose keys stay, in tokens.
        pool: kernel of the average pooling over a head's mass, odd.
        sinks: the first keys, always kept.
        layers: ``all``, ``drift:0.5`` or ``3+5+10-20``; other layers keep everything.
    """

    keep: float = 0.25
    window: int = 32
    pool: int = 7
    sinks: int = 4
    layers: str = "all"

    def __post_init__(self) -> None:
        if not 0.0 < self.keep <= 1.0:
            raise InputError(f"snapkv: keep={self.keep}", "a share in (0, 1]")
        if not (1 <= self.pool <= 255 and self.pool % 2):
            raise InputError(f"snapkv: pool={self.pool}", "an odd kernel from 1 to 255")
        if self.window < 1:
            raise InputError(f"snapkv: window={self.window}", "1 or more queries that vote")
        need_cache_options("snapkv", self.window, self.sinks)


class SnapKV(CachePolicy):
    """Keep what the last queries of the prompt look at, in equal numbers for each KV head."""

    name: ClassVar[str] = "snapkv"
    summary: ClassVar[str] = "the cache keeps, per KV head, the keys that the prompt's last queries look at"
    source: ClassVar[str] = "SnapKV, arXiv 2404.14469"
    whole_prompt: ClassVar[bool] = True
    Options: ClassVar[type] = SnapKVOptions
    options: SnapKVOptions

    def decode(self) -> CachePolicy | None:
        return None

    def call(self, model: ir.Model, anchors: Anchors) -> PassResult:
        result = super().call(model, anchors)
        for name in ("ColumnMass", "SelectTokens"):
            body = function(all_ops()[name], "dynamic")
            model.functions[body.identifier()] = body
        model.opset_imports[DOMAIN] = VERSION
        model.metadata_props[WHOLE_PROMPT_KEY] = self.name
        return result

    def insert(self, model: ir.Model, anchors: Anchors, block: AttentionBlock) -> dict[str, ir.Value]:
        graph, options, ops = model.graph, self.options, all_ops()
        label, i32, i64 = f"layer{block.layer}.snapkv", ir.DataType.INT32, ir.DataType.INT64
        batch, heads, tokens, _ = dims(block.k)  # type: ignore[misc]
        lengths = add_input(graph, "lengths", i32, [batch])
        new: list[ir.Node] = []

        def add(op: str, inputs: list[ir.Value], name: str, dtype: ir.DataType, shape: Any, **attrs: Any) -> ir.Value:
            domain = DOMAIN if op in ops else ""
            new.append(make_node(op, inputs, [(f"{label}.{name}", dtype, shape)], attrs, domain=domain,
                                 name=f"{label}.{name}.{op}"))  # fmt: skip
            return new[-1].outputs[0]

        def fixed(name: str, value: Any, dtype: Any = np.int64) -> ir.Value:
            return constant(graph, f"snapkv.{name}", np.array(value, dtype))

        mass = add("ColumnMass", [block.q, block.k, lengths], "mass", ir.DataType.FLOAT, [batch, block.heads, tokens],
                   window=options.window, pool=options.pool, prefix=1, scale=float(block.scale))  # fmt: skip
        by_group = add("Reshape", [mass, fixed(f"groups{block.layer}", [0, heads, block.group, -1])], "by_group",
                       ir.DataType.FLOAT, [batch, heads, block.group, tokens])  # fmt: skip
        score = add("ReduceSum", [by_group, fixed("group_axis", [2])], "score", ir.DataType.FLOAT,
                    [batch, heads, tokens], keepdims=0)  # fmt: skip
        # ceil(L keep), in parts per million: L * ppm passes int32 beyond 2147 tokens.
        wide = add("Cast", [lengths], "wide", i64, [batch], to=int(i64))
        scaled = add("Mul", [wide, fixed("ppm", round(options.keep * PPM))], "scaled", i64, [batch])
        above = add("Add", [scaled, fixed("up", PPM - 1)], "above", i64, [batch])
        quotient = add("Div", [above, fixed("million", PPM)], "quotient", i64, [batch])
        count = add("Cast", [quotient], "count", i32, [batch], to=int(i32))
        new.append(make_node(
            "SelectTokens", [score, count, lengths],
            [(f"{label}.index", i32, [batch, heads, tokens]), (f"{label}.number", i32, [batch, heads])],
            {"window": options.window, "max_keep_permille": 1000}, domain=DOMAIN, name=f"{label}.SelectTokens",
        ))  # fmt: skip
        index = new[-1].outputs[0]
        # Ones at the chosen tokens; unused entries of the index are S, a column of their own.
        size = add("Shape", [score], "size", i64, [3])
        more = add("Add", [size, fixed("one_more", [0, 0, 1])], "more", i64, [3])
        nothing = add("ConstantOfShape", [more], "nothing", i32, None, value=ir.tensor(np.zeros(1, np.int32)))
        chosen = add("Shape", [index], "chosen", i64, [3])
        ones = add("ConstantOfShape", [chosen], "ones", i32, None, value=ir.tensor(np.ones(1, np.int32)))
        marked = add("ScatterElements", [nothing, index, ones], "marked", i32, None, axis=2)
        end = add("Slice", [size, fixed("last", [2]), fixed("behind", [3])], "end", i64, [1])
        keep = add("Slice", [marked, fixed("start", [0]), end, fixed("axis", [2])], "keep", i32, [batch, heads, tokens])
        graph.insert_before(block.node, new)
        return {"score": score, KEPT: keep}

    def decide(self, keys: Keys) -> Decision:
        import torch

        options, ops = self.options, all_ops()
        mass = ops["ColumnMass"](
            keys.q, keys.k, keys.lengths, window=options.window, pool=options.pool, prefix=1, scale=keys.scale
        )
        score = mass.unflatten(1, (keys.k.shape[1], -1)).sum(2)
        count = -(-keys.lengths.long() * round(options.keep * PPM) // PPM)
        index, _ = ops["SelectTokens"](score, count.int(), keys.lengths, window=options.window, max_keep_permille=1000)
        keep = torch.zeros(*score.shape[:2], score.shape[2] + 1, dtype=torch.int32).scatter(2, index.long(), 1)[
            ..., :-1
        ]
        decoded = keys.positions >= keys.lengths[:, None]
        return Decision(torch.where(decoded[:, None], 1, keep).int(), score)

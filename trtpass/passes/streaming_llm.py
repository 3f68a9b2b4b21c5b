"""StreamingLLM (arXiv 2309.17453) as a cache policy: the first keys and the last ones, whatever they hold.

Published StreamingLLM numbers positions inside the cache; here they stay those of the text, as for every policy, so
that policies differ by what they keep alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from trtpass.anchors import Anchors, AttentionBlock
from trtpass.ir import dims, make_node
from trtpass.passes.cache_policy import KEPT, CachePolicy, Decision, Keys, need_cache_options


@dataclass(frozen=True)
class StreamingLLMOptions:
    """Options of ``streaming-llm``: ``window`` last and ``sinks`` first tokens stay; in ``layers``, others keep all."""

    window: int = 1024
    sinks: int = 4
    layers: str = "all"

    def __post_init__(self) -> None:
        need_cache_options("streaming-llm", self.window, self.sinks)


class StreamingLLM(CachePolicy):
    """Keep sinks and the window, evict everything else."""

    name: ClassVar[str] = "streaming-llm"
    summary: ClassVar[str] = "the cache keeps the first tokens and the last ones"
    source: ClassVar[str] = "StreamingLLM, arXiv 2309.17453"
    Options: ClassVar[type] = StreamingLLMOptions

    def insert(self, model: ir.Model, anchors: Anchors, block: AttentionBlock) -> dict[str, ir.Value]:
        batch, heads, tokens, _ = dims(block.k)  # type: ignore[misc]
        label = f"layer{block.layer}.streaming_llm"
        size = make_node("Shape", [block.k], [(f"{label}.size", ir.DataType.INT64, [3])], {"start": 0, "end": 3})
        keep = make_node(
            "ConstantOfShape", size.outputs, [(f"{label}.keep", ir.DataType.INT32, [batch, heads, tokens])],
            {"value": ir.tensor(np.zeros(1, np.int32))},
        )  # fmt: skip
        model.graph.insert_before(block.node, [size, keep])
        return {KEPT: keep.outputs[0]}

    def decide(self, keys: Keys) -> Decision:
        import torch

        return Decision(torch.zeros(keys.k.shape[:3], dtype=torch.int32))

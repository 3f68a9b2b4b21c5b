"""``scc`` and ``scc-two-step`` (LLaVA-Scissor, arXiv 2506.21862): tokens linked by similarity become their mean.

One site: between attention and MLP of an encoder's block ``layer``, or where the image features of a multimodal graph
enter its decoder (``layer=projector``, the paper's place). The stream is cut into semantic connected components, exact
and in any number; ``trtpass.scc`` is the same for arrays. How many tokens go on depends on the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from trtpass.anchors import Anchors, AttentionBlock
from trtpass.errors import InputError
from trtpass.ir import dims
from trtpass.multimodal import describe, parts
from trtpass.passes import REDUCED_KEY, WHOLE_PROMPT_KEY, PassResult
from trtpass.passes.logits import lm_head
from trtpass.passes.stream_pass import Plan, StreamPass
from trtpass.reduction.decoder_options import SpanOptions
from trtpass.reduction.emit import F32, I32, Emitter
from trtpass.reduction.multimodal_scc import merge_features
from trtpass.reduction.multimodal_twin import MultimodalPlan, MultimodalTwin
from trtpass.reduction.options import LOW_KEEP, RESTORES, Budget, need
from trtpass.reduction.scc import Connected, connect
from trtpass.reduction.stream import Stream

if TYPE_CHECKING:
    from trtpass.encoders import Encoder


PROJECTOR = "projector"  # the place of image features in a multimodal graph


@dataclass(frozen=True)
class SccOptions:
    """Options of ``scc``.

    Args:
        tau: cosine above which two tokens are linked. Above 1 nothing merges, below -1 everything does.
        layer: the block of an encoder after whose attention the stream is merged, from 0; ``projector``: the image
            features of a multimodal graph, whose decoder then carries fewer tokens; ``auto``: the projector where there
            is one, half way through any other encoder.
        max_keep: share of the tokens that there is room for, in (0, 1]; targets with fixed shapes save only what this
            cuts. What does not fit joins the most similar representative.
        proportional: keys count as often as their token's size in attention.
        restore: ``grid`` gives the head the rows of all original tokens back, ``none`` does not, ``auto`` looks at it.
        cls: leading tokens that are never touched; ``auto`` finds them.
    """

    tau: float = 0.9
    layer: str = "auto"
    max_keep: float = 1.0
    proportional: bool = False
    restore: str = "auto"
    cls: str = "auto"

    def __post_init__(self) -> None:
        name = self.pass_name
        need(name, self.tau == self.tau, "tau is NaN", "a number")
        known = self.layer in ("auto", PROJECTOR) or self.layer.isdecimal()
        need(name, known, f"layer={self.layer}", f"auto, {PROJECTOR} or a block's number")
        need(name, 0.0 < self.max_keep <= 1.0, f"max_keep={self.max_keep}", "a share in (0, 1]")
        need(name, self.restore in RESTORES, f"restore={self.restore}", f"one of {', '.join(RESTORES)}")
        need(name, self.cls == "auto" or self.cls.isdecimal(), f"cls={self.cls}", "auto or a number of tokens")

    @property
    def pass_name(self) -> str:
        return "scc"

    @property
    def weighs_keys(self) -> bool:
        return self.proportional

    @property
    def pads(self) -> bool:
        return True

    @property
    def connected(self) -> Connected:
        """How components are found."""
        return Connected(self.tau, 0, max(1, round(self.max_keep * 1000)))

    def warnings(self) -> tuple[str, ...]:
        """What is legal and probably not meant, in words."""
        found = []
        if not -1.0 <= self.tau <= 1.0:
            found.append(f"tau={self.tau}: no cosine is {'above' if self.tau > 1 else 'below'} it")
        if self.max_keep < LOW_KEEP:
            found.append(f"max_keep={self.max_keep} is below 5%: quality is gone in the paper")
        return tuple(found)


@dataclass(frozen=True)
class SccTwoStepOptions(SccOptions):
    """Options of ``scc-two-step``: those of ``scc``, and ``group``, the tokens of a group: a frame of a video, a window
    of time, a paragraph."""

    group: int = 196

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self.pass_name, self.group >= 1, f"group={self.group}", "1 or more tokens")

    @property
    def pass_name(self) -> str:
        return "scc-two-step"

    @property
    def connected(self) -> Connected:
        return Connected(self.tau, self.group, max(1, round(self.max_keep * 1000)))


class Scc(StreamPass):
    """Merge the semantic connected components of a stream."""

    name: ClassVar[str] = "scc"
    summary: ClassVar[str] = "tokens that are linked by similar ones become their mean, as many as the data has"
    source: ClassVar[str] = "LLaVA-Scissor, arXiv 2506.21862"
    Options: ClassVar[type] = SccOptions
    options: SccOptions

    def requires(self, model: ir.Model, anchors: Anchors) -> None:
        if not self._at_projector(anchors):
            return super().requires(model, anchors)
        for key in (REDUCED_KEY, WHOLE_PROMPT_KEY):
            if model.metadata_props.get(key):
                raise InputError(
                    f"pass '{self.name}': the graph was shortened by {model.metadata_props[key]}", "one reduction"
                )
        describe(anchors)
        lm_head(anchors)

    def call(self, model: ir.Model, anchors: Anchors) -> PassResult:
        if not self._at_projector(anchors):
            return super().call(model, anchors)
        sites, notes, plan = merge_features(model, anchors, self.name, self.options.connected)
        return PassResult(self.name, True, sites, (), self.describe(), self.options.warnings(), notes, plan)

    def twin(self, module: Any, result: PassResult) -> Any:
        if not isinstance(result.plan, MultimodalPlan):
            return super().twin(module, result)
        return MultimodalTwin(module, SpanOptions(), result.plan)

    @property
    def placed(self) -> bool:
        return False

    def _at_projector(self, anchors: Anchors) -> bool:
        return self.options.layer == PROJECTOR or (self.options.layer == "auto" and parts(anchors) is not None)

    def sites(self, anchors: Anchors, cls: int) -> list[tuple[int, Budget]]:
        blocks = len(anchors.blocks)
        layer = blocks // 2 if self.options.layer == "auto" else int(self.options.layer)
        if layer >= blocks:
            raise InputError(f"{self.name}: layer={layer}", f"0 to {blocks - 1}, the blocks of the model")
        return [(layer, Budget(cls, self.options.connected.permille, 0))]

    def columns(self, encoder: Encoder, cls: int, restore: bool, notes: list[str]) -> int:
        return 0  # every token has an owner: nothing is filled from neighbours

    def reduced(
        self, emit: Emitter, block: AttentionBlock, stream: Stream, budget: Budget, plan: Plan
    ) -> tuple[Stream, dict[str, ir.Value]]:
        x, cls, batch = stream.tokens, plan.cls, stream.batch
        width = (dims(x) or [None] * 3)[2]
        count = stream.length - cls if isinstance(stream.length, int) else stream.length
        offset = emit.array("cls", np.array(cls, np.int32))
        rest, lengths = x, stream.lengths
        if cls:
            end = emit.node("Shape", [x], "end", ir.DataType.INT64, [1], start=1, end=2)
            rest = emit.node("Slice", [x, emit.ints(cls), end, emit.ints(1)], "rest_in", x.dtype, [batch, count, width])
            lengths = emit.node("Sub", [stream.lengths, offset], "rest_lengths", I32, [batch])
        merged = connect(emit, rest, lengths, self.options.connected)
        tokens, size, number = merged.tokens, merged.size, merged.count
        owner = emit.node("Add", [merged.label, offset], "rest_owner", I32, [batch, count])
        length = merged.length
        if cls:
            length = ir.SymbolicDim(f"{emit.label}.tokens")

            def first(value: ir.Value, role: str, shape: list[Any]) -> ir.Value:
                return emit.node("Slice", [value, emit.ints(0), emit.ints(cls), emit.ints(1)], role, value.dtype, shape)

            head = first(x, "head", [batch, cls, width])
            tokens = emit.node("Concat", [head, tokens], "all_tokens", x.dtype, [batch, length, width], axis=1)
            ones = first(stream.size, "head_size", [batch, cls])
            size = emit.node("Concat", [ones, size], "all_sizes", F32, [batch, length], axis=1)
            own = first(stream.owner, "head_owner", [batch, cls])
            owner = emit.node("Concat", [own, owner], "owner", I32, [batch, stream.original], axis=1)
            number = emit.node("Add", [number, offset], "count", I32, [batch])
        place = emit.node("Cast", [size], "places", I32, [batch, length], to=int(I32))
        after = Stream(tokens, batch, length, stream.original, owner, place, size, stream.protected, number)
        return after, {"target": merged.chosen, "count": number}

    def step(self, row: Any, q: Any, k: Any, scale: float, budget: Budget, plan: Plan, forced: Any) -> Any:
        from trtpass.reduction.definition import connect_row

        return connect_row(row, self.options.connected, plan.cls, None if forced is None else forced[1])


class SccTwoStep(Scc):
    """Components inside groups, then components of these; each original token joins the most similar one."""

    name: ClassVar[str] = "scc-two-step"
    summary: ClassVar[str] = "as scc, first inside groups such as frames, then over all of them"
    Options: ClassVar[type] = SccTwoStepOptions
    options: SccTwoStepOptions

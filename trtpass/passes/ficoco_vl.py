"""FiCoCo-VL (arXiv 2411.17686): FiCoCo-V in the vision tower of a multimodal graph and FiCoCo-L in its decoder.

Where each feature comes from one token of the tower (LLaVA), the decoder starts with the tokens that the tower kept,
at their own places in the prompt; where a projector joins several (Qwen2-VL), it starts with all of them. Then L
merges what is left of the image. The paper gives no formula for VL; this is both as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from trtpass.anchors import Anchors
from trtpass.errors import AnchorError
from trtpass.ir import add_input, dims
from trtpass.multimodal import Multimodal, decoder_of, describe
from trtpass.passes import PassResult
from trtpass.passes.ficoco_l import FicocoL
from trtpass.passes.ficoco_v import FicocoV, FicocoVOptions
from trtpass.passes.logits import lm_head
from trtpass.reduction.decoder import Cut, ImageSpan
from trtpass.reduction.decoder_options import FicocoLOptions
from trtpass.reduction.decoder_stream import insert_after
from trtpass.reduction.decoder_twin import TwinSite
from trtpass.reduction.emit import I32, Emitter
from trtpass.reduction.multimodal_entry import enter, hidden_below, one_by_one
from trtpass.reduction.multimodal_twin import MultimodalPlan, MultimodalTwin
from trtpass.reduction.options import need
from trtpass.reduction.stream import Stream, gathered


@dataclass(frozen=True)
class FicocoVlOptions(FicocoLOptions):
    """Options of ``ficoco-vl``: those of ``ficoco-l``, ``span=auto`` alone, and of its tower.

    Args:
        tower_layers: blocks of the tower, as ``layers`` of ``ficoco-v``.
        tower_keep: share of the tower's tokens that each of these keeps, in (0, 1].
        lam: weight of redundancy against attention of CLS in the tower.
        cls: leading tokens of the tower that are never touched; ``auto`` finds them.
        grid: rows x columns of the tower's tokens; ``auto`` finds it.
    """

    tower_layers: str = "auto"
    tower_keep: float = 0.9
    lam: float = 0.35
    cls: str = "auto"
    grid: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self.pass_name, self.span == "auto", f"span={self.span}", "auto: the tokens of the image")
        need(self.pass_name, 0.0 < self.tower_keep <= 1.0, f"tower_keep={self.tower_keep}", "a share in (0, 1]")
        self.tower  # noqa: B018  its own checks

    @property
    def pass_name(self) -> str:
        return "ficoco-vl"

    @property
    def tower(self) -> FicocoVOptions:
        """The options of ``ficoco-v``."""
        return FicocoVOptions(
            layers=self.tower_layers, keep=self.tower_keep, lam=self.lam, eps=self.eps, cls=self.cls, grid=self.grid
        )


class FicocoVl(FicocoL):
    """Redundant tokens of an image are merged twice: among themselves, then led by the text."""

    name: ClassVar[str] = "ficoco-vl"
    summary: ClassVar[str] = "ficoco-v in the vision tower and ficoco-l in the decoder of a multimodal graph"
    source: ClassVar[str] = "FiCoCo, arXiv 2411.17686 v1 (FiCoCo-VL)"
    Options: ClassVar[type] = FicocoVlOptions
    options: FicocoVlOptions

    def requires(self, model: ir.Model, anchors: Anchors) -> None:
        super().requires(model, anchors)
        if self.options.tower_keep < 1.0:
            FicocoV(self.options.tower).requires(model, anchors)

    def call(self, model: ir.Model, anchors: Anchors) -> PassResult:
        if self.options.tower_keep == 1.0:
            result = super().call(model, anchors)
            return replace(result, plan=MultimodalPlan(result.plan or ()))
        found, tower = describe(anchors), FicocoV(self.options.tower)
        plan = tower.plan(model, anchors)
        out = plan.encoder.stream_out
        if out is None:  # excluded by plan
            raise AnchorError("no token stream")
        why = one_by_one(found, out, plan.cls)
        merged, stream = tower.shorten(model, anchors)
        if stream is None:  # excluded above
            raise AnchorError("no site")
        entry, tokens = None, found.tokens
        if not why and isinstance(stream.length, int):
            tokens = stream.length - plan.cls
            entry = self._enter(model, found, stream, plan.cls, tokens)
            start = f"{tokens} of {found.tokens} image tokens, those that the tower kept"
        else:
            start = f"all {found.tokens} image tokens: {why or 'the number of the kept ones is not fixed'}"
        first = len(found.tower.blocks)
        places = self.places(model, anchors, ImageSpan(0, tokens))
        named = [replace(place, label=place.label + first) for place in places]
        twin = partial(tower.twin, result=merged)
        sites = tuple(TwinSite(place.label, place.cut, place.span, self.before) for place in places)
        behind = MultimodalPlan(sites, first, twin, entry is not None)
        notes = (*merged.notes, f"the decoder starts with {start}")
        if not named and entry is None:
            return replace(merged, name=self.name, options=self.describe(), notes=notes, plan=behind)
        result = self.shorten(model, decoder_of(anchors), named, entry)
        return replace(
            result, sites=(*merged.sites, *result.sites), notes=(*notes, *result.notes),
            warnings=(*merged.warnings, *result.warnings), plan=behind,
        )  # fmt: skip

    def _enter(
        self, model: ir.Model, found: Multimodal, stream: Stream, cls: int, tokens: int
    ) -> tuple[Stream, Cut]:  # fmt: skip
        """The decoder's stream with the image tokens that the tower kept."""
        emit, batch = Emitter(model, "ficoco_vl.kept"), stream.batch
        at = gathered(emit, stream.place, stream.owner, "place", stream.original)  # [B, N + cls]
        ends = [emit.ints(cls), emit.ints(2**31 - 1), emit.ints(1)]
        behind = emit.node("Slice", [at, *ends], "place_of_image", I32, [batch, found.tokens])
        rep = emit.node("Sub", [behind, emit.scalar(cls, np.int32)], "number_kept", I32, [batch, found.tokens])
        insert_after(model.graph, found.features, emit.take())
        lengths = add_input(model.graph, "lengths", I32, [(dims(found.decoder.input_ids) or [None])[0]])
        hidden = hidden_below(lm_head(found.decoder))
        after, _ = enter(model, found, rep, lengths, hidden, self.name, tokens)
        return after, Cut(0, 0, 1000, 999, found.tokens - tokens)

    def twin(self, module: Any, result: PassResult) -> MultimodalTwin:
        return MultimodalTwin(module, self.options, result.plan)

"""What the span methods of decoders share: where they apply, the shorter stream, rotations, and what caches hold."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import onnx_ir as ir

from trtpass.anchors import Anchors, AttentionBlock
from trtpass.errors import AnchorError, InputError
from trtpass.ir import add_input, dims
from trtpass.multimodal import decoder_of, describe
from trtpass.passes import REDUCED_KEY, WHOLE_PROMPT_KEY, Pass, PassResult, Site, need_blocks
from trtpass.passes.logits import lm_head
from trtpass.reduction.decoder import SPAN_KEY, Cut, ImageSpan, Shortened, Span
from trtpass.reduction.decoder_options import SpanOptions
from trtpass.reduction.decoder_sites import SpanSite, heirs
from trtpass.reduction.decoder_stream import insert_after, open_rows, protect, report, restore, rotate, unmarked
from trtpass.reduction.decoder_twin import SpanTwin, TwinSite
from trtpass.reduction.emit import Emitter
from trtpass.reduction.stream import Stream
from trtpass.reduction.walk import follow, need_through, resize


@dataclass(frozen=True)
class Place:
    """A site to be: the ``block`` that chooses, the ``stream`` `[B, S, E]` that becomes shorter, the layer it is named
    after, the budget, the span before it, and with ``span=auto`` which tokens stand for an image, bool `[B, S]`."""

    block: AttentionBlock
    stream: ir.Value
    label: int
    cut: Cut
    span: Span
    visual: ir.Value | None


class SpanMethod(Pass):
    """Drop tokens of a span from the stream of a causal decoder, or of the language model of a multimodal graph, from
    chosen layers on, in prefill.

    Subclasses choose places, score and join. The stream is whole again below lm_head: a dropped token gets the row of
    the one that it joined, so ``logits [B, S, V]`` keeps its shape. The graph also gives ``dropped`` int32
    `[layers, batch]`, which the decode graph reads.
    """

    whole_prompt: ClassVar[bool] = True
    before: ClassVar[bool]  # whether a site lies before its layer, or between its attention and MLP
    options: SpanOptions

    @abc.abstractmethod
    def score(self, site: SpanSite) -> ir.Value:
        """Filter: float32 `[B, S]`, highest kept first, +inf outside the span."""

    def join(
        self, site: SpanSite, index: ir.Value, rest: ir.Value, count: ir.Value, kept: ir.Value
    ) -> tuple[ir.Value, ir.Value | None]:
        """Kept tokens `[B, C, E]` after the dropped ones joined, and ``target [B, T]`` (None: nothing joins)."""
        return kept, None

    def requires(self, model: ir.Model, anchors: Anchors) -> None:
        """Causal attention in every layer from the first site on, a token input, logits, and a span."""
        if other := model.metadata_props.get(REDUCED_KEY):
            raise InputError(f"pass '{self.name}': the graph was shortened by {other}", "one reduction")
        self.places(model, anchors)

    def places(self, model: ir.Model, anchors: Anchors, span: Span | None = None) -> list[Place]:
        """Where tokens go, in order; empty where the options drop nothing. ``span``: in place of the options' own.

        Raises:
            AnchorError: what is missing, and where the search stopped.
            InputError: a span or a layer that does not fit, or another method in the graph.
        """
        need_blocks(anchors, self.name)
        other = model.metadata_props.get(WHOLE_PROMPT_KEY)
        if other or any(str(v.name).startswith("keep.") for v in model.graph.outputs):
            raise InputError(
                f"pass '{self.name}' after '{other or 'a cache policy'}'",
                "one method alone: no proof covers it beside another",
            )
        if anchors.input_ids is None:
            raise AnchorError(
                f"pass '{self.name}' found no token input",
                "a decoder: token ids in, logits out",
                "for an encoder use tome, evit, ficoco-v or scc; `trtpass inspect` says what was found",
            )
        lm_head(anchors)
        found = describe(anchors) if self.options.span == "auto" else None
        if span is None:
            span = Span.parse(self.options.span, self.name) if found is None else ImageSpan(0, found.tokens)
        blocks = decoder_of(anchors).blocks
        permille, made = self.options.permille, []
        for layer in self.options.chosen(len(blocks)):
            if permille == 1000:
                break
            chooser = blocks[layer - 1] if self.before else blocks[layer]
            stream = blocks[layer].residual_in if self.before else chooser.residual_out
            if stream is None:
                raise AnchorError(
                    f"pass '{self.name}': layer {layer} has no residual stream: {blocks[layer].why_no_residual}",
                    "x + attention(norm(x))",
                )
            cut, after = span.cut(layer if self.before else layer + 1, permille)
            made.append(Place(chooser, stream, layer, cut, span, None if found is None else found.visual))
            span = after
        for block in blocks[made[0].block.layer :] if made else ():
            if not block.causal:
                raise AnchorError(
                    f"pass '{self.name}': layer {block.layer} is not causal self-attention: {block.why_not_causal}",
                    "a causal decoder", "tome, evit and ficoco-v shorten encoders",
                )  # fmt: skip
        return made

    @property
    def least_tokens(self) -> int:
        """Tokens that a row needs at least, and enough more that its span loses some: for a check's probe."""
        if self.options.span == "auto":
            return 1
        span = Span.parse(self.options.span, self.name)
        return span.start - span.stop + 64 if span.relative else span.least

    def check_length(self, context: int) -> None:
        """Raise unless the rows of a check, whose shorter one leaves a 16th of ``context`` free, reach beyond the span.

        Raises:
            InputError: they do not.
        """
        least = 1 if self.options.span == "auto" else Span.parse(self.options.span, self.name).least
        if least > context - context // 16:
            raise InputError(
                f"{self.name}: span={self.options.span} needs {least} tokens and room for more",
                f"a span that ends well inside the {context} tokens of the model's context",
            )

    def call(self, model: ir.Model, anchors: Anchors) -> PassResult:
        places = self.places(model, anchors)
        if not places:
            return PassResult(
                self.name, False, (), ("nothing is dropped: every site keeps all of the span",), self.describe()
            )
        return self.shorten(model, decoder_of(anchors), places)

    def shorten(
        self, model: ir.Model, anchors: Anchors, places: Sequence[Place], entry: tuple[Stream, Cut] | None = None
    ) -> PassResult:
        """Cut at ``places`` of the decoder ``anchors``; ``entry``: what an earlier cut, before layer 0, left."""
        hidden = lm_head(anchors).inputs[0]
        if hidden is None:  # excluded by lm_head
            raise AnchorError("lm_head reads nothing")
        batch = (dims(anchors.input_ids) or [None])[0]
        lengths = add_input(model.graph, "lengths", ir.DataType.INT32, [batch])
        stream, cuts = (None, []) if entry is None else (entry[0], [entry[1]])
        sites: list[Site] = []
        held = [lengths if stream is None else stream.lengths] * len(anchors.blocks)
        for place in places:
            stream, site = self._shorten(model, place, stream, lengths, hidden)
            sites.append(site)
            held[place.cut.layer :] = [stream.lengths] * (len(held) - place.cut.layer)
        if stream is None:  # excluded above
            raise AnchorError("no site")
        emit = Emitter(model, self.name.replace("-", "_"))
        restore(emit, stream, hidden)
        report(emit, lengths, held)
        cuts += [place.cut for place in places]
        least = max(cuts[0].drop + 1, places[0].span.least if places else 1)
        record = Shortened(self.name, self.options.span, least, len(anchors.blocks), tuple(cuts))
        model.metadata_props[SPAN_KEY] = record.text()
        model.metadata_props[WHOLE_PROMPT_KEY] = self.name
        notes = ("below lm_head the stream is whole again: a dropped token has the row of the one that it joined",)
        low = (f"a site keeps {self.options.permille / 10:g}% of its span: below 5% quality is gone in the papers",)
        warnings = low if self.options.low else ()
        plan = tuple(TwinSite(place.label, place.cut, place.span, self.before) for place in places)
        return PassResult(self.name, True, tuple(sites), (), self.describe(), warnings, notes, plan)

    def _shorten(
        self, model: ir.Model, place: Place, stream: Stream | None, lengths: ir.Value, hidden: ir.Value
    ) -> tuple[Stream, Site]:
        """One site; the stream after it."""
        graph, x = model.graph, place.stream
        emit = Emitter(model, f"layer{place.label}.{self.name.replace('-', '_')}")
        users, opening = list(x.uses()), list[ir.Node]()  # before new nodes use it too
        if stream is None:
            start = Emitter(model, f"{self.name.replace('-', '_')}.all")
            stream = open_rows(start, x, lengths)
            if place.visual is not None:
                stream.protected = unmarked(start, place.visual)
            opening = start.take()
        stream.tokens = x
        known = isinstance(stream.length, int)
        kept = place.cut.kept(stream.length) if known else ir.SymbolicDim(f"kept_{place.label}")
        dropped = stream.length - kept if known else ir.SymbolicDim(f"dropped_{place.label}")
        if not known and place.cut.permille == 1000:
            dropped = place.cut.drop
        site = SpanSite(emit, place.block, stream, place.span, place.cut, kept, dropped)
        score = self.score(site)
        budget = place.cut.attributes()
        (keep,) = emit.op("KeepTokens", [score, stream.lengths], ["keep"], site.sizes(), **budget)
        index, count, rest, slot = emit.op(
            "IndexTokens", [keep, stream.lengths], ["index", "count", "rest", "slot"], site.sizes(), **budget
        )
        tokens, target = self.join(site, index, rest, count, site.rows(x, index, "kept", kept))
        (owner,) = emit.op(
            "TrackTokens", [stream.owner, slot, rest, heirs(site, rest) if target is None else target, count],
            ["owner"], site.sizes(),
        )  # fmt: skip
        protected = stream.protected if place.visual is None else protect(emit, stream, index, kept)
        insert_after(graph, x, opening + emit.take())
        for node, number in users:
            node.replace_input_with(number, tokens)
        course = follow(graph, tokens, 1, hidden)
        need_through(course, hidden, self.name)
        resize(course, kept)
        rotate(graph, emit, course, index, stream.batch, kept)
        roles = {
            "score": score,
            "keep": keep,
            "index": index,
            "rest": rest,
            "count": count,
            "tokens": tokens,
            "owner": owner,
        }
        if target is not None:
            roles["target"] = target
        after = replace(stream, tokens=tokens, length=kept, owner=owner, protected=protected, lengths=count)
        return after, Site(place.label, {role: str(value.name) for role, value in roles.items()})

    def twin(self, module: Any, result: PassResult) -> SpanTwin:
        """The same edit on a transformers causal LM; see ``trtpass.reduction.decoder_twin``."""
        seed = getattr(self.options, "seed", None)
        if self.options.span == "auto":
            from trtpass.reduction.multimodal_twin import MultimodalPlan, MultimodalTwin

            return MultimodalTwin(module, self.options, MultimodalPlan(result.plan), seed)
        return SpanTwin(module, self.options, result.plan, seed)

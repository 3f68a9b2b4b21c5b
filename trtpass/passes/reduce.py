"""``reduce``: an encoder carries fewer tokens from chosen layers on; filter, correlation and compression are options.

Between attention and MLP of each chosen block (``docs/reduction.md``)::

    score           = filter(keys, attention)                          [B, S]    +inf for protected tokens
    keep            = KeepTokens(score)                                [B, S]    one budget for all rows
    index, rest, .. = IndexTokens(keep)                                [B, C], [B, M]
    target, weight  = correlation(rest, index)                         [B, T]    which of them each dropped one joins
    tokens, size    = compression(...)                                 [B, C, E], [B, C]

Kept tokens stay in spatial order. ToMe, EViT and FiCoCo-V are presets of this pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import onnx_ir as ir

from trtpass import layers
from trtpass.anchors import Anchors, AttentionBlock
from trtpass.errors import AnchorError, InputError
from trtpass.ir import dims
from trtpass.passes import Pass, PassResult, need_blocks
from trtpass.passes import Site as Changed
from trtpass.reduction.emit import Emitter
from trtpass.reduction.filters import FILTERS, Site
from trtpass.reduction.joins import JOINS, Split, compress
from trtpass.reduction.options import Budget, ReductionOptions
from trtpass.reduction.outputs import add_outputs, restored
from trtpass.reduction.stream import Stream, key_bias, open_stream
from trtpass.reduction.walk import follow, need_through, resize

if TYPE_CHECKING:
    from trtpass.encoders import Encoder

REDUCED_KEY = "trtpass.reduced"  # model property: the pass that shortened the stream


@dataclass(frozen=True)
class Plan:
    """What a reduction does to one graph.

    Args:
        encoder: the encoder's stream and head.
        blocks: the blocks after whose attention tokens go.
        budgets: what each of them keeps.
        cls: protected leading tokens.
        columns: of the token grid, 0 where none is known.
        restore: whether the head gets all rows back.
        notes: decisions in words.
    """

    encoder: Encoder
    blocks: tuple[int, ...]
    budgets: tuple[Budget, ...]
    cls: int
    columns: int
    restore: bool
    notes: tuple[str, ...]
    outputs: tuple[str, ...]  # of the graph before


class Reduce(Pass):
    """Shorten the token stream of an encoder."""

    name: ClassVar[str] = "reduce"
    summary: ClassVar[str] = "an encoder carries fewer tokens: any filter, correlation and compression"
    source: ClassVar[str] = (
        "FiCoCo, arXiv 2411.17686 (the three choices); ToMe, arXiv 2210.09461; EViT, arXiv 2202.07800"
    )
    Options: ClassVar[type] = ReductionOptions
    options: ReductionOptions

    def requires(self, model: ir.Model, anchors: Anchors) -> None:
        """Bidirectional attention, and a residual stream that can be followed from the first site to the last block."""
        self.plan(model, anchors)

    def plan(self, model: ir.Model, anchors: Anchors) -> Plan:
        """Where tokens go, and how many.

        Raises:
            AnchorError: what is missing, and where the search stopped.
            InputError: a budget or a grid that does not fit the graph.
        """
        from trtpass.encoders import describe

        need_blocks(anchors, self.name)
        options = self.options
        if model.metadata_props.get(REDUCED_KEY):
            raise InputError(
                f"pass '{self.name}': the graph was shortened by {model.metadata_props[REDUCED_KEY]}", "one reduction"
            )
        encoder = describe(model, anchors)
        chosen = layers.resolve(options.chosen(len(anchors.blocks)), len(anchors.blocks), None)
        for block in anchors.blocks[chosen[0] :]:
            self._need_block(block)
        if encoder.stream_out is None:
            raise AnchorError(
                f"pass '{self.name}' found no end of the token stream: {encoder.why}", "a stream of residual blocks"
            )
        cls = encoder.cls if options.cls == "auto" else int(options.cls)
        sites = tuple(zip(chosen, options.budgets(len(chosen), cls), strict=True))
        notes: list[str] = []
        restore = self._restores(encoder, notes)
        columns = self._columns(encoder, cls, restore, notes)
        active = [(i, b) for i, b in sites if b.drop or b.permille < 1000]
        self._check_budget(anchors.blocks[chosen[0]], [b for _, b in active], cls)
        return Plan(
            encoder,
            tuple(i for i, _ in active),
            tuple(b for _, b in active),
            cls,
            columns,
            restore,
            tuple(notes),
            tuple(str(v.name) for v in model.graph.outputs),
        )

    def _need_block(self, block: AttentionBlock) -> None:
        where = f"pass '{self.name}': block {block.layer}"
        if block.residual_out is None:
            raise AnchorError(
                f"{where} has no residual stream after attention: {block.why_no_residual}", "x + attention(norm(x))"
            )
        if block.causal:
            raise AnchorError(f"{where} is causal", "an encoder; fastv and ficoco-l shorten decoders")
        masks = [v.name for v in block.node.inputs[3:] if v is not None]
        if masks:
            raise AnchorError(f"{where} has a mask, '{masks[0]}'", "attention of all tokens to all tokens")

    def _restores(self, encoder: Encoder, notes: list[str]) -> bool:
        """Whether the head gets all rows: by the option, or by what the head is."""
        if self.options.restore != "auto":
            return self.options.restore == "grid"
        needs = encoder.head != "cls"
        notes.append(
            f"restore=auto: {'all rows are restored' if needs else 'nothing is restored'}; head: {encoder.why}"
        )
        return needs

    def _columns(self, encoder: Encoder, cls: int, restore: bool, notes: list[str]) -> int:
        """Columns of the token grid; 0 where none is known and none is needed."""
        given = self.options.shape()
        tokens = encoder.tokens if isinstance(encoder.tokens, int) else None
        if given is not None:
            if tokens is not None and given[0] * given[1] != tokens - cls:
                raise InputError(
                    f"{self.name}: grid={self.options.grid} has {given[0] * given[1]} places",
                    f"{tokens - cls}, the tokens of the graph without {cls} in front",
                )
            return given[1]
        if encoder.grid is not None:
            return encoder.grid[1]
        if self.options.filter == "ficoco-v":
            raise InputError(
                f"{self.name}: the grid of the tokens is not known: {encoder.why_no_grid}",
                "rows and columns of the tokens",
                "say grid=ROWSxCOLUMNS",
            )
        if restore and self.options.compress in ("fuse", "drop"):
            notes.append(f"no grid: dropped tokens are filled from the nearest in order ({encoder.why_no_grid})")
        return 0

    def _check_budget(self, block: AttentionBlock, budgets: list[Budget], cls: int) -> None:
        """Each site has the tokens that its budget takes; ToMe's filter has at most every second one to give."""
        length = (dims(block.residual_out) or [None, None])[1]
        if not isinstance(length, int):
            return
        for number, budget in enumerate(budgets):
            dropped = length - budget.kept(length)
            if self.options.filter == "tome" and dropped > (length - cls) // 2:
                raise InputError(
                    f"{self.name}: site {number} drops {dropped} of {length} tokens ({cls} protected)",
                    f"at most half of the unprotected ones, {(length - cls) // 2}",
                    "lower r, or use fewer layers",
                )
            if dropped > length - cls - 1:
                raise InputError(
                    f"{self.name}: site {number} drops {dropped} of {length} tokens ({cls} protected)",
                    f"at most {max(length - cls - 1, 0)}: one stays",
                    "lower r, or use fewer layers",
                )
            length = length - dropped + (self.options.compress == "fuse")

    def call(self, model: ir.Model, anchors: Anchors) -> PassResult:
        plan = self.plan(model, anchors)
        if not plan.blocks:
            return PassResult(self.name, False, (), ("nothing is dropped: r=0, keep=1",), self.describe())
        out = plan.encoder.stream_out
        if out is None:  # excluded by plan
            raise AnchorError("no token stream")
        budget_of = dict(zip(plan.blocks, plan.budgets, strict=True))
        sites: list[Changed] = []
        stream: Stream | None = None
        bias: ir.Value | None = None
        for block in anchors.blocks[plan.blocks[0] :]:
            if bias is not None:
                block.node.resize_inputs(max(4, len(block.node.inputs)))
                block.node.replace_input_with(3, bias)
            if stream is not None and block.layer not in budget_of:
                continue
            made = self._shorten(model, block, stream, budget_of[block.layer], plan)
            stream, site = made
            sites.append(site)
            need = self.options.weighs_keys and block.layer != anchors.blocks[-1].layer
            bias = self._bias(model, stream, block) if need else None
        if stream is None:  # excluded above
            raise AnchorError("no site")
        emit = Emitter(model, "reduction")
        if plan.restore:
            restored(emit, stream, out, plan.cls, plan.columns)
        else:
            resize(follow(model.graph, out, 1), stream.length)
        add_outputs(emit, stream, out, all_tokens=plan.restore)
        model.metadata_props[REDUCED_KEY] = self.name
        warnings = (f"keep={self.options.keep} is below 5%: quality is gone in the papers",) if self.options.low else ()
        return PassResult(self.name, True, tuple(sites), plan.notes, self.describe(), warnings, plan)

    def _bias(self, model: ir.Model, stream: Stream, block: AttentionBlock) -> ir.Value:
        emit = Emitter(model, f"layer{block.layer}.{self.name}.bias")
        bias = key_bias(emit, stream)
        producer = stream.tokens.producer()
        model.graph.insert_after(_latest(model.graph, [stream.size, stream.tokens], producer), emit.take())
        return bias

    def _shorten(
        self, model: ir.Model, block: AttentionBlock, stream: Stream | None, budget: Budget, plan: Plan
    ) -> tuple[Stream, Changed]:
        """One site; the stream after it."""
        graph, x = model.graph, block.residual_out
        if x is None:  # excluded by plan
            raise AnchorError("no residual stream")
        emit = Emitter(model, f"layer{block.layer}.{self.name}")
        users = list(x.uses())  # before this site reads it
        first: list[ir.Node] = []
        if stream is None:
            start = Emitter(model, "stream")
            stream, first = open_stream(start, x, plan.cls), start.take()
        stream.tokens = x
        site = Site(emit, self.options, block, stream, plan.cls, plan.columns)
        score = FILTERS[self.options.filter](site)
        known = isinstance(stream.length, int)
        kept = budget.kept(stream.length) if known else ir.SymbolicDim(f"kept_{block.layer}")
        dropped = stream.length - kept if known else ir.SymbolicDim(f"dropped_{block.layer}")
        sizes = {**site.sizes(), "C": kept, "M": dropped}
        (keep,) = emit.op("KeepTokens", [score, stream.lengths], ["keep"], sizes, **budget.attributes())
        index, count, rest, slot = emit.op(
            "IndexTokens", [keep, stream.lengths], ["index", "count", "rest", "slot"], sizes, **budget.attributes()
        )
        split = Split(index, count, rest, slot, kept, dropped)
        join = JOINS[self.options.correlate](site, split) if self.options.correlate in JOINS else None
        after = compress(site, split, join)
        producer = x.producer()
        if producer is None:
            raise AnchorError(f"the stream '{x.name}' is a graph input")
        graph.insert_after(producer, first + emit.take())
        for node, place in users:
            node.replace_input_with(place, after.tokens)
        self._rotations(model, block, index, after)
        course = follow(graph, after.tokens, 1, plan.encoder.stream_out)
        if plan.encoder.stream_out is not None:
            need_through(course, plan.encoder.stream_out, self.name)
        resize(course, after.length)
        roles = {
            "score": score,
            "keep": keep,
            "index": index,
            "rest": rest,
            "tokens": after.tokens,
            "owner": after.owner,
        }
        if join is not None:
            roles["target"] = join.target
        return after, Changed(block.layer, {role: str(value.name) for role, value in roles.items()})

    def _rotations(self, model: ir.Model, block: AttentionBlock, index: ir.Value, after: Stream) -> None:
        """Rotary tables of later blocks: none yet; a graph that has them says so."""
        rotated = block.rope_q is not None or block.rope_k is not None
        if rotated:
            raise AnchorError(
                f"pass '{self.name}': block {block.layer} rotates queries or keys by position",
                "an encoder with learned positions",
            )

    def twin(self, module: Any, result: PassResult) -> Any:
        """The same edit on a transformers encoder; see ``trtpass.reduction.twin.EncoderTwin``."""
        from trtpass.reduction.twin import EncoderTwin

        if module is None:
            raise InputError(
                "there is no torch model, so no twin",
                fix="build from a Hugging Face folder, or trust each site's own check",
            )
        return EncoderTwin(module, self.options, result.plan)


def _latest(graph: ir.Graph, values: list[ir.Value], producer: ir.Node | None) -> ir.Node:
    """The last node in graph order among the producers of ``values``."""
    wanted = {id(v.producer()) for v in values} | {id(producer)}
    last = None
    for node in graph:
        if id(node) in wanted:
            last = node
    if last is None:
        raise AnchorError("a stream without a producer")
    return last

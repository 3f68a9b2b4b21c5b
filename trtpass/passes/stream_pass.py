"""What passes that shorten an encoder's token stream share: where the stream runs, what it keeps, how it ends.

A subclass says which blocks have a site and how a site makes the shorter stream; this class puts it in place, gives
later attention the sizes or the padding of its keys, and gives the head its rows back.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import onnx_ir as ir

from trtpass.anchors import Anchors, AttentionBlock
from trtpass.errors import AnchorError, InputError
from trtpass.multimodal import parts, tower_of
from trtpass.passes import REDUCED_KEY, WHOLE_PROMPT_KEY, Pass, PassResult, need_blocks
from trtpass.passes import Site as Changed
from trtpass.reduction.emit import Emitter
from trtpass.reduction.multimodal_tables import Tables, take_rows
from trtpass.reduction.options import Budget
from trtpass.reduction.outputs import add_outputs, restored
from trtpass.reduction.stream import Stream, key_bias, open_stream
from trtpass.reduction.walk import follow, need_through, resize

if TYPE_CHECKING:
    from trtpass.encoders import Encoder


class StreamOptions(Protocol):
    """What the options of every such pass have; see ``trtpass.reduction.options.ReductionOptions``."""

    @property
    def restore(self) -> str: ...
    @property
    def cls(self) -> str: ...
    @property
    def pass_name(self) -> str: ...
    @property
    def weighs_keys(self) -> bool: ...
    @property
    def pads(self) -> bool: ...
    def warnings(self) -> tuple[str, ...]: ...


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
        outputs: of the graph before.
        depth: blocks of the stream.
    """

    encoder: Encoder
    blocks: tuple[int, ...]
    budgets: tuple[Budget, ...]
    cls: int
    columns: int
    restore: bool
    notes: tuple[str, ...]
    outputs: tuple[str, ...]
    depth: int


class StreamPass(Pass):
    """A pass that shortens the token stream of an encoder: of a multimodal graph, its vision tower."""

    options: StreamOptions
    idle: ClassVar[str] = "nothing is dropped"

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
        for other in filter(None, map(model.metadata_props.get, (REDUCED_KEY, WHOLE_PROMPT_KEY))):
            raise InputError(f"pass '{self.name}': the graph was shortened by {other}", "one reduction")
        inside = parts(anchors) is not None
        if inside and self.options.restore == "none":
            raise InputError(
                f"{self.name}: restore=none on a multimodal graph",
                "restore=grid: each image token of the prompt has a row",
            )
        anchors = tower_of(anchors)
        encoder = describe(model, anchors)
        cls = encoder.cls if self.options.cls == "auto" else int(self.options.cls)
        sites = self.sites(anchors, cls)
        for block in anchors.blocks[sites[0][0] if sites else 0 :]:
            self._need_block(block)
        if encoder.stream_out is None:
            raise AnchorError(
                f"pass '{self.name}' found no end of the token stream: {encoder.why}", "a stream of residual blocks"
            )
        notes: list[str] = []
        restore = self._restores(encoder, notes)
        columns = self.columns(encoder, cls, restore, notes)
        names = tuple(str(v.name) for v in model.graph.outputs)
        blocks, budgets = tuple(i for i, _ in sites), tuple(b for _, b in sites)
        return Plan(encoder, blocks, budgets, cls, columns, restore, tuple(notes), names, len(anchors.blocks))

    @property
    def placed(self) -> bool:
        """Whether each token that is left has the place of one original token, and so its rows of position tables."""
        return True

    @abc.abstractmethod
    def sites(self, anchors: Anchors, cls: int) -> list[tuple[int, Budget]]:
        """Blocks after whose attention tokens go, ascending, and what each keeps; none that keeps everything."""

    @abc.abstractmethod
    def columns(self, encoder: Encoder, cls: int, restore: bool, notes: list[str]) -> int:
        """Columns of the token grid; 0 where none is known and none is needed."""

    @abc.abstractmethod
    def reduced(
        self, emit: Emitter, block: AttentionBlock, stream: Stream, budget: Budget, plan: Plan
    ) -> tuple[Stream, dict[str, ir.Value]]:
        """The shorter stream after one site, and the values that a proof looks at, by role."""

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
        if block.rope_q is not None or block.rope_k is not None:
            raise AnchorError(f"{where} rotates queries or keys by position", "an encoder with learned positions")

    def _restores(self, encoder: Encoder, notes: list[str]) -> bool:
        """Whether the head gets all rows: by the option, or by what the head is."""
        if self.options.restore != "auto":
            return self.options.restore == "grid"
        needs = encoder.head != "cls"
        notes.append(
            f"restore=auto: {'all rows are restored' if needs else 'nothing is restored'}; head: {encoder.why}"
        )
        return needs

    def call(self, model: ir.Model, anchors: Anchors) -> PassResult:
        return self.shorten(model, anchors)[0]

    def shorten(self, model: ir.Model, anchors: Anchors) -> tuple[PassResult, Stream | None]:
        """As ``call``; with it the stream after the last site, None where nothing is dropped."""
        plan = self.plan(model, anchors)
        anchors = tower_of(anchors)
        if not plan.blocks:
            return PassResult(self.name, False, (), (self.idle,), self.describe()), None
        out = plan.encoder.stream_out
        if out is None:  # excluded by plan
            raise AnchorError("no token stream")
        budget_of = dict(zip(plan.blocks, plan.budgets, strict=True))
        sites: list[Changed] = []
        stream: Stream | None = None
        bias: ir.Value | None = None
        tables: Tables = {}
        for block in anchors.blocks[plan.blocks[0] :]:
            if bias is not None:
                block.node.resize_inputs(max(4, len(block.node.inputs)))
                block.node.replace_input_with(3, bias)
            if stream is not None and block.layer not in budget_of:
                continue
            stream, site = self._shorten(model, block, stream, budget_of[block.layer], plan, tables)
            sites.append(site)
            need = self.options.weighs_keys or self.options.pads
            bias = self._bias(model, stream, block) if need and block.layer != anchors.blocks[-1].layer else None
        if stream is None:  # excluded above
            raise AnchorError("no site")
        emit = Emitter(model, "reduction")
        if plan.restore:
            restored(emit, stream, out, plan.cls, plan.columns)
        else:
            resize(follow(model.graph, out, 1), stream.length)
        add_outputs(emit, stream, out, all_tokens=plan.restore)
        model.metadata_props[REDUCED_KEY] = self.name
        # What a site made for later layers is of no use after the last one, and goes.
        live = {str(v.name) for node in model.graph for v in node.outputs if v.uses()}
        left = (Changed(s.layer, {role: v for role, v in s.values.items() if v in live}) for s in sites)
        warnings = self.options.warnings()
        made = PassResult(self.name, True, tuple(left), (), self.describe(), warnings, plan.notes, plan)
        return made, stream

    def _bias(self, model: ir.Model, stream: Stream, block: AttentionBlock) -> ir.Value:
        emit = Emitter(model, f"layer{block.layer}.{self.name}.bias")
        bias = key_bias(emit, stream, self.options.weighs_keys, self.options.pads)
        producer = stream.tokens.producer()
        model.graph.insert_after(
            _latest(model.graph, [stream.size, stream.tokens, stream.lengths], producer), emit.take()
        )
        return bias

    def _shorten(
        self, model: ir.Model, block: AttentionBlock, stream: Stream | None, budget: Budget, plan: Plan, tables: Tables
    ) -> tuple[Stream, Changed]:  # fmt: skip
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
        after, roles = self.reduced(emit, block, stream, budget, plan)
        producer = x.producer()
        if producer is None:
            raise AnchorError(f"the stream '{x.name}' is a graph input")
        graph.insert_after(producer, first + emit.take())
        for node, place in users:
            node.replace_input_with(place, after.tokens)
        if self.placed:
            course = take_rows(emit, after, plan.encoder.stream_out, tables)
        else:
            course = follow(graph, after.tokens, 1, plan.encoder.stream_out)
        if plan.encoder.stream_out is not None:
            need_through(course, plan.encoder.stream_out, self.name)
        resize(course, after.length)
        roles |= {"tokens": after.tokens, "owner": after.owner}
        return after, Changed(block.layer, {role: str(value.name) for role, value in roles.items()})

    def twin(self, module: Any, result: PassResult) -> Any:
        """The same edit on a transformers encoder; see ``trtpass.reduction.twin.EncoderTwin``."""
        from trtpass.reduction.twin import EncoderTwin

        if module is None:
            raise InputError("there is no torch model, so no twin", fix="build from a Hugging Face folder")
        return EncoderTwin(module, self.options, result.plan, self.step)

    @abc.abstractmethod
    def step(self, row: Any, q: Any, k: Any, scale: float, budget: Budget, plan: Plan, forced: Any) -> Any:
        """One site on one row, in torch from the definition: ``trtpass.reduction.definition.Step``."""


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

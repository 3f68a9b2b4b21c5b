"""The cache pass: a stateless canonical graph becomes prefill (whole prompts) or decode (T >= 1 tokens over the cache).

Names, shapes and their order are those of docs/design.md, "Graphs of an engine". Both graphs share the initializers of
the graph they came from; saving them together writes the weights once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from plugins import all_ops
from trtpass.anchors import Anchors
from trtpass.errors import AnchorError, InputError
from trtpass.ir import add_input, constant, dims, is_op, make_node
from trtpass.op import DOMAIN
from trtpass.passes import Pass, PassResult, Site
from trtpass.passes.logits import LastLogits
from trtpass.reduction.decoder import SPAN_KEY, Shortened
from trtpass.reduction.decoder_cache import BATCH, held_tokens, slots

PHASES = ("prefill", "decode")
TOKENS = "tokens"
# Operators that turn a length into positions: one that is not above rotary embedding would restart at 0 in decode.
_COUNTERS = ("Range", "CumSum", "NonZero")


@dataclass(frozen=True)
class CacheOptions:
    """``phase``: prefill or decode. ``capacity``: slots a row (None: symbolic). ``logits``: ``last`` or ``all`` tokens.
    ``shortened``: of a graph whose later layers hold fewer tokens.

    Raises:
        InputError: another phase, another kind of logits, or a capacity below 1.
    """

    phase: str = "decode"
    capacity: int | None = None
    logits: str = "last"
    shortened: Shortened | None = None

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise InputError(f"cache phase '{self.phase}'", f"one of {', '.join(PHASES)}")
        if self.logits not in ("last", "all"):
            raise InputError(f"logits={self.logits}", "last or all")
        if self.capacity is not None and self.capacity < 1:
            raise InputError(f"a cache of {self.capacity} slots", "capacity >= 1")


@dataclass(frozen=True)
class CacheSite:
    """An attention whose keys and values are cached: k ``[B, Hkv, S, D]``, v ``[B, Hkv, S, Dv]``."""

    node: ir.Node
    k: ir.Value
    v: ir.Value


class InsertCache(Pass):
    """A static KV cache: ``past.{i}.key`` in, ``present.{i}.key`` out, by TensorScatter (in place where they alias)."""

    name = "cache"
    summary = "inserts a static KV cache"
    source = "plumbing: docs/design.md, Graphs of an engine"
    method = False
    Options: ClassVar[type] = CacheOptions

    def requires(self, model: ir.Model, anchors: Anchors) -> None:
        sites = list(cache_sites(model.graph))
        if not sites:
            raise AnchorError(f"no attention to cache: {'; '.join(anchors.missing)}", "at least one attention block")
        if anchors.input_ids is None:
            raise AnchorError("no token input was found", "an int64 input [batch, sequence] looked up in an embedding")
        for block in anchors.blocks:
            if not block.causal:
                raise AnchorError(
                    f"layer {block.layer} ('{block.node.name}') cannot use a cache: {block.why_not_causal}",
                    "causal attention in every layer",
                )
        known = {id(block.node) for block in anchors.blocks}
        for site in sites:
            if is_op(site.node, "Attention") and id(site.node) not in known:
                raise AnchorError(f"an attention cannot be cached: {'; '.join(anchors.missing)}")
        if self.options.phase == "decode":
            require_positions(model.graph, anchors, sites)

    def call(self, model: ir.Model, anchors: Anchors) -> PassResult:
        options: CacheOptions = self.options
        graph, ids = model.graph, anchors.input_ids
        if ids is None:  # excluded by requires
            raise AnchorError("no token input was found")
        name_dims(graph, ids)
        sites = list(cache_sites(graph))
        if options.shortened is not None and options.shortened.layers != len(sites):
            raise AnchorError(f"a graph of {len(sites)} attentions, shortened as one of {options.shortened.layers}")
        lengths = add_input(graph, "lengths", ir.DataType.INT32, [BATCH])
        order = [ids, lengths]
        writes: list[ir.Value] = []  # where each layer writes [batch], and in decode the slots that it then sees
        visible: list[ir.Value] = []
        head = next(iter(graph))
        if options.phase == "decode":
            past_lengths = add_input(graph, "past_lengths", ir.DataType.INT32, [BATCH])
            order.append(past_lengths)
            write = make_node("Cast", [past_lengths], [("cache.write", ir.DataType.INT64, [BATCH])],
                              {"to": int(ir.DataType.INT64)})  # fmt: skip
            tokens = make_node("Shape", [ids], [("cache.tokens", ir.DataType.INT64, [1])], {"start": 1, "end": 2})
            graph.insert_before(head, [write, tokens])
            held = held_tokens(graph, head, write.outputs[0], options.shortened, order)
            seen = {value: make_node("Add", [value, tokens.outputs[0]],
                                     [(f"cache.visible{'' if i == 0 else i}", ir.DataType.INT64, [BATCH])])
                    for i, value in enumerate(dict.fromkeys(held or [write.outputs[0]]))}  # fmt: skip
            graph.insert_before(head, list(seen.values()))
            writes = held or [write.outputs[0]] * len(sites)
            visible = [seen[value].outputs[0] for value in writes]
            offset_positions(graph, anchors, write.outputs[0])
        else:
            size = make_node("Shape", [lengths], [("cache.batch", ir.DataType.INT64, [1])])
            write = make_node("ConstantOfShape", [size.outputs[0]], [("cache.write", ir.DataType.INT64, [BATCH])],
                              {"value": ir.tensor(np.zeros(1, np.int64))})  # fmt: skip
            graph.insert_before(head, [size, write])
            writes = [write.outputs[0]] * len(sites)
        made: list[ir.Value] = []
        report: list[Site] = []
        for layer, site in enumerate(sites):
            presents = []
            for role, fresh in (("key", site.k), ("value", site.v)):
                shape = _cache_shape(fresh, layer, role, slots(options.shortened, options.capacity, layer))
                past = add_input(graph, f"past.{layer}.{role}", fresh.dtype or ir.DataType.FLOAT, shape)
                scatter = make_node("TensorScatter", [past, fresh, writes[layer]],
                                    [(f"present.{layer}.{role}", fresh.dtype, shape)], {"axis": 2})  # fmt: skip
                graph.insert_before(site.node, scatter)
                order.append(past)
                presents.append(scatter.outputs[0])
            if options.phase == "decode":
                site.node.replace_input_with(1, presents[0])
                site.node.replace_input_with(2, presents[1])
                site.node.resize_inputs(7)
                site.node.replace_input_with(6, visible[layer])
            made += presents
            report.append(Site(layer, {"key": str(presents[0].name), "value": str(presents[1].name)}))
        if options.logits == "last":
            LastLogits().call(model, anchors)
        if anchors.logits is not None:
            anchors.logits.name = "logits"
        graph.outputs.extend(made)
        graph.inputs[:] = order + [value for value in graph.inputs if all(value is not o for o in order)]
        common.ShapeInferencePass(check_type=False, strict_mode=False)(model)
        model.metadata_props["trtpass.phase"] = options.phase
        return PassResult(self.name, True, tuple(report), (), self.describe())


def insert_cache(
    model: ir.Model, phase: str, *, capacity: int | None = None, logits: str = "last", context: int | None = None,
    shortened: str | None = None,
) -> ir.Model:  # fmt: skip
    """A copy of ``model`` with a cache; the weights are shared with it, not copied.

    Args:
        model: stateless and canonical: for prefill after the method passes, for decode before them (decode is dense).
        phase: ``prefill`` or ``decode``.
        capacity: slots of a row; None leaves it symbolic.
        logits: ``last`` or ``all``.
        context: the most tokens that the model is made for, kept as the graph's property ``trtpass.context``.
        shortened: for decode, the property ``trtpass.span`` of the rewritten graph, if it has one: a layer behind a
            site holds fewer tokens, and the graph has an input ``dropped`` int32 `[layers, batch]` for how many.

    Raises:
        AnchorError: a layer that is not causal, or positions that cannot be moved on by the cache's length.
    """
    copy = model.clone()
    for key, value in model.graph.metadata_props.items():  # a session only shows the model's own properties
        if key.startswith("trtpass."):
            copy.metadata_props.setdefault(key, value)
    if context is not None:
        copy.metadata_props["trtpass.context"] = str(context)
    if shortened is not None:
        copy.metadata_props[SPAN_KEY] = shortened
    record = Shortened.read(copy.metadata_props.get(SPAN_KEY))
    InsertCache(CacheOptions(phase, capacity, logits, record))(copy)
    return copy


def cache_sites(graph: ir.Graph) -> Iterator[CacheSite]:
    """Every attention of the main graph in order: Attention nodes, and trtpass nodes that take q, k and v."""
    for node in graph:
        if is_op(node, "Attention") and len(node.inputs) > 2:
            k, v = node.inputs[1], node.inputs[2]
        elif node.domain == DOMAIN and node.op_type in all_ops():
            ports = {port.name: i for i, port in enumerate(all_ops()[node.op_type].inputs)}
            if not {"q", "k", "v"} <= ports.keys():
                continue
            k, v = node.inputs[ports["k"]], node.inputs[ports["v"]]
        else:
            continue
        if k is not None and v is not None:
            yield CacheSite(node, k, v)


def _cache_shape(fresh: ir.Value, layer: int, role: str, capacity: int | str) -> list[Any]:
    """``[batch, Hkv, capacity, D]`` from the fresh keys or values ``[B, Hkv, S, D]``."""
    shape = dims(fresh)
    if shape is None or len(shape) != 4 or not isinstance(shape[1], int) or not isinstance(shape[3], int):
        raise AnchorError(
            f"layer {layer}: the {role} '{fresh.name}' has shape {shape}", "[B, Hkv, S, D], fixed Hkv and D"
        )
    return [BATCH, shape[1], capacity, shape[3]]


def name_dims(graph: ir.Graph, ids: ir.Value) -> None:
    """Give the token input's dimensions the names of the contract, everywhere that they appear."""
    shape = dims(ids) or [None, None]
    renamed = {old: new for old, new in zip(shape, (BATCH, TOKENS), strict=True) if isinstance(old, ir.SymbolicDim)}
    values = [*graph.inputs, *(v for node in graph.all_nodes() for v in node.outputs)]
    for value in values:
        known = dims(value)
        if known is not None and any(d in renamed for d in known if isinstance(d, ir.SymbolicDim)):
            value.shape = ir.Shape([renamed.get(d, d) if isinstance(d, ir.SymbolicDim) else d for d in known])
    ids.shape = ir.Shape([BATCH, TOKENS])


def require_positions(graph: ir.Graph, anchors: Anchors, sites: list[CacheSite]) -> None:
    """Decode moves positions on by the cache's length: they must be known, and nothing else may count tokens."""
    foreign = next((s.node for s in sites if s.node.domain == DOMAIN), None)
    if foreign is not None:
        raise AnchorError(
            f"'{foreign.name}' ({foreign.op_type}) attends over fresh keys only, so it cannot decode",
            "the decode graph made from the raised graph, before method passes",
        )
    if anchors.positions is not None and anchors.positions.producer() is None:
        raise AnchorError(
            f"positions are the graph input '{anchors.positions.name}'",
            "positions that the graph derives from the shape of its tokens",
        )
    if anchors.positions is None and any(is_op(n, "RotaryEmbedding") for n in graph):
        raise AnchorError(
            f"positions are unknown: {'; '.join(anchors.missing)}",
            "one integer [batch, sequence] value above every cos and sin",
        )
    counter = _other_counter(graph, anchors)
    if counter is not None:
        raise AnchorError(
            f"{counter.op_type} '{counter.name}' counts tokens apart from the rotary positions: "
            "it would restart at 0 in decode",
            "positions that reach the graph through rotary embedding alone",
        )


def _other_counter(graph: ir.Graph, anchors: Anchors) -> ir.Node | None:
    """A node above an output that makes positions out of the sequence length, other than those above ``positions``."""
    sized: set[ir.Value] = set()  # values computed from shapes and constants alone
    for node in graph:
        inputs = [
            v for v in node.inputs if v is not None and v.const_value is None and not is_op(v.producer(), "Constant")
        ]
        if is_op(node, "Shape", "Size") or (inputs and all(v in sized for v in inputs)):
            sized.update(node.outputs)
    frontier, seen = list(graph.outputs), {anchors.positions}
    while frontier:
        value = frontier.pop()
        node_above = None if value in seen else value.producer()
        seen.add(value)
        if node_above is None:
            continue
        table = node_above.inputs[0] if node_above.inputs else None
        from_table = is_op(node_above, "Slice", "Gather") and table is not None and table.const_value is not None
        if (is_op(node_above, *_COUNTERS) or from_table) and node_above.outputs[0] in sized:
            return node_above
        frontier.extend(v for v in node_above.inputs if v is not None)
    return None


def offset_positions(graph: ir.Graph, anchors: Anchors, past: ir.Value) -> None:
    """positions [1 or B, T] + past [B] -> [B, T] for all that read positions; shapes below are inferred anew."""
    positions = anchors.positions
    producer = None if positions is None else positions.producer()
    if positions is None or producer is None:  # no rotary embedding and no counter: nothing depends on the position
        return
    consumers = [(use.node, use.idx) for use in positions.uses()]
    wide = make_node("Cast", [past], [("cache.past", positions.dtype, [BATCH])], {"to": int(positions.dtype or 7)})
    column = make_node(
        "Unsqueeze", [wide.outputs[0], constant(graph, "cache.axis", np.array([1], np.int64))],
        [("cache.offset", positions.dtype, [BATCH, 1])],
    )  # fmt: skip
    moved = make_node("Add", [positions, column.outputs[0]], [("cache.positions", positions.dtype, [BATCH, TOKENS])])
    graph.insert_after(producer, [wide, column, moved])
    for node, index in consumers:
        node.replace_input_with(index, moved.outputs[0])
    frontier, stale = [moved.outputs[0]], set()
    while frontier:
        for node in frontier.pop().consumers():
            if node not in stale and not is_op(node, "RotaryEmbedding", "Shape"):
                stale.add(node)
                for value in node.outputs:
                    value.shape = None
                    frontier.append(value)

"""The paged cache: a stateless graph, with a cache policy or without, becomes prefill or decode over pages.

Each (layer, row, KV head) is an *owner* of pages of Z slots in its layer's pool, and holds what its policy keeps.
Names, shapes and order are those of docs/design.md, "Graphs of an engine with a paged cache". Of a layer, the prefill
graph does::

    slot, kept = CompactSlots(keep or protected, 0, lengths)     where each kept token goes
    table      = TakePages(kept, free, slot)                     the owners' pages, from those that are free
    present    = WritePages(past, fresh, slot, table)            attention itself stays dense, over the fresh keys

and the decode graph, whose slots and pages the host has chosen::

    present = WritePages(past, fresh, slot, table)
    out     = RaggedAttention(q, present key, present value, table, held, lengths)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from plugins import all_ops
from plugins._library import function
from trtpass.anchors import Anchors
from trtpass.errors import AnchorError, InputError
from trtpass.ir import add_input, constant, dims, float_attr, is_op, make_node
from trtpass.op import DOMAIN, VERSION
from trtpass.passes import Pass, PassResult, Site
from trtpass.passes.cache import (
    BATCH,
    PHASES,
    TOKENS,
    CacheOptions,
    CacheSite,
    InsertCache,
    cache_sites,
    name_dims,
    offset_positions,
)
from trtpass.passes.cache_policy import SINKS_KEY, WINDOW_KEY, keep_name
from trtpass.passes.logits import LastLogits

PAGE = 64  # slots of a page: rows of 16 KiB at D = 64 in float32
PAGE_KEY, KIND_KEY, PHASE_KEY = "trtpass.cache.page", "trtpass.cache", "trtpass.phase"
PAGED = "paged"
I32, I64 = ir.DataType.INT32, ir.DataType.INT64


@dataclass(frozen=True)
class PagedCacheOptions:
    """Options of the paged cache.

    Args:
        phase: ``prefill`` or ``decode``.
        page: Z, slots of a page.
        window: W, the last keys that no policy evicts, in tokens.
        sinks: the first keys that no policy evicts.
        logits: ``last`` or ``all`` tokens.
        pages: P, pages of a layer's pool; None leaves it to whoever runs the graph.
        entries: M, pages that an owner may hold; None likewise.

    Raises:
        InputError: another phase or kind of logits, or a number out of range.
    """

    phase: str = "decode"
    page: int = PAGE
    window: int = 128
    sinks: int = 4
    logits: str = "last"
    pages: int | None = None
    entries: int | None = None

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise InputError(f"cache phase '{self.phase}'", f"one of {', '.join(PHASES)}")
        if self.logits not in ("last", "all"):
            raise InputError(f"logits={self.logits}", "last or all")
        if not 1 <= self.page <= 4096:
            raise InputError(f"pages of {self.page} slots", "1 to 4096")
        if self.window < 0 or self.sinks < 0:
            raise InputError(f"window={self.window}, sinks={self.sinks}", "0 or more")
        if (self.pages is not None and self.pages < 1) or (self.entries is not None and self.entries < 1):
            raise InputError(f"pages={self.pages}, entries={self.entries}", "1 or more")


class InsertPagedCache(Pass):
    """A KV cache in pages, of which each KV head holds as many as it needs."""

    name = "paged-cache"
    summary = "inserts a paged KV cache"
    source = "plumbing: docs/design.md, Graphs of an engine with a paged cache; pages as in PagedAttention, 2309.06180"
    method = False
    Options: ClassVar[type] = PagedCacheOptions
    options: PagedCacheOptions

    def requires(self, model: ir.Model, anchors: Anchors) -> None:
        """As the dense cache; and the same number of KV heads in every layer, since bookkeeping is one tensor."""
        InsertCache(CacheOptions(self.options.phase)).requires(model, anchors)
        heads = {(dims(site.k) or [None, None])[1] for site in cache_sites(model.graph)}
        if len(heads) > 1 or not isinstance(next(iter(heads)), int):
            raise AnchorError(
                f"layers have {', '.join(map(str, heads))} KV heads", "the same fixed number of KV heads in every layer"
            )

    def call(self, model: ir.Model, anchors: Anchors) -> PassResult:
        options, graph, ids = self.options, model.graph, anchors.input_ids
        if ids is None:  # excluded by requires
            raise AnchorError("no token input was found")
        name_dims(graph, ids)
        sites = list(cache_sites(graph))
        heads = int((dims(sites[0].k) or [0, 0])[1])
        build = _Builder(graph, options, len(sites), heads, next(iter(graph)))
        order = [ids, build.lengths]
        if options.phase == "decode":
            past = add_input(graph, "past_lengths", I32, [BATCH])
            write = build.put("Cast", [past], "cache.write", I64, [BATCH], to=int(I64))
            offset_positions(graph, anchors, write)
            order.append(past)
        order += build.shared_inputs()
        keeps = {o.name: o for o in graph.outputs if o.name and o.name.startswith("keep.")}
        report, presents = [], []
        for layer, site in enumerate(sites):
            made = build.layer(layer, site, keeps.pop(keep_name(layer), None))
            order += made.pasts
            presents += made.presents
            report.append(Site(layer, {"key": str(made.presents[0].name), "value": str(made.presents[1].name)}))
        if keeps:
            raise AnchorError(f"the policy's output '{next(iter(keeps))}' belongs to no attention")
        if options.logits == "last":
            LastLogits().call(model, anchors)
        if anchors.logits is not None:
            anchors.logits.name = "logits"
        graph.outputs[:] = [o for o in graph.outputs if not (o.name or "").startswith("keep.")]
        graph.outputs.extend([*build.results(), *presents])
        graph.inputs[:] = order + [value for value in graph.inputs if all(value is not o for o in order)]
        for name in build.used:
            body = function(all_ops()[name], "dynamic")
            model.functions[body.identifier()] = body
        model.opset_imports[DOMAIN] = VERSION
        common.ShapeInferencePass(check_type=False, strict_mode=False)(model)
        stated = {KIND_KEY: PAGED, PHASE_KEY: options.phase, PAGE_KEY: options.page,
                  WINDOW_KEY: options.window, SINKS_KEY: options.sinks}  # fmt: skip
        model.metadata_props.update({key: str(value) for key, value in stated.items()})
        return PassResult(self.name, True, tuple(report), (), self.describe())


def insert_paged_cache(model: ir.Model, options: PagedCacheOptions, context: int | None = None) -> ir.Model:
    """A copy of ``model`` with a paged cache; the weights are shared with it, not copied.

    Args:
        model: stateless and canonical. For prefill after all passes; for decode the dense graph with the policy alone.
        options: of the cache.
        context: the most tokens that the model is made for, kept as the graph's property ``trtpass.context``.

    Raises:
        AnchorError: as for the dense cache, or layers with different numbers of KV heads.
    """
    copy = model.clone()
    for key, value in model.graph.metadata_props.items():
        if key.startswith("trtpass."):
            copy.metadata_props.setdefault(key, value)
    if context is not None:
        copy.metadata_props["trtpass.context"] = str(context)
    InsertPagedCache(options)(copy)
    return copy


@dataclass(frozen=True)
class _Layer:
    pasts: list[ir.Value]
    presents: list[ir.Value]


class _Builder:
    """Nodes of the cache in one graph, each put before ``head`` or an attention."""

    def __init__(self, graph: ir.Graph, options: PagedCacheOptions, layers: int, heads: int, head: ir.Node) -> None:
        self.graph, self.options, self.layers, self.heads, self.at = graph, options, layers, heads, head
        self.lengths = add_input(graph, "lengths", I32, [BATCH])
        self.used: set[str] = set()
        self._stacks: dict[str, list[ir.Value]] = {"page_table": [], "slot": [], "keep": []}
        self._given: dict[str, ir.Value] = {}
        self._protected: ir.Value | None = None

    def put(
        self, op: str, inputs: list[ir.Value], name: str, dtype: ir.DataType | None, shape: Any, **attrs: Any
    ) -> ir.Value:
        return self.put_all(op, inputs, [(name, dtype, shape)], **attrs)[0]

    def put_all(self, op: str, inputs: list[ir.Value], outputs: list[Any], **attrs: Any) -> list[ir.Value]:
        domain = DOMAIN if op in all_ops() else ""
        if domain:
            self.used.add(op)
        node = make_node(op, inputs, outputs, attrs, domain=domain)
        self.graph.insert_before(self.at, node)
        return list(node.outputs)

    def fixed(self, name: str, value: Any, dtype: Any = np.int64) -> ir.Value:
        return constant(self.graph, f"cache.{name}", np.array(value, dtype))

    def shared_inputs(self) -> list[ir.Value]:
        """Inputs for all layers: free pages in prefill; page tables, slots and lengths in decode."""
        owners = [self.layers, BATCH, self.heads]
        shapes = {"free": [self.layers, "free"]} if self.options.phase == "prefill" else {
            "page_table": [*owners, self.options.entries or "entries"], "slot": [*owners, TOKENS], "held": owners,
        }  # fmt: skip
        self._given = {name: add_input(self.graph, name, I32, shape) for name, shape in shapes.items()}
        return list(self._given.values())

    def of(self, name: str, layer: int) -> ir.Value:
        """What an input for all layers says of one."""
        shape = list(self._given[name].shape or [])[1:]
        return self.put("Gather", [self._given[name], self.fixed(f"layer{layer}", layer)], f"{name}.{layer}.of", I32,
                        shape, axis=0)  # fmt: skip

    def protected(self) -> ir.Value:
        """Tokens that no policy evicts from a prompt: sinks, and those that the next query's window holds
        `[B, 1, S]`."""
        if self._protected is None:
            tokens = self.put("Shape", [self._ids()], "cache.tokens", I64, [1], start=1, end=2)
            count = self.put("Squeeze", [self.put("Cast", [tokens], "cache.tokens32", I32, [1], to=int(I32))],
                             "cache.count", I32, [])  # fmt: skip
            zero, one = self.fixed("zero", 0, np.int32), self.fixed("one", 1, np.int32)
            token = self.put("Range", [zero, count, one], "cache.token", I32, [TOKENS])
            early = self.put("Less", [token, self.fixed("sinks", self.options.sinks, np.int32)], "cache.early",
                             ir.DataType.BOOL, [TOKENS])  # fmt: skip
            end = self.put("Unsqueeze", [self.lengths, self.fixed("axes12", [1, 2])], "cache.end", I32, [BATCH, 1, 1])
            away = self.put("Sub", [end, token], "cache.away", I32, [BATCH, 1, TOKENS])  # 1 for the last token
            # The next query, at position T, sees T - W .. T - 1; the token before them is judged only by its step.
            late = self.put("LessOrEqual", [away, self.fixed("near", self.options.window + 1, np.int32)], "cache.late",
                            ir.DataType.BOOL, [BATCH, 1, TOKENS])  # fmt: skip
            self._protected = self.put("Or", [early, late], "cache.protected", ir.DataType.BOOL, [BATCH, 1, TOKENS])
        return self._protected

    def _ids(self) -> ir.Value:
        return next(v for v in self.graph.inputs if v.dtype == I64 and v.shape is not None and len(v.shape) == 2)

    def layer(self, layer: int, site: CacheSite, keep: ir.Value | None) -> _Layer:
        """Write the fresh keys and values of one attention; in decode, attend over what is held."""
        options, first = self.options, self.at
        self.at = site.node
        shape = [BATCH, self.heads, TOKENS]
        if keep is None:
            size = self.put("Shape", [site.k], f"cache.size.{layer}", I64, [3], start=0, end=3)
            keep = self.put("ConstantOfShape", [size], f"cache.keep.{layer}", I32, shape,
                            value=ir.tensor(np.ones(1, np.int32)))  # fmt: skip
        self._stacks["keep"].append(keep)
        if options.phase == "prefill":
            slot, table = self._place(layer, keep, first)
        else:
            slot, table = self.of("slot", layer), self.of("page_table", layer)
        pasts, presents = [], []
        for role, fresh in (("key", site.k), ("value", site.v)):
            width = (dims(fresh) or [None])[-1]
            pool = [options.pages or "pages", options.page, width]
            past = add_input(self.graph, f"past.{layer}.{role}", fresh.dtype or ir.DataType.FLOAT, pool)
            made = self.put("WritePages", [past, fresh, slot, table], f"present.{layer}.{role}", fresh.dtype, pool)
            pasts.append(past)
            presents.append(made)
        if options.phase == "decode":
            self._attend(layer, site, presents, table)
        self.at = first
        return _Layer(pasts, presents)

    def _place(self, layer: int, keep: ir.Value, first: ir.Node) -> tuple[ir.Value, ir.Value]:
        """Slots and pages of a prompt's kept tokens, from an empty cache."""
        shape = [BATCH, self.heads, TOKENS]
        here, self.at = self.at, first
        protected = self.protected()
        self.at = here
        wanted = self.put("Cast", [keep], f"cache.wanted.{layer}", ir.DataType.BOOL, shape, to=int(ir.DataType.BOOL))
        either = self.put("Or", [wanted, protected], f"cache.either.{layer}", ir.DataType.BOOL, shape)
        stays = self.put("Cast", [either], f"cache.stays.{layer}", I32, shape, to=int(I32))
        size = self.put("Shape", [keep], f"cache.owners.{layer}", I64, [2], start=0, end=2)
        empty = self.put("ConstantOfShape", [size], f"cache.empty.{layer}", I32, shape[:2],
                         value=ir.tensor(np.zeros(1, np.int32)))  # fmt: skip
        slot, kept = self.put_all("CompactSlots", [stays, empty, self.lengths],
                                  [(f"slot.{layer}", I32, shape), (f"kept.{layer}", I32, shape[:2])])  # fmt: skip
        table = self.put("TakePages", [kept, self.of("free", layer), slot], f"page_table.{layer}", I32,
                         [*shape[:2], "entries"], page_size=self.options.page)  # fmt: skip
        self._stacks["slot"].append(slot)
        self._stacks["page_table"].append(table)
        return slot, table

    def _attend(self, layer: int, site: CacheSite, presents: list[ir.Value], table: ir.Value) -> None:
        node, q = site.node, site.node.inputs[0]
        if q is None or not is_op(node, "Attention"):  # excluded by requires
            raise AnchorError(f"'{node.name}' has no queries")
        old = node.outputs[0]
        out = self.put("RaggedAttention", [q, *presents, table, self.of("held", layer), self.lengths],
                       f"{old.name}.paged", old.dtype, dims(old), scale=float_attr(node, "scale", 0.0))  # fmt: skip
        ir.convenience.replace_nodes_and_values(self.graph, node, [node], [], [old], [out])

    def results(self) -> list[ir.Value]:
        """Outputs for all layers, stacked: what a policy decided, and in prefill where tokens went."""
        self.at = next(iter(reversed(self.graph)))
        names = ("page_table", "slot", "keep") if self.options.phase == "prefill" else ("keep",)
        made = []
        for name in names:
            parts = []
            own = [BATCH, self.heads, "entries" if name == "page_table" else TOKENS]
            for layer, value in enumerate(self._stacks[name]):
                shape = [1, *own]
                parts.append(
                    self.put("Unsqueeze", [value, self.fixed("axis0", [0])], f"{name}.{layer}.one", I32, shape)
                )
            shape = [self.layers, *own]
            made.append(self.put("Concat", parts, f"{name}.all", I32, shape, axis=0))
            made[-1].name = name
        return made

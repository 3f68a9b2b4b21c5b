"""One site of a span method as nodes: who is in the span, the filters, the joins, the shorter stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from trtpass.anchors import AttentionBlock
from trtpass.ir import dims
from trtpass.reduction import filters
from trtpass.reduction.decoder import Cut, ImageSpan, Span
from trtpass.reduction.decoder_options import FicocoLOptions
from trtpass.reduction.emit import F32, I32, I64, Emitter
from trtpass.reduction.options import ReductionOptions
from trtpass.reduction.stream import Stream, last_axis, repeated

BOOL = ir.DataType.BOOL


@dataclass
class SpanSite:
    """A site in the making.

    Args:
        emit: takes its nodes.
        block: the attention that chooses: q `[B, H, S, D]`, k `[B, Hkv, S, D]`.
        stream: before the site; ``lengths [B]`` are those of the rows now.
        span: where it lies now.
        cut: the budget.
        kept: C, an int or a symbol.
        dropped: M.
    """

    emit: Emitter
    block: AttentionBlock
    stream: Stream
    span: Span
    cut: Cut
    kept: Any
    dropped: Any
    shared: dict[str, ir.Value] = field(default_factory=dict)

    def sizes(self) -> dict[str, Any]:
        """Named dimensions of the operators."""
        block, stream = self.block, self.stream
        return {
            "B": stream.batch, "S": stream.length, "H": block.heads, "Hkv": block.kv_heads, "D": block.head_dim,
            "N": stream.original, "C": self.kept, "M": self.dropped,
        }  # fmt: skip

    def once(self, role: str, make: Callable[[], ir.Value]) -> ir.Value:
        """A value that several parts need."""
        if role not in self.shared:
            self.shared[role] = make()
        return self.shared[role]

    def column(self) -> ir.Value:
        """Lengths as int32 `[B, 1]`."""
        return self.once("column", lambda: last_axis(self.emit, self.stream.lengths, "lengths_column"))

    def range(self) -> ir.Value:
        """0 .. S - 1, int32 `[S]`."""
        emit, length = self.emit, self.stream.length

        def make() -> ir.Value:
            size = emit.node("Shape", [self.stream.tokens], "tokens_shape", I64, [1], start=1, end=2)
            count = emit.node("Squeeze", [size], "tokens_count", I64, [])
            wide = emit.node(
                "Range", [emit.scalar(0, np.int64), count, emit.scalar(1, np.int64)], "range64", I64, [length]
            )
            return emit.node("Cast", [wide], "range", I32, [length], to=int(I32))

        return self.once("range", make)

    def valid(self) -> ir.Value:
        """Whether a token is no padding, bool `[B, S]`."""
        shape = [self.stream.batch, self.stream.length]
        return self.once("valid", lambda: self.emit.node("Less", [self.range(), self.column()], "valid", BOOL, shape))

    def every_row(self) -> ir.Value:
        """``range`` for each row, int32 `[B, S]`."""
        emit, shape = self.emit, [self.stream.batch, self.stream.length]

        def make() -> ir.Value:
            both = emit.node("Shape", [self.stream.tokens], "rows_shape", I64, [2], start=0, end=2)
            return emit.node("Expand", [self.range(), both], "every_row", I32, shape)

        return self.once("every_row", make)

    def inside(self) -> ir.Value:
        """Whether a token is in its row's span, bool `[B, S]`."""
        emit, shape = self.emit, [self.stream.batch, self.stream.length]

        def make() -> ir.Value:
            if isinstance(self.span, ImageSpan):
                free = emit.node("Equal", [self.stream.protected, emit.scalar(0, np.int32)], "free", BOOL, shape)
                return emit.node("And", [free, self.valid()], "inside", BOOL, shape)
            start = emit.scalar(self.span.start - 1, np.int32)
            begun = emit.node("Greater", [self.range(), start], "begun", BOOL, [self.stream.length])
            end = self.column()
            if self.span.relative:
                end = emit.node(
                    "Add", [end, emit.scalar(self.span.stop, np.int32)], "span_end", I32, [self.stream.batch, 1]
                )
            else:
                end = emit.node(
                    "Min", [end, emit.scalar(self.span.stop, np.int32)], "span_end", I32, [self.stream.batch, 1]
                )
            open_ = emit.node("Less", [self.range(), end], "not_ended", BOOL, shape)
            return emit.node("And", [begun, open_], "inside", BOOL, shape)

        return self.once("inside", make)

    def candidate(self) -> ir.Value:
        """``inside`` as int32: tokens that others may join."""
        shape = [self.stream.batch, self.stream.length]
        return self.once(
            "candidate", lambda: self.emit.node("Cast", [self.inside()], "candidate", I32, shape, to=int(I32))
        )

    def protected(self) -> ir.Value:
        """1 outside the span, int32 `[B, S]`."""
        shape = [self.stream.batch, self.stream.length]
        one = self.emit.scalar(1, np.int32)
        return self.once("protected", lambda: self.emit.node("Sub", [one, self.candidate()], "protected", I32, shape))

    def probabilities(self, row: ir.Value, role: str, rows: Any) -> ir.Value:
        """Head mean of causal attention `[B, R, S]` of the query rows ``row`` `[B, R]`."""
        emit, shape = self.emit, [self.stream.batch, self.stream.length]
        both = emit.node("Shape", [self.stream.tokens], f"{role}_shape", I64, [2], start=0, end=2)
        none = emit.node("Expand", [emit.scalar(0.0), both], f"{role}_bias", F32, shape)
        (made,) = emit.op(
            "AttentionRows", [self.block.q, self.block.k, none, row, self.stream.lengths], [role],
            {**self.sizes(), "R": rows}, causal=1, scale=float(self.block.scale),
        )  # fmt: skip
        return made

    def map(self) -> ir.Value:
        """The head mean of the whole attention map `[B, S, S]`."""
        return self.once("map", lambda: self.probabilities(self.every_row(), "prob", self.stream.length))

    def rows(self, x: ir.Value, index: ir.Value, role: str, count: Any) -> ir.Value:
        """``x[b, index[b, c]]`` `[B, C, E]` of x `[B, S, E]`, zeros where an index is out of range."""
        (made,) = self.emit.op(
            "GatherTokens", [x, index], [role], {"B": self.stream.batch, "C": count, "E": (dims(x) or [None] * 3)[2]}
        )
        return made

    def guarded(self, score: ir.Value) -> ir.Value:
        """``score`` with +inf outside the span."""
        shape = [self.stream.batch, self.stream.length]
        return self.emit.node("Where", [self.inside(), score, self.emit.scalar(float("inf"))], "score", F32, shape)


def last_query(site: SpanSite) -> ir.Value:
    """FastV (arXiv 2403.06764): the attention that the last token pays, `[B, S]`."""
    emit, stream = site.emit, site.stream
    row = emit.node("Sub", [site.column(), emit.scalar(1, np.int32)], "last_row", I32, [stream.batch, 1])
    prob = site.probabilities(row, "last_prob", 1)
    return site.guarded(
        emit.node("Squeeze", [prob, emit.ints(1)], "last_attention", F32, [stream.batch, stream.length])
    )


def random(site: SpanSite, seed: int) -> ir.Value:
    """A control: the hash of ``reduce:filter=random`` over the positions of the span's tokens."""
    options = ReductionOptions(filter="random", correlate="none", compress="drop", seed=seed)
    stream = Stream(**{**vars(site.stream), "protected": site.protected(), "place": site.every_row()})
    return filters.random(filters.Site(site.emit, options, site.block, stream, 0, 0))


def text_rows(site: SpanSite) -> tuple[ir.Value, Any]:
    """The map's rows of the text behind the span `[B, R, S]`, and R: the text before it sees nothing of the span.

    Rows that are none, of a shorter prompt, are 0.
    """
    emit, stream = site.emit, site.stream
    if isinstance(site.span, ImageSpan):  # all rows; in place of the image's the one behind the last token, which is 0
        shape = [stream.batch, stream.length]
        index = emit.node("Where", [site.inside(), site.column(), site.every_row()], "text_row", I32, shape)
        return site.rows(site.map(), index, "text_prob", stream.length), stream.length
    if site.span.relative:
        count: Any = -site.span.stop
        first = emit.node(
            "Add", [site.column(), emit.scalar(site.span.stop, np.int32)], "text_start", I32, [stream.batch, 1]
        )
        ahead = emit.node(
            "Range",
            [emit.scalar(0, np.int32), emit.scalar(count, np.int32), emit.scalar(1, np.int32)],
            "text_range",
            I32,
            [count],
        )
        index = emit.node("Add", [first, ahead], "text_row", I32, [stream.batch, count])
    else:
        known = isinstance(stream.length, int)
        count = stream.length - site.span.stop if known else ir.SymbolicDim(f"text_{site.emit.label}")
        ends = [emit.ints(site.span.stop), emit.ints(2**31 - 1), emit.ints(1)]
        index = emit.node("Slice", [site.every_row(), *ends], "text_row", I32, [stream.batch, count])
    return site.rows(site.map(), index, "text_prob", count), count


def ficoco_l(site: SpanSite, options: FicocoLOptions) -> ir.Value:
    """FiCoCo-L (arXiv 2411.17686): attention received in the span, less that of the text."""
    emit, stream = site.emit, site.stream
    text, count = text_rows(site)
    site.shared["text"] = text
    inner = emit.node("ReduceSum", [site.candidate(), emit.ints(1)], "span_count", I32, [stream.batch, 1], keepdims=1)
    outer = emit.node("Sub", [site.column(), inner], "text_count", I32, [stream.batch, 1])
    least = emit.node("Max", [outer, emit.scalar(1, np.int32)], "text_or_one", I32, [stream.batch, 1])
    site.shared["text_count"] = emit.node("Cast", [least], "text_number", F32, [stream.batch, 1], to=int(F32))
    total = emit.node("ReduceSum", [text, emit.ints(1)], "text_sum", F32, [stream.batch, stream.length], keepdims=0)
    cue = emit.node("Div", [total, site.shared["text_count"]], "cue", F32, [stream.batch, stream.length])
    (score,) = emit.op(
        "FicocoFilter", [site.map(), cue, site.every_row(), site.protected(), stream.lengths], ["score"], site.sizes(),
        weight_permille=round(options.beta * 1000), width=0, window=2, coefficient_permille=2000,
    )  # fmt: skip
    site.shared["text_by_key"] = emit.node(
        "Transpose", [text], "text_by_key", F32, [stream.batch, stream.length, count], perm=[0, 2, 1]
    )
    return score


def correlate(
    site: SpanSite, options: FicocoLOptions, index: ir.Value, rest: ir.Value, count: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """FiCoCo-L's joins after its filter: ``target [B, T]``, ``weight [B, T]``, and the token of each entry `[B, T]`."""
    emit, stream, batch = site.emit, site.stream, site.stream.batch
    text = site.shared["text"]
    shape = [batch, site.dropped, stream.length]
    direct = emit.node(
        "Mul", [site.rows(site.map(), rest, "rest_prob", site.dropped), emit.scalar(options.gam)], "direct", F32, shape
    )
    seen = site.rows(site.shared["text_by_key"], rest, "rest_text", site.dropped)  # [B, M, R]
    product = emit.node("MatMul", [seen, text], "by_text_sum", F32, shape)
    number = emit.node("Unsqueeze", [site.shared["text_count"], emit.ints(2)], "text_number_row", F32, [batch, 1, 1])
    mean = emit.node("Div", [product, number], "by_text", F32, shape)
    indirect = emit.node("Mul", [mean, emit.scalar(1.0 - options.gam)], "indirect", F32, shape)
    affinity = emit.node("Add", [direct, indirect], "affinity", F32, shape)
    eps = round(options.eps * 1000)
    known = isinstance(site.kept, int)
    members = site.kept - ((site.kept - 1) * eps + 999) // 1000 if known else ir.SymbolicDim(f"members_{emit.label}")
    entries = site.dropped * members if known else ir.SymbolicDim(f"entries_{emit.label}")
    chosen, weight = emit.op(
        "FicocoCorrelate", [affinity, index, site.candidate(), count], ["chosen", "weight"],
        {**site.sizes(), "T": entries}, eps_permille=eps,
    )  # fmt: skip
    source = repeated(emit, rest, chosen, members)
    # An entry of no token, in a row that drops fewer than the longest, joins nothing: rest holds S there.
    real = emit.node("Less", [source, site.column()], "is_member", BOOL, [batch, entries])
    target = emit.node("Where", [real, chosen, source], "target", I32, [batch, entries])
    return target, weight, source


def merged(site: SpanSite, kept: ir.Value, target: ir.Value, weight: ir.Value, source: ir.Value) -> ir.Value:
    """``(X_j + sum alpha X_i) / (1 + sum alpha)`` `[B, C, E]` of the kept tokens and those that join them."""
    emit, batch = site.emit, site.stream.batch
    entries = (dims(target) or [None, None])[1]
    width = (dims(kept) or [None] * 3)[2]
    joining = site.rows(site.stream.tokens, source, "joining", entries)
    both = emit.node("Shape", [kept], "kept_shape", I64, [2], start=0, end=2)
    ones = emit.node("Expand", [emit.scalar(1.0), both], "kept_ones", F32, [batch, site.kept])
    made, _ = emit.op(
        "MergeTokens", [kept, ones, joining, weight, target], ["merged", "weights"],
        {"B": batch, "R": site.kept, "E": width, "S": entries},
    )  # fmt: skip
    return made


def heirs(site: SpanSite, rest: ir.Value) -> ir.Value:
    """The kept token before each dropped one, int32 `[B, M]`: before rest[m] = i there are i - m of them."""
    emit, shape = site.emit, [site.stream.batch, site.dropped]
    most = emit.node(
        "Squeeze", [emit.node("Shape", [rest], "rest_size", I64, [1], start=1, end=2)], "rest_count", I64, []
    )
    one = emit.scalar(1, np.int64)
    number = emit.node(
        "Range", [one, emit.node("Add", [most, one], "rest_end", I64, []), one], "rest_range64", I64, [site.dropped]
    )
    number32 = emit.node("Cast", [number], "rest_range", I32, [site.dropped], to=int(I32))
    before = emit.node("Sub", [rest, number32], "kept_before", I32, shape)
    return emit.node("Max", [before, emit.scalar(0, np.int32)], "heir", I32, shape)

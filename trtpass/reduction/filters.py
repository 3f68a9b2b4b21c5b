"""Filters: which tokens go. Each gives a score float32 `[B, S]`, highest kept first, +inf for protected tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from trtpass.anchors import AttentionBlock
from trtpass.errors import AnchorError
from trtpass.reduction.emit import F32, I32, I64, Emitter
from trtpass.reduction.options import ReductionOptions
from trtpass.reduction.stream import Stream

PRIME, FACTOR = 2**31 - 1, 1103515245  # of the hash behind ``random``
MANTISSA = 2**24  # float32 holds smaller integers exactly


@dataclass
class Site:
    """One layer whose stream is shortened: what filters and correlations may look at, and what they share."""

    emit: Emitter
    options: ReductionOptions
    block: AttentionBlock
    stream: Stream
    cls: int
    columns: int  # of the token grid; 0 without one
    shared: dict[str, ir.Value] = field(default_factory=dict)

    def sizes(self) -> dict[str, object]:
        """Named dimensions of the operators before anything is dropped."""
        block, stream = self.block, self.stream
        return {
            "B": stream.batch,
            "S": stream.length,
            "H": block.heads,
            "Hkv": block.kv_heads,
            "D": block.head_dim,
            "E": block.head_dim,
            "N": stream.original,
        }

    def once(self, role: str, make: Callable[[], ir.Value]) -> ir.Value:
        """A value that several parts of a site need."""
        if role not in self.shared:
            self.shared[role] = make()
        return self.shared[role]

    def metric(self) -> ir.Value:
        """Keys averaged over heads `[B, S, D]` (ToMe)."""
        shape = [self.stream.batch, self.stream.length, self.block.head_dim]
        return self.once(
            "metric",
            lambda: self.emit.node(
                "ReduceMean", [self.block.k, self.emit.ints(1)], "metric", self.block.k.dtype, shape, keepdims=0
            ),
        )

    def is_protected(self) -> ir.Value:
        shape = [self.stream.batch, self.stream.length]
        return self.once(
            "is_protected",
            lambda: self.emit.node(
                "Cast", [self.stream.protected], "is_protected", ir.DataType.BOOL, shape, to=int(ir.DataType.BOOL)
            ),
        )

    def probabilities(self, row: ir.Value, role: str, rows: object) -> ir.Value:
        """Head mean of attention `[B, R, S]` of the query rows ``row`` `[B, R]`, with the bias that this layer has."""
        emit, stream = self.emit, self.stream
        if self.options.weighs_keys:
            bias = self.once(
                "log_size", lambda: emit.node("Log", [stream.size], "log_sizes", F32, [stream.batch, stream.length])
            )
        else:
            bias = self.once(
                "no_bias",
                lambda: emit.node("Sub", [stream.size, stream.size], "no_bias", F32, [stream.batch, stream.length]),
            )
        (made,) = emit.op(
            "AttentionRows",
            [self.block.q, self.block.k, bias, row, stream.lengths],
            [role],
            {**self.sizes(), "R": rows},
            causal=0,
            scale=float(self.block.scale),
        )
        return made

    def map(self) -> ir.Value:
        """The head mean of the whole attention map `[B, S, S]`."""

        def make() -> ir.Value:
            emit, stream = self.emit, self.stream
            both = emit.node("Shape", [stream.place], "map_shape", I64, [2])
            count = emit.node(
                "Squeeze",
                [emit.node("Shape", [stream.place], "map_length", I64, [1], start=1, end=2)],
                "map_count",
                I64,
                [],
            )
            every = emit.node(
                "Range", [emit.scalar(0, np.int64), count, emit.scalar(1, np.int64)], "map_range", I64, [stream.length]
            )
            row = emit.node(
                "Expand",
                [emit.node("Cast", [every], "map_row", I32, [stream.length], to=int(I32)), both],
                "map_rows",
                I32,
                [stream.batch, stream.length],
            )
            return self.probabilities(row, "prob", stream.length)

        return self.once("map", make)

    def guarded(self, score: ir.Value) -> ir.Value:
        """``score`` with +inf for protected tokens."""
        return self.emit.node(
            "Where",
            [self.is_protected(), self.emit.scalar(float("inf")), score],
            "score",
            F32,
            [self.stream.batch, self.stream.length],
        )


def tome(site: Site) -> ir.Value:
    """ToMe (arXiv 2210.09461): every second token goes the sooner, the more alike it is to one of the others."""
    score, candidate = site.emit.op(
        "BipartiteFilter",
        [site.metric(), site.stream.protected, site.stream.lengths],
        ["score", "candidate"],
        site.sizes(),
    )
    site.shared["candidate"] = candidate
    return score


def evit(site: Site) -> ir.Value:
    """EViT (arXiv 2202.07800): attention that the CLS token pays, mean over heads."""
    if not site.cls:
        raise AnchorError(
            f"pass '{site.options.pass_name}': filter=evit reads the attention of a CLS token, and none was found",
            "an encoder with a class token in front",
            "use filter=ficoco-v, which does without, or cls=1 if there is one",
        )
    emit, stream = site.emit, site.stream
    first = emit.node(
        "Slice", [stream.place, emit.ints(0), emit.ints(1), emit.ints(1)], "first", I32, [stream.batch, 1]
    )
    zero = emit.node("Sub", [first, first], "cls_row", I32, [stream.batch, 1])
    prob = site.probabilities(zero, "cls_prob", 1)
    site.shared["weight"] = emit.node(
        "Squeeze", [prob, emit.ints(1)], "cls_attention", F32, [stream.batch, stream.length]
    )
    return site.guarded(site.shared["weight"])


def ficoco_v(site: Site) -> ir.Value:
    """FiCoCo-V (arXiv 2411.17686): attention received, less attention of CLS, with a penalty in 2x2 windows."""
    emit, stream, options = site.emit, site.stream, site.options
    prob, shape = site.map(), [stream.batch, stream.length]
    if site.cls:
        first = emit.node(
            "Slice",
            [prob, emit.ints(0), emit.ints(1), emit.ints(1)],
            "first_row",
            F32,
            [stream.batch, 1, stream.length],
        )
        cue = emit.node("Squeeze", [first, emit.ints(1)], "cue", F32, shape)
    else:
        cue = _unlike_mean(site)
    offset = emit.node("Sub", [stream.place, emit.scalar(site.cls, np.int32)], "grid_place", I32, shape)
    (score,) = emit.op(
        "FicocoFilter",
        [prob, cue, offset, stream.protected, stream.lengths],
        ["score"],
        site.sizes(),
        weight_permille=round(options.lam * 1000),
        width=site.columns,
        window=2,
        coefficient_permille=2000,
    )
    return score


def _unlike_mean(site: Site) -> ir.Value:
    """``-cos(mean of keys, key)`` `[B, S]`: what stands for attention of CLS in an encoder without one."""
    emit, key = site.emit, site.metric()
    batch, length, width = site.stream.batch, site.stream.length, site.block.head_dim
    mean = emit.node("ReduceMean", [key, emit.ints(1)], "mean_key", F32, [batch, 1, width], keepdims=1)
    dot = emit.node(
        "ReduceSum",
        [emit.node("Mul", [key, mean], "key_by_mean", F32, [batch, length, width]), emit.ints(2)],
        "dot",
        F32,
        [batch, length],
        keepdims=0,
    )
    norm = emit.node("ReduceL2", [key, emit.ints(2)], "norm", F32, [batch, length], keepdims=0)
    whole = emit.node("ReduceL2", [mean, emit.ints(2)], "mean_norm", F32, [batch, 1], keepdims=0)
    product = emit.node("Mul", [norm, whole], "norms", F32, [batch, length])
    safe = emit.node("Max", [product, emit.scalar(1e-12)], "norms_or_least", F32, [batch, length])
    return emit.node(
        "Neg", [emit.node("Div", [dot, safe], "cosine", F32, [batch, length])], "cue", F32, [batch, length]
    )


def random(site: Site) -> ir.Value:
    """A control: a score that is a hash of the token's original index and the seed, the same in every row."""
    emit, shape = site.emit, [site.stream.batch, site.stream.length]
    prime = emit.scalar(PRIME, np.int64)

    def step(value: ir.Value, factor: ir.Value, addend: ir.Value, role: str) -> ir.Value:
        product = emit.node("Mul", [value, factor], f"{role}_product", I64, shape)
        return emit.node(
            "Mod", [emit.node("Add", [product, addend], f"{role}_sum", I64, shape), prime], role, I64, shape
        )

    place = emit.node("Cast", [site.stream.place], "place64", I64, shape, to=int(I64))
    factor, seed = emit.scalar(FACTOR, np.int64), emit.scalar(hash_seed(site.options.seed), np.int64)
    first = step(place, factor, seed, "hash1")
    second = step(first, first, seed, "hash2")
    third = step(second, second, first, "hash3")
    low = emit.node("Mod", [third, emit.scalar(MANTISSA, np.int64)], "hash", I64, shape)
    return site.guarded(emit.node("Cast", [low], "hash_score", F32, shape, to=int(F32)))


def hash_seed(seed: int) -> int:
    """What a seed adds in the hash."""
    return (seed + 1) * 12345


FILTERS: dict[str, Callable[[Site], ir.Value]] = {"tome": tome, "evit": evit, "ficoco-v": ficoco_v, "random": random}

"""``merge.encoder`` and ``merge.overhead``: an encoder that carries fewer tokens, against somebody's file.

DINOv2-S with its saliency head, photos of 224 x 224, batch 1 and 16, three kept shares: the mean over the blocks of the
tokens that each hands on, of 257. ToMe with a constant r in each block (``schedule``). All graphs are sessions of one
process and run in turn: the original file, the raised graph, the rewritten ones, and for the overhead the raised graph
with as many tokens in each block, chosen for free (the first ones).

The limit is the ratio of operations of whole graphs, head included. They are counted from the shapes that ONNX Runtime
saw, in a run of each graph with nothing fused (``operations``)::

    MatMul, Gemm   2 |out| K                  Conv            2 |out| |W| / W[0]
    Attention      2 B H S T (D + Dv)         ConvTranspose   2 |x| |W| / W[0]
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphs import dinov2_saliency as model
from trtpass import io, native
from trtpass.anchors import find
from trtpass.bench.measure import Array, Graph, Machine, interleave, poisoned, require_close
from trtpass.bench.record import Record, timed
from trtpass.canonicalize import canonicalize
from trtpass.encoders import describe
from trtpass.errors import CheckFailed, InputError
from trtpass.ir import constant, dims, is_op, make_node
from trtpass.passes import parse
from trtpass.passes.lower import lower
from trtpass.reduction.walk import follow, resize

TOKENS, CLS = 257, 1
BATCHES = (1, 16)
SHARES = (0.75, 0.5, 0.25)
FLOOR = 0.5  # tokens that the last block carries at least, of the mean that is asked for
ATOL = 1e-4  # of a heat map in 0 to 1, raised against original
TYPICAL = 1e-3  # mean difference of a heat map, kernels against bodies: where rounding flips a token, a region moves
ORIGINAL = "the original file, as its author exported it, in the same runtime"
RAISED = "the raised graph with every token, the same kernels"
FREE = "the raised graph with as many tokens in each block, the first ones, and the same kernels"


class NotHere(InputError):
    """This machine lacks the model or the photos."""


@dataclass(frozen=True)
class Schedule:
    """Tokens that go after the attention of each block, and what each block hands on."""

    drops: tuple[int, ...]

    @property
    def carried(self) -> tuple[int, ...]:
        return tuple(TOKENS - sum(self.drops[: i + 1]) for i in range(len(self.drops)))

    @property
    def share(self) -> float:
        return float(np.mean(self.carried)) / TOKENS

    @property
    def method(self) -> str:
        """The pass in its textual form."""
        active = sum(drop > 0 for drop in self.drops)
        return f"tome:r={'+'.join(map(str, self.drops[:active]))},layers=0-{active - 1}"


def schedule(share: float, blocks: int = 12, tokens: int = TOKENS) -> Schedule:
    """The constant r whose mean share comes nearest to ``share``.

    The last step stops at ``FLOOR`` of the mean, and none takes more than half of the unprotected tokens (ToMe's most).
    """
    floor = math.ceil(FLOOR * share * tokens)

    def of(r: int) -> Schedule:
        left, drops = tokens, []
        for _ in range(blocks):
            drops.append(max(0, min(r, (left - CLS) // 2, left - floor)))
            left -= drops[-1]
        return Schedule(tuple(drops))

    return min((of(r) for r in range(1, tokens // 2)), key=lambda made: abs(made.share - share))


@dataclass(frozen=True)
class Side:
    """A graph that is measured, and its operations."""

    graph: Graph
    flops: float
    schedule: Schedule | None = None


def run(
    names: Sequence[str],
    machine: Machine,
    repeats: int,
    note: Callable[[str], None],
    batches: Sequence[int] = BATCHES,
    shares: Sequence[float] = SHARES,
) -> list[Record]:
    """For each batch and share: rewritten and raised against original, rewritten against raised; and the overhead.

    Raises:
        NotHere: the package that has the file, or scikit-image, is not installed.
        CheckFailed: heat maps of the raised graph are not those of the original, or kernels' not those of bodies.
    """
    try:
        photos, file = model.examples()["input_image"], model.onnx_file()  # [4, 3, 224, 224]
    except InputError as error:
        raise NotHere(error.found, error.expected, error.fix) from error
    original, raised = io.load(file), io.load(file)
    canonicalize(raised)
    chosen = [schedule(share) for share in shares]
    records: list[Record] = []
    for batch in batches:
        images = np.ascontiguousarray(np.concatenate([photos] * math.ceil(batch / len(photos)))[:batch])
        note(f"{', '.join(names)}: batch {batch}, {', '.join(f'{s.share:.0%}' for s in chosen)} of the tokens")
        sides = {"original": _side(original, machine, images), "raised": _side(_lowered(raised), machine, images)}
        for made in chosen:
            rewritten = raised.clone()
            parse(made.method)(rewritten)
            sides[made.method] = _side(_lowered(rewritten), machine, images, made)
            _check_rewritten(rewritten, sides[made.method].graph, machine, images)
            if "merge.overhead" in names:
                shorter = _lowered(free(raised, made))
                sides[f"free {made.method}"] = _side(shorter, machine, images, made)
        require_close("merge.encoder, raised graph", _heat(sides["raised"].graph, images),
                      _heat(sides["original"].graph, images), ATOL, 0.0)  # fmt: skip
        records += _measured(names, sides, images, machine, repeats)
    return records


def _lowered(graph: ir.Model) -> ir.Model:
    return lower(graph, "cpu").model


def _side(graph: ir.Model, machine: Machine, images: Array, made: Schedule | None = None) -> Side:
    return Side(Graph(graph, machine.threads), operations(graph, {"input_image": images}), made)


def _heat(graph: Graph, images: Array) -> Array:
    out = poisoned((len(images), 1, model.SIZE, model.SIZE))
    graph.bind({"input_image": images}, {"output_importance": out})()
    return out


def _check_rewritten(rewritten: ir.Model, kernels: Graph, machine: Machine, images: Array) -> None:
    """Kernels against bodies, on at most four images: a token that rounding flips moves a region a little."""
    some = np.ascontiguousarray(images[:4])
    bodies = _heat(Graph(lower(rewritten, "portable").model, machine.threads), some)
    gap = float(np.abs(_heat(kernels, some) - bodies).mean())
    if not gap <= TYPICAL:
        raise CheckFailed(
            f"merge.encoder: heat maps of kernels and of bodies are {gap:.3g} apart in the mean",
            f"{TYPICAL} at most",
            "no speed is reported for wrong results; run the tests of the operators",
        )


def _measured(
    names: Sequence[str], sides: dict[str, Side], images: Array, machine: Machine, repeats: int
) -> list[Record]:
    calls = []
    for side in sides.values():
        out = poisoned((len(images), 1, model.SIZE, model.SIZE))
        calls.append([side.graph.bind({"input_image": images}, {"output_importance": out})])
    seconds = dict(zip(sides, interleave(calls, repeats, machine.clock), strict=True))
    library = native.find()
    kernels = "none" if isinstance(library, str) else native.isa()

    def record(name: str, ours: str, theirs: str, words: str, limit: float) -> Record:
        made = sides[ours].schedule
        params: dict[str, Any] = {
            "batch": len(images), "kept": round(made.share, 3) if made else 1.0,
            "r": max(made.drops) if made else 0, "last": made.carried[-1] if made else TOKENS,
            "gflop": round(sides[ours].flops / 1e9, 2),
            "images_s": round(len(images) / float(np.median(seconds[ours])), 1),
            "threads": machine.threads, "kernels": kernels,
        }  # fmt: skip
        return timed(name, params, words, seconds[ours], seconds[theirs], limit, machine.as_dict())

    records: list[Record] = []
    for ours in sides:
        if ours == "original" or ours.startswith("free "):
            continue
        if "merge.encoder" in names:
            for theirs, words in (("original", ORIGINAL), ("raised", RAISED)):
                if ours != theirs:
                    limit = sides[theirs].flops / sides[ours].flops
                    records.append(record("merge.encoder", ours, theirs, words, limit))
        if f"free {ours}" in sides:
            records.append(record("merge.overhead", ours, f"free {ours}", FREE, 1.0))
    return sorted(records, key=lambda r: (r.name, r.baseline))


def free(raised: ir.Model, made: Schedule) -> ir.Model:
    """The raised graph with the first tokens of each block alone, and zeros for the others in front of the head."""
    short = raised.clone()
    anchors = find(short)
    out = describe(short, anchors).stream_out
    if out is None:
        raise CheckFailed("merge.overhead: the encoder has no token stream", "one of residual blocks")
    zero, axis = (constant(short.graph, f"free.{n}", np.array([n], np.int64)) for n in (0, 1))
    for block, drop, count in zip(anchors.blocks, made.drops, made.carried, strict=True):
        if block.residual_out is not None and drop:
            end = constant(short.graph, f"free.{count}", np.array([count], np.int64))
            kept = _after(block.residual_out, "Slice", [zero, end, axis], f"free.tokens{block.layer}")
            resize(follow(short.graph, kept, 1, out), count)
    ends = constant(short.graph, "free.pads", np.array([0, 0, 0, 0, TOKENS - made.carried[-1], 0], np.int64))
    _after(out, "Pad", [ends], "free.all")
    return short


def _after(value: ir.Value, kind: str, rest: Sequence[ir.Value], name: str) -> ir.Value:
    """What reads ``value`` reads it through a node instead: its output."""
    users, producer, shape = list(value.uses()), value.producer(), dims(value)
    if producer is None or not isinstance(producer.graph, ir.Graph) or shape is None:
        raise CheckFailed(f"merge.overhead: '{value.name}' is made by no node, or of no shape", "a residual stream")
    node = make_node(kind, [value, *rest], [(name, value.dtype, [shape[0], TOKENS, shape[2]])])
    producer.graph.insert_after(producer, node)
    for user, place in users:
        user.replace_input_with(place, node.outputs[0])
    return node.outputs[0]


def operations(graph: ir.Model, feeds: dict[str, Array]) -> float:
    """Multiplications and additions of all products of one run, from the shapes that the runtime saw."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "run")
        native.register(options)
        data = ir.to_proto(graph).SerializeToString()
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
    weights = {f"{n.name}_kernel_time": dims(n.inputs[1]) for n in graph.graph if is_op(n, "Conv", "ConvTranspose")}
    total = 0
    for event in events:
        seen = event.get("args", {})
        if event.get("cat") == "Node" and "input_type_shape" in seen:
            inputs, outputs = (_shapes(seen[f"{side}_type_shape"]) for side in ("input", "output"))
            total += products(seen["op_name"], inputs, outputs, weights.get(event["name"]))
    return float(total)


def _shapes(typed: Iterable[dict[str, list[int]]]) -> list[list[int]]:
    return [shape for item in typed for shape in item.values()]


def products(kind: str, inputs: list[list[int]], outputs: list[list[int]], weight: list[Any] | None = None) -> int:
    """Multiplications and additions of one node, 0 of what multiplies nothing (or next to nothing).

    Args:
        kind: the operator.
        inputs: shapes, but that a runtime which packed a weight may have dropped it.
        outputs: shapes.
        weight: of a convolution `[out, in, ...]`, or a transposed one `[in, out, ...]`.
    """
    if kind in ("MatMul", "Gemm"):
        return 2 * math.prod(outputs[0]) * inputs[0][-1]
    if kind in ("Conv", "ConvTranspose"):
        if weight is None:
            raise CheckFailed(f"merge.encoder: the weight of a {kind} has no known shape", "an initializer")
        places = outputs[0] if kind == "Conv" else inputs[0]
        return 2 * math.prod(places) * math.prod(weight[1:])
    if kind in ("Attention", "EncoderAttention"):  # [B, H, S, D], or [B, S, H, D] with a bias [B, S]
        q, k, v = inputs[:3]
        keys = k[2] if kind == "Attention" else inputs[3][1]
        return 2 * math.prod(q[:3]) * keys * (q[3] + v[3])
    return 0

"""``kvzap.decode``, ``kvzap.attention``, ``kvzap.scorer``: decoding with what a policy keeps, against everything.

All on a real model and real text, at the engine's own threshold. What a head holds differs from head to head, so these
are the lengths and pages that the engine made, not made-up ones.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from trtpass import io
from trtpass.anchors import find
from trtpass.bench.dense import BASELINES, CONTRIB
from trtpass.bench.inputs import text_ids
from trtpass.bench.layer import Heads
from trtpass.bench.measure import CLOCKS, Array, Call, Graph, Machine, interleave, poisoned, require_close
from trtpass.bench.ragged import Layer, aligned, contiguous, dense_call, paged
from trtpass.bench.record import Record, decode_limit, timed
from trtpass.build import CARRIED
from trtpass.errors import InputError
from trtpass.manifest import Manifest
from trtpass.paged import PagedEngine, PagedState
from trtpass.passes.cache import insert_cache
from trtpass.passes.logits import lm_head
from trtpass.passes.lower import lower
from trtpass.runtime import DECODE, PREFILL, Engine, State

if TYPE_CHECKING:
    from trtpass.bench.kvpress_worker import Worker

ATOL, RTOL = 2e-3, 2e-3  # of logits, as in trtpass.compare
STEPS = 8  # decode steps of one repeat
SETTLE = 0.1  # seconds before a side's turn: threads of the one before spin for some milliseconds, on the same cores
LENGTHS = (1024, 2048, 4096, 8000)  # tokens of the prompt; 8192 is the context, and decoding adds some
DENSE = "the dense engine over the same weights"
KVPRESS = "transformers and kvpress, the same weights, threshold and window (a process of its own, calls in turn)"
NAMES = ("kvzap.decode", "kvzap.attention", "kvzap.scorer")


@dataclass(frozen=True)
class Sides:
    """The engine with a policy, and the dense one of the same model."""

    ours: PagedEngine
    dense: Engine
    model: ir.Model
    params: dict[str, Any]


def open_sides(folder: Path, threads: int) -> Sides:
    """Both engines of a folder.

    Raises:
        InputError: the engine has no cache policy.
    """
    manifest = Manifest.read(folder)
    ours = Engine.open(folder, "cpu", threads, manifest.context)
    if not isinstance(ours, PagedEngine):
        raise InputError(f"{folder} has a dense cache", "the folder of an engine with a cache policy", BUILD)
    model = io.load(folder / "dense.onnx")
    graphs = {phase: lower(insert_cache(model, phase), "cpu").model for phase in (PREFILL, DECODE)}
    record = manifest.passes[0]
    params = {"policy": record.name, "threads": threads, "batch": 1, "page": manifest.page,
              "window": record.options["window"], "model": manifest.model}  # fmt: skip
    if "threshold" in record.options:
        params["threshold"] = record.options["threshold"]
    return Sides(ours, Engine.open(graphs, "cpu", threads, manifest.context), model, params)


BUILD = "build one: make engine MODEL=smollm2-135m PASSES=kvzap"


def run(
    names: Sequence[str], folder: Path, machine: Machine, repeats: int, note: Callable[[str], None],
    lengths: Sequence[int] = LENGTHS,
) -> list[Record]:  # fmt: skip
    """The benchmarks in ``names``, of ``NAMES``, on the engine in ``folder``.

    Raises:
        InputError: no engine with a policy, or a length beyond its context.
        CheckFailed: a result is wrong.
    """
    if not names:
        return []
    sides = open_sides(folder, machine.threads)
    longest = max(lengths)
    if any(tokens % WHOLE for tokens in lengths):
        raise InputError(f"lengths {', '.join(map(str, lengths))}", f"multiples of {WHOLE}")
    context = sides.ours.context or longest
    if longest + (repeats + 2) * STEPS > context:
        raise InputError(f"{longest} tokens and {repeats} repeats of {STEPS} steps", f"at most {context} tokens")
    ids = text_ids(folder, longest)[0]
    records: list[Record] = []
    with _other(folder, machine, note) as other:
        for tokens in lengths:
            note(f"{', '.join(names)}: {tokens} tokens")
            capacity = tokens + (repeats + 2) * STEPS
            rows = [ids[:tokens].tolist()]
            dense, ours = sides.dense.prefill(rows, capacity=capacity), sides.ours.prefill(rows, capacity=capacity)
            require_close(f"prefill of {tokens} tokens", ours.logits, dense.logits, ATOL, RTOL)
            params = {**sides.params, "tokens": tokens, "kept": round(float(ours.kept().mean()), 4)}
            if "kvzap.attention" in names:
                records += _attention(sides, dense, ours, params, machine, repeats)
            if "kvzap.decode" in names:
                records += _decode(sides, dense, ours, rows[0], params, machine, repeats, other)
    if "kvzap.scorer" in names:
        records.append(_scorer(folder, ids[: min(lengths)], sides, machine, repeats))
    return records


def _decode(
    sides: Sides, dense: State, ours: PagedState, prompt: list[int], params: dict[str, Any], machine: Machine,
    repeats: int, other: _Other | None,
) -> list[Record]:  # fmt: skip
    """A few steps each in turn: ours, dense, and kvpress where it is; a step reads all weights, so no cache is warm."""
    now = CLOCKS[machine.clock]
    token = [prompt[-1]]
    if other is not None:
        masked = other.prefill(prompt)
    seconds = np.zeros((3, repeats))
    for repeat in range(-1, repeats):
        for side, (engine, state) in enumerate(((sides.ours, ours), (sides.dense, dense))):
            time.sleep(SETTLE)
            taken = []
            for _ in range(STEPS):
                start = now()
                engine.decode(state, token)
                taken.append(now() - start)
            if repeat >= 0:
                seconds[side, repeat] = float(np.median(taken))
        if other is not None and repeat >= 0:
            time.sleep(SETTLE)
            seconds[2, repeat] = float(np.median(other.decode(STEPS)))
    if not (np.isfinite(ours.logits).all() and np.isfinite(dense.logits).all()):
        raise InputError("decoded logits are not finite", "finite weights")
    weights = sum(v.const_value.nbytes for v in sides.model.graph.initializers.values() if v.const_value is not None)
    keys = dense_bytes(sides.model, int(dense.lengths[0]))
    held = keys * float(ours.kept().mean())
    limit = (weights + keys) / (weights + held)
    rates = {"tokens/s": round(1 / float(np.median(seconds[0])), 2)}
    records = [timed("kvzap.decode", {**params, **rates}, DENSE, seconds[0], seconds[1], limit, machine.as_dict())]
    if other is not None:
        params = {**params, **rates, "kvpress masked": round(masked, 4)}
        records.append(timed("kvzap.decode", params, KVPRESS, seconds[0], seconds[2], None, machine.as_dict()))
    return records


def dense_bytes(dense: ir.Model, tokens: int) -> int:
    """Bytes of keys and values of all layers, one row, all kept, in float32."""
    return sum((b.head_dim + b.v_head_dim) * b.kv_heads * 4 for b in find(dense).blocks) * tokens


def _attention(
    sides: Sides, dense: State, ours: PagedState, params: dict[str, Any], machine: Machine, repeats: int
) -> list[Record]:
    """One step of attention alone, all layers in one graph: over the engine's own pages, by kernel and by body."""
    block = find(sides.model).blocks[0]
    heads, layers = Heads(block.heads, block.kv_heads, block.head_dim), len(find(sides.model).blocks)
    rng = np.random.default_rng(0)
    stack = [_layer(rng, heads, dense, i) for i in range(layers)]
    kernel = Graph(paged(heads, layers), machine.threads)
    theirs = [dense_call(Graph(contiguous(heads, layers), machine.threads), heads, stack), _all_held(kernel, stack)]
    feeds: dict[str, Array] = {"queries": np.ones(1, np.int32)}
    for i, layer in enumerate(stack):
        feeds |= {
            f"q{i}": layer.q, f"k{i}": ours.cache[f"past.{i}.key"], f"v{i}": ours.cache[f"past.{i}.value"],
            f"table{i}": np.ascontiguousarray(ours.pages.table[i]), f"lengths{i}": ours.pages.held[i].copy(),
        }  # fmt: skip
    outs = {form: {f"out{i}": poisoned((1, heads.heads, 1, heads.width)) for i in range(layers)} for form in FORMS}
    calls: dict[str, Call] = {}
    for form in FORMS:
        graph = kernel if form == "native" else Graph(lower(paged(heads, layers), "portable").model, machine.threads)
        calls[form] = graph.bind(feeds, outs[form])
        calls[form]()
    for name, out in outs["native"].items():
        require_close(f"{name} by kernel and by body", out, outs["body"][name], 2e-5, 1e-4)
    seconds = interleave([*([call] for call in theirs), *([calls[form]] for form in FORMS)], repeats, machine.clock)
    best = int(np.median(seconds[:2], 1).argmin())
    everything = layers * block.kv_heads * int(dense.lengths[0])
    limit = decode_limit(everything, int(ours.pages.held.sum()))
    return [
        timed("kvzap.attention", {**params, "form": form, f"over {CONTRIB}": over(seconds[0], seconds[2 + i])},
              (BASELINES[CONTRIB], OWN)[best], seconds[2 + i], seconds[best], limit, machine.as_dict())
        for i, form in enumerate(FORMS)
    ]  # fmt: skip


FORMS = ("native", "body")
OWN = "RaggedAttention of this library, all keys held, in pages of 64"
WHOLE = 64  # slots of a page there


def over(theirs: Array, ours: Array) -> float:
    return round(float(np.median(theirs / ours)), 2)


def _all_held(graph: Graph, stack: Sequence[Layer]) -> Call:
    """Our own kernel over everything, the other dense side."""
    feeds: dict[str, Array] = {"queries": np.ones(1, np.int32)}
    for i, layer in enumerate(stack):
        _, heads, count, width = layer.cache[0].shape
        pages = heads * count // WHOLE
        table = np.arange(pages, dtype=np.int32).reshape(1, heads, -1)
        k, v = (cache.reshape(pages, WHOLE, width) for cache in layer.cache)
        feeds |= {f"q{i}": layer.q, f"k{i}": k, f"v{i}": v, f"table{i}": table,
                  f"lengths{i}": np.full((1, heads), count, np.int32)}  # fmt: skip
    return graph.bind(feeds, {f"out{i}": poisoned(x.q.shape) for i, x in enumerate(stack)})


def _layer(rng: np.random.Generator, h: Heads, dense: State, layer: int) -> Layer:
    """The dense cache's keys and values of a layer, cut to the tokens that it holds; queries of noise, both sides."""
    count = int(dense.lengths[0])
    kept = []
    for role in ("key", "value"):
        rows = aligned((1, h.kv_heads, count, h.width))
        rows[:] = dense.cache[f"past.{layer}.{role}"].numpy()[:, :, :count]
        kept.append(rows)
    new = rng.standard_normal((2, 1, 1, h.kv_heads * h.width), np.float32)
    q = rng.standard_normal((1, h.heads, 1, h.width), np.float32)
    empty = np.zeros((0, h.width), np.float32)
    return Layer(q, (new[0], new[1]), (kept[0], kept[1]), (empty, empty))


def _scorer(folder: Path, prompt: Array, sides: Sides, machine: Machine, repeats: int) -> Record:
    """Share of the time of all products with weights that goes into scoring, in one profiled prefill."""
    with tempfile.TemporaryDirectory(prefix="trtpass-bench-") as scratch:
        model = io.load(folder / "prefill.onnx")
        graph = Graph(model, machine.threads, Path(scratch) / "profile")
        state = sides.ours.new_state(1, len(prompt), None)
        feeds: dict[str, Any] = {
            "input_ids": prompt[None], "lengths": np.array([len(prompt)], np.int32), "free": state.pages.free(),
            **state.cache,
        }  # fmt: skip
        for _ in range(repeats + 1):
            graph.session.run(["logits"], feeds)
        events = json.loads(Path(graph.session.end_profiling()).read_text())
    starts = sorted(e["ts"] for e in events if e.get("name") == "model_run")[1:]
    ratios = []
    ends = [*starts[1:], float("inf")]
    for start, end in zip(starts, ends, strict=True):
        scorer = products = 0.0
        for e in events:
            if e.get("cat") == "Node" and e["name"].endswith("_kernel_time") and start <= e["ts"] < end:
                mine = ".kvzap." in e["name"]
                scorer += e["dur"] if mine else 0.0
                products += e["dur"] if not mine and e["args"]["op_name"] in ("MatMul", "Gemm", "FusedMatMul") else 0.0
        ratios.append(100 * scorer / products)
    params = {**sides.params, "tokens": len(prompt), "flops %": round(100 * _flops_share(sides.model, folder), 4)}
    middle = round(float(np.median(ratios)), 3)
    return Record("kvzap.scorer", params, "the products with weights of the same prefill", "%", middle, None, None,
                  round(min(ratios), 3), round(max(ratios), 3), None, machine.as_dict())  # fmt: skip


def _flops_share(dense: ir.Model, folder: Path) -> float:
    """Multiplications of the scorer over those of all products with weights, lm_head left out."""
    from trtpass.kvzap.surrogate import Surrogate

    weights = Surrogate.load(folder / CARRIED).arrays()
    scorer = sum(array.size for name, array in weights.items() if name.endswith("weight"))
    head = lm_head(find(dense))
    products = [node.inputs[1] for node in dense.graph if node.op_type == "MatMul" and node is not head]
    return scorer / sum(v.const_value.size for v in products if v is not None and v.const_value is not None)


class _Other:
    """transformers and kvpress in their process, with the engine's threshold; absent without their environment."""

    def __init__(self, worker: Worker, checkpoint: Path, options: Mapping[str, Any]) -> None:
        self.worker, self.checkpoint, self.options = worker, checkpoint, options

    def prefill(self, prompt: list[int]) -> float:
        made = self.worker.ask(
            "prefill", tokens=prompt, checkpoint=str(self.checkpoint), threshold=self.options["threshold"],
            window=self.options["window"],
        )  # fmt: skip
        return float(made["masked"])

    def decode(self, count: int) -> list[float]:
        return list(self.worker.ask("decode", count=count)["seconds"])


@contextlib.contextmanager
def _other(folder: Path, machine: Machine, note: Callable[[str], None]) -> Iterator[_Other | None]:
    """kvpress's process with the engine's model, or None, having said why not."""
    from graphs import resolve
    from trtpass.bench.kvpress_worker import Worker, python
    from trtpass.kvzap.surrogate import Surrogate

    manifest = Manifest.read(folder)
    record = manifest.passes[0]
    module: Any = resolve(manifest.origin).load().module if record.name == "kvzap" else None
    try:
        python()
        if module is None:
            raise InputError(f"its press is kvzap's, on a torch model; the engine's policy is {record.name}")
    except InputError as error:
        note(f"kvpress left out: {error.found}")
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="trtpass-bench-") as scratch:
        model, checkpoint = Path(scratch, "model"), Path(scratch, "surrogate")
        module.save_pretrained(model, safe_serialization=True)
        del module
        Surrogate.load(folder / CARRIED).save(checkpoint)
        with Worker() as worker:
            worker.ask("load", model=str(model), threads=machine.threads, clock=machine.clock)
            yield _Other(worker, checkpoint, record.options)

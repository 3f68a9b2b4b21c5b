"""Plans of an engine: its graphs, lowered for TensorRT or TensorRT-RTX, checked, and built."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import onnx_ir as ir

from trtpass import io, rtx
from trtpass.doctor import gpus
from trtpass.errors import InputError
from trtpass.paged_checks import paged_graphs
from trtpass.passes.cache import insert_cache
from trtpass.passes.cache_policy import CachePolicy
from trtpass.passes.lower import Decision, counted
from trtpass.passes.paged_cache import KIND_KEY, PAGE, PAGE_KEY, PAGED
from trtpass.plan_process import PlanReport, Profile
from trtpass.progress import Report
from trtpass.reduction.decoder import SPAN_KEY, Shortened

TARGETS = ("tensorrt-rtx", "tensorrt")
WEIGHTS = {"float16": "weights.fp16.bin", "bfloat16": "weights.bf16.bin"}
DTYPES = tuple(WEIGHTS)
BATCH = (1, 1, 4)  # min, opt, max rows of a plan's profile
CHUNK = 512  # most tokens of one call of a decode plan
SM = "SM90"  # of a TensorRT graph that is written on a machine without a GPU, where none was asked for
TIMINGS = ".timing"  # in the folder of all engines


@dataclass(frozen=True)
class Plans:
    """What was written: notes in words, the SMs, and why there is no plan (empty where there is one)."""

    notes: list[str]
    sm: tuple[str, ...]
    unbuilt: str = ""


Lower = Callable[[ir.Model], ir.Model]


class Graphs(Protocol):
    """What plans are made from. A graph says in its property ``trtpass.phase`` how it is called."""

    @property
    def rewritten(self) -> ir.Model:
        """The graph with the operators of the passes."""

    @property
    def dtype(self) -> str:
        """``float16`` or ``bfloat16``."""

    def graphs(self, lower: Lower) -> dict[str, ir.Model]:
        """The engine's graphs, lowered, by the stem of their files."""

    def profiles(self, phase: str, graph: ir.Model) -> list[Profile]:
        """Shapes that a graph's plan is built for, the widest last."""


@dataclass(frozen=True)
class Source:
    """The two phases of a decoder, from the dense and the rewritten graph: the cache's slots, what kind of logits."""

    dense: ir.Model
    rewritten: ir.Model
    context: int
    logits: str
    dtype: str = "float16"
    policy: CachePolicy | None = None
    page: int = PAGE

    def profiles(self, phase: str, graph: ir.Model) -> list[Profile]:
        """Whole prompts; or single tokens, and chunks of a long prompt."""
        record = Shortened.read(self.rewritten.metadata_props.get(SPAN_KEY))
        least = 1 if record is None else record.least
        return [_profile(graph, tokens, self.context) for tokens in _tokens(phase, self.context, least)]

    def graphs(self, lower: Lower) -> dict[str, ir.Model]:
        """Both phases, lowered. The cache has a fixed capacity, as TensorRT needs it."""
        return {phase: lower(graph) for phase, graph in self.phases(self.context).items()}

    def phases(self, capacity: int | None = None) -> dict[str, ir.Model]:
        """Both phases with their cache, canonical; ``capacity``: tokens of a row where shapes are fixed."""
        if self.policy is None:
            shorter = self.rewritten.metadata_props.get(SPAN_KEY)
            return {
                phase: insert_cache(model, phase, capacity=capacity, logits=self.logits, shortened=shorter)
                for phase, model in (("prefill", self.rewritten), ("decode", self.dense))
            }
        return paged_graphs(self.rewritten, self.dense, self.policy, self.page, self.logits, self.context)


def write_plans(target: str, asked: Sequence[str], source: Graphs, work: Path, out: Path, report: Report) -> Plans:
    """Write a plan beside each graph: ``prefill.plan`` and ``decode.plan`` of a decoder.

    On a machine that cannot build for ``tensorrt`` the graphs are written and checked, and the result says what lacks.

    Args:
        target: one of ``TARGETS``.
        asked: compute capabilities such as ``89`` or ``SM89``; none means all that can be built, or this machine's.
        source: the graphs.
        work: the engine's folder.
        out: the folder of all engines, where timing caches are kept.
        report: progress.

    Raises:
        InputError: a package is missing, an SM is unknown, or the builder refuses the graph.
    """
    sm = tuple(name if name.startswith(("SM", "CURRENT")) else f"SM{name}" for name in asked)
    plans = (_tensorrt if target == "tensorrt" else _rtx)(sm, source, work, out, report)
    keep = [s.attributes["max_keep_permille"].value for s in source.rewritten.graph if s.op_type == "SelectTokens"]
    if keep and max(keep) >= 1000 and target == "tensorrt-rtx":
        plans.notes.append(
            "shapes are fixed: with max_keep=1 the plan computes on all tokens; give max_keep below 1 to save time"
        )
    elif keep and max(keep) < 1000:
        plans.notes.append(
            f"at most {max(keep) / 10:g}% of the tokens are kept; a row that needs more is clamped, and then its "
            "`keep` is above its `count`"
        )
    return plans


def _rtx(sm: tuple[str, ...], source: Graphs, work: Path, out: Path, report: Report) -> Plans:
    sm = sm or (rtx.SMS if source.dtype == "float16" else tuple(name for name in rtx.SMS if name != "SM75"))
    unknown = [name for name in sm if name not in rtx.OFFERED]
    if unknown:
        raise InputError(
            f"SM={unknown[0]}", f"one of {', '.join(rtx.OFFERED)}", "SM90 and SM100 are not offered by TensorRT-RTX"
        )
    if not rtx.available():
        raise InputError("the package tensorrt-rtx is not installed", fix=rtx.INSTALL)
    graphs = source.graphs(lambda model: rtx.lower(model, sm, source.dtype))
    _save(graphs, source, work)
    notes = []
    for step, phase in enumerate(graphs):
        built = rtx.build_plan(
            work / f"{phase}.onnx",
            work / f"{phase}.plan",
            compute_capabilities=sm,
            profile=source.profiles(phase, graphs[phase])[-1],
            progress=_progress(report, phase, step, len(graphs)),
        )
        notes.append(_built(phase, built))
    return Plans(notes, sm)


def _tensorrt(sm: tuple[str, ...], source: Graphs, work: Path, out: Path, report: Report) -> Plans:
    from trtpass.trt import builder
    from trtpass.trt import lower as trt

    devices = gpus()
    sm = sm or (SM if isinstance(devices, str) else f"SM{devices[0][1]}",)
    if len(sm) > 1 or not sm[0].removeprefix("SM").isdigit():
        raise InputError(f"SM={','.join(sm)} for TensorRT", "one compute capability: a plan runs where it was built")
    cc = int(sm[0].removeprefix("SM"))
    decisions: list[tuple[str, Decision]] = []

    def lower(model: ir.Model) -> ir.Model:
        lowered = trt.lower(model, cc, source.dtype)
        phase = lowered.model.metadata_props["trtpass.phase"]
        decisions.extend((phase, decision) for decision in lowered.decisions)
        return lowered.model

    graphs = source.graphs(lower)
    _save(graphs, source, work)
    notes = counted(decisions)
    for step, (phase, graph) in enumerate(graphs.items()):
        report(f"{phase}: compiling kernels", 0.36 + 0.09 * step / len(graphs))
        rtx.precheck(work / f"{phase}.onnx", frozenset((n.domain, n.op_type) for n in trt.plugin_nodes(graph)))
        if kernels := builder.kernels_of(graph):
            names = ", ".join(sorted({kernel.name for kernel in kernels}))
            notes.append(f"{phase}.onnx: {len(kernels)} kernels compile for {sm[0]} to PTX ({names})")
    if lacking := builder.missing(cc):
        return Plans(notes, sm, "; ".join(lacking))
    for step, (phase, graph) in enumerate(graphs.items()):
        built = builder.build_plan(
            work / f"{phase}.onnx",
            work / f"{phase}.plan",
            profiles=source.profiles(phase, graph),
            cache=out / TIMINGS,
            progress=_progress(report, phase, step, len(graphs)),
        )
        notes.append(_built(phase, built))
    return Plans(notes, sm)


def _save(graphs: Mapping[str, ir.Model], source: Graphs, work: Path) -> None:
    io.save_shared({f"{phase}.onnx": graph for phase, graph in graphs.items()}, work, weights=WEIGHTS[source.dtype])


def _progress(report: Report, phase: str, step: int, steps: int) -> Callable[[str, float], None]:
    return lambda what, fraction: report(f"{phase} plan: {what}", 0.36 + 0.09 * (step + fraction) / steps)


def _built(phase: str, plan: PlanReport) -> str:
    return (
        f"{phase}.plan: {plan.layers} layers, {plan.attentions} attentions"
        f"{' (decomposed: no fused kernel for this width)' if plan.decomposed else ''}, "
        f"{plan.seconds:.0f} s, {plan.peak_memory / 1e9:.1f} GB at peak"
    )


def _tokens(phase: str, context: int, least: int = 1) -> list[tuple[int, int, int]]:
    """(min, opt, max) tokens of each profile: whole prompts; or single tokens, then chunks of a long prompt."""
    if phase == "prefill":
        return [(least, max(least, min(context, 1024)), context)]
    return [(1, 1, 1), (1, 1, min(context, CHUNK))]


def _profile(model: ir.Model, tokens: tuple[int, int, int], context: int) -> Profile:
    """(min, opt, max) shapes of every dynamic input, by the names of its sizes.

    A paged cache has room for all tokens of all rows at most: the host makes its pool as small as it likes.
    """
    sizes = {"batch": BATCH, "tokens": tokens}
    inputs = {str(value.name): list(value.shape or []) for value in model.graph.inputs}
    if model.metadata_props.get(KIND_KEY) == PAGED:
        held = next(v for v in model.graph.outputs if v.name == "keep").shape
        heads = int(held[2])  # type: ignore[index, arg-type]
        entries = -(-context // int(model.metadata_props[PAGE_KEY]))
        pages = (1, BATCH[1] * heads * entries, BATCH[2] * heads * entries)
        sizes |= {"entries": (1, entries, entries), "pages": pages, "free": pages}
    return {
        name: tuple([d if isinstance(d, int) else sizes[str(d.value)][i] for d in shape] for i in range(3))  # type: ignore[misc]
        for name, shape in inputs.items()
        if not all(isinstance(d, int) for d in shape)
    }

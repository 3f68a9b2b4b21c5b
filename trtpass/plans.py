"""Plans of an engine: the prefill and decode graphs lowered for TensorRT-RTX and built ahead of time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from trtpass import io, rtx
from trtpass.errors import InputError
from trtpass.passes.cache import insert_cache
from trtpass.progress import Report

WEIGHTS = "weights.fp16.bin"
BATCH = (1, 1, 4)  # min, opt, max rows of a plan's profile


def write_plans(
    asked: Sequence[str],
    logits: str,
    dense: ir.Model,
    rewritten: ir.Model,
    work: Path,
    context: int,
    report: Report,
) -> tuple[list[str], tuple[str, ...]]:
    """Write ``prefill.plan`` and ``decode.plan`` beside the float16 graphs that they were built from.

    ``asked`` are compute capabilities such as ``89`` or ``SM89``; none means all that can be built. The cache has
    ``context`` slots a row: TensorRT needs a fixed capacity. Returns notes in words and the SMs.

    Raises:
        InputError: the package is missing, an SM is unknown, or the builder refuses the graph.
    """
    sm = tuple(name if name.startswith(("SM", "CURRENT")) else f"SM{name}" for name in asked) or rtx.SMS
    unknown = [name for name in sm if name not in rtx.OFFERED]
    if unknown:
        raise InputError(
            f"SM={unknown[0]}", f"one of {', '.join(rtx.OFFERED)}", "SM90 and SM100 are not offered by TensorRT-RTX"
        )
    if not rtx.available():
        raise InputError("the package tensorrt-rtx is not installed", fix=rtx.INSTALL)
    graphs = {
        phase: rtx.lower(insert_cache(source, phase, capacity=context, logits=logits), sm)
        for phase, source in (("prefill", rewritten), ("decode", dense))
    }
    io.save_shared({f"{phase}.onnx": graph for phase, graph in graphs.items()}, work, weights=WEIGHTS)
    notes = []
    for step, phase in enumerate(graphs):
        profile = _profile(graphs[phase], phase, context)

        def progress(what: str, fraction: float, phase: str = phase, step: int = step) -> None:
            report(f"{phase} plan: {what}", 0.36 + 0.045 * (step + fraction))

        built = rtx.build_plan(
            work / f"{phase}.onnx", work / f"{phase}.plan", compute_capabilities=sm, profile=profile, progress=progress
        )
        notes.append(
            f"{phase}.plan: {built.layers} layers, {built.attentions} attentions"
            f"{' (decomposed: no fused kernel for this width)' if built.decomposed else ''}, "
            f"{built.seconds:.0f} s, {built.peak_memory / 1e9:.1f} GB at peak"
        )
    keep = [s.attributes["max_keep_permille"].value for s in rewritten.graph if s.op_type == "SelectTokens"]
    if keep and max(keep) >= 1000:
        notes.append(
            "shapes are fixed: with max_keep=1 the plan computes on all tokens; give max_keep below 1 to save time"
        )
    elif keep:
        notes.append(
            f"at most {max(keep) / 10:g}% of the tokens are kept; a row that needs more is clamped, and then its "
            "`keep` is above its `count`"
        )
    return notes, sm


def _profile(model: ir.Model, phase: str, context: int) -> rtx.Profile:
    """(min, opt, max) shapes of every dynamic input."""
    most = context if phase == "prefill" else min(context, 512)
    tokens = (1, min(context, 1024), most) if phase == "prefill" else (1, 1, most)
    profile = {}
    for value in model.graph.inputs:
        shape = list(value.shape or [])
        if all(isinstance(d, int) for d in shape):
            continue
        profile[str(value.name)] = tuple(
            [d if isinstance(d, int) else (BATCH[i] if axis == 0 else tokens[i]) for axis, d in enumerate(shape)]
            for i in range(3)
        )
    return profile  # type: ignore[return-value]

"""The engine of an encoder, or of any graph that is no decoder: its own inputs and outputs, one graph, no cache.

``engines/<model>/<recipe>/`` then holds::

    dense.onnx      B: canonical, as raised                model.onnx   C: rewritten
    engine.onnx     E: lowered to cpu or portable          engine.batch1.onnx, .plan   E: one for each choice of sizes
    weights.bin     the weights of all of them             inputs.json, outputs.json, manifest.json
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from trtpass import io, passes
from trtpass.anchors import Anchors, find
from trtpass.build import DENSE, REWRITTEN, WEIGHTS, Job, save_example, write_graph
from trtpass.compare import run_onnx
from trtpass.encoder_checks import EncoderLadder
from trtpass.encoder_choices import reducing
from trtpass.encoder_inputs import (
    Probe,
    checked,
    choices,
    fix_sizes,
    name_sizes,
    noise,
    ports,
    read_probe,
    symbols,
)
from trtpass.encoders import streams
from trtpass.errors import InputError
from trtpass.manifest import Kind, Manifest, PassRecord
from trtpass.passes import Pass
from trtpass.passes.cache_policy import policy_of
from trtpass.passes.lower import counted, lower
from trtpass.plan_process import Profile
from trtpass.plans import TARGETS as PLANS
from trtpass.plans import Lower, Plans, write_plans
from trtpass.reduction.options import LOW_KEEP
from trtpass.runtime import ENGINE

if TYPE_CHECKING:
    from graphs import Recipe

_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)


def kind_of(recipe: Recipe, model: ir.Model, anchors: Anchors) -> Kind:
    """``decoder``: tokens in and nothing else, logits out. ``encoder``: any other graph with attention.

    Raises:
        InputError: no attention that is understood.
    """
    if not anchors.blocks:
        raise InputError(
            f"'{recipe.name}' is not a decoder that is understood, and no encoder: {'; '.join(anchors.missing[:4])}",
            "a graph input_ids [batch, sequence] -> logits, or another with attention that raises",
            "run `trtpass inspect` on the file",
        )
    if recipe.kind == "encoder":
        return "encoder"
    tokens = anchors.input_ids is not None and anchors.logits is not None
    return "decoder" if tokens and all(v.dtype in _INTEGERS for v in model.graph.inputs) else "encoder"


def default_passes(recipe: Recipe) -> tuple[str, ...]:
    """The recipe's own; but none for an ONNX file without token input, since those of ``resolve`` are a decoder's."""
    from graphs import DEFAULT_PASSES

    if recipe.kind == "decoder" and recipe.onnx is not None and recipe.default_passes == DEFAULT_PASSES:
        return recipe.default_passes if find(io.load(recipe.onnx)).input_ids is not None else ()
    return recipe.default_passes


def stem(sizes: Mapping[str, int]) -> str:
    """Of a plan's files: ``engine.batch1``; ``engine.fixed`` where the graph itself fixes every size."""
    return f"{ENGINE}.{'-'.join(f'{name}{n}' for name, n in sizes.items()) or 'fixed'}"


@dataclass(frozen=True)
class EncoderSource:
    """What plans are made from: the rewritten graph, once for each choice of its sizes."""

    rewritten: ir.Model
    sizes: Sequence[Mapping[str, int]]
    dtype: str = "float16"

    def graphs(self, lower: Lower) -> dict[str, ir.Model]:
        """The graphs by the stem of their files, lowered."""
        made = {}
        for sizes in self.sizes:
            graph = fix_sizes(self.rewritten, sizes)
            graph.metadata_props["trtpass.phase"] = stem(sizes)
            made[stem(sizes)] = lower(graph)
        return made

    def profiles(self, phase: str, graph: ir.Model) -> list[Profile]:
        """One without ranges: every size is fixed."""
        return [{}]


def build_encoder(job: Job) -> Manifest:
    """Rewrite, lower, prove and write into ``job.work``; see ``trtpass.build.build``.

    Raises:
        InputError: a pass that needs a decoder, a size that stays open, or what the target refuses.
    """
    request, work, report = job.request, job.work, job.report
    policy = policy_of(job.pipeline)
    if policy is not None:
        raise InputError(
            f"the cache policy {policy.name} on '{job.recipe.name}', an encoder: it has no cache",
            "a method of encoders",
        )
    name_sizes(job.model)
    probe = probe_for(job, job.model)
    chosen = choices(job.model, request.sizes) if request.target in PLANS else []
    if request.sizes and not chosen:
        choices(job.model, {**_open(job.model, probe), **request.sizes})  # a wrong name or number is refused
    report("writing weights", 0.25)
    io.save(job.model, work / DENSE, weights=WEIGHTS)
    dense = io.load(work / DENSE)
    report("rewriting", 0.30)
    rewritten = dense.clone()
    results = passes.run(rewritten, job.pipeline)
    added = [str(v.name) for v in rewritten.graph.inputs if str(v.name) not in probe.feed]
    if added:
        raise InputError(
            f"{', '.join(step.name for step in job.pipeline)}: the graph of '{job.recipe.name}' gets the input "
            f"'{added[0]}', and no engine of one graph has that yet",
            "methods of encoders, or a decoder with input_ids alone",
            "apply it with `trtpass rewrite`",
        )
    write_graph(rewritten, work / REWRITTEN)
    report(f"lowering to {request.target}", 0.35)
    lowered = _lower(job, rewritten, chosen)
    ladder = EncoderLadder(
        work, dense, rewritten, job.pipeline, results, probe, job.loaded.module, job.loaded.onnx
    )  # fmt: skip
    checks = ladder.checks(request.target, report, request.kernels, lowered.unbuilt)
    who, made = ladder.saved or ("onnxruntime", run_onnx(rewritten, work, probe.feed))
    save_example(work, probe.feed, {name: made[name] for name in ladder.outputs}, who)
    return job.manifest(
        lowered, checks, _records(job.pipeline, ladder),
        kind="encoder", context=0, variants=chosen,
        inputs={name: str(port) for name, port in ports(dense.graph.inputs).items()},
        outputs={name: str(port) for name, port in ports(rewritten.graph.outputs).items()},
    )  # fmt: skip


def _open(model: ir.Model, probe: Probe) -> dict[str, tuple[int, ...]]:
    """The symbolic sizes as the probe has them."""
    return {
        str(size): (count,)
        for value in model.graph.inputs
        for size, count in zip(value.shape or [], probe.feed[str(value.name)].shape, strict=True)
        if str(size) in symbols(model)
    }


def _lower(job: Job, rewritten: ir.Model, chosen: Sequence[Mapping[str, int]]) -> Plans:
    request = job.request
    if request.target in PLANS:
        source = EncoderSource(rewritten, chosen, request.dtype)
        plans = write_plans(request.target, request.sm, source, job.work, request.out, job.report)
        if any(getattr(step.options, "max_keep", 0) == 1.0 for step in job.pipeline):
            plans.notes.append(
                "shapes are fixed: with max_keep=1 a plan computes on all tokens; give max_keep below 1 to save time"
            )
        return plans
    lowered = lower(rewritten, request.target, request.kernels)
    write_graph(lowered.model, job.work / f"{ENGINE}.onnx")
    decisions = [(ENGINE, replace(d, reason=re.sub(r" \('.*'\)", "", d.reason))) for d in lowered.decisions]
    return Plans(counted(decisions), ())  # without the names of masks, which differ from layer to layer


def probe_for(job: Job, model: ir.Model) -> Probe:
    """Inputs of the checks: those of a file, else the recipe's examples, else seeded noise of two rows.

    Raises:
        InputError: a file that is no set of arrays for this graph, or a size that stays open.
    """
    if job.request.inputs is not None:
        return read_probe(job.request.inputs, model)
    if job.recipe.examples is not None:
        arrays = checked(job.recipe.examples(), ports(model.graph.inputs), f"the examples of '{job.recipe.name}'")
        return Probe(arrays, "the recipe's examples")
    return noise(model, job.request.sizes)


def _records(pipeline: Sequence[Pass], ladder: EncoderLadder) -> list[PassRecord]:
    anchors = find(ladder.dense)
    records = []
    for step, result in zip(pipeline, ladder.results, strict=True):
        layers = [site.layer for site in result.sites]
        record = PassRecord(
            name=step.name,
            options=step.describe(),
            sites=len(layers),
            layers=layers,
            near_misses=list(result.near_misses),
            notes=list(result.notes),
            warnings=list(result.warnings),
        )
        if reducing([result]) and ladder.tokens.keys() >= set(layers):
            _count(record, ladder, next(s for s in streams(anchors) if layers[0] in {b.layer for b in s.blocks}))
        records.append(record)
    return records


def _count(record: PassRecord, ladder: EncoderLadder, stream: Anchors) -> None:
    """What a pass kept of the tokens of its stream, in ``record``."""
    width = ladder.before[record.layers[0]]
    after = {layer: ladder.tokens[layer] for layer in record.layers}
    carried, now = [], width
    for block in stream.blocks:  # a site lies between attention and MLP of its block
        now = after.get(block.layer, now)
        carried.append(now)
    record.tokens = [width, *after.values()]
    record.kept = round(float(np.mean(carried)) / width, 6)
    record.pruned = round(1 - float(np.mean([ladder.kept[layer] for layer in record.layers])), 6)
    if now < LOW_KEEP * width and not record.warnings:
        record.warnings.append(f"{now} of {width} tokens are left: below {LOW_KEEP:.0%} quality is gone in the papers")

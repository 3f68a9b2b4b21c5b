"""From a model to a proved engine folder: export, raise, rewrite, cache, lower, check, write (docs/design.md).

``engines/<model>/<recipe>/`` then holds::

    dense.onnx      B: stateless, canonical, input_ids -> logits of every token
    model.onnx      C: rewritten; input_ids, lengths -> logits of each row's last token
    prefill.onnx    E: whole prompts into the cache        decode.onnx   E: tokens over the cache
    weights.bin     the weights of all of them             *.plan        TensorRT-RTX only
    inputs.json, outputs.json   what `polygraphy run model.onnx` is checked against
    tokenizer files, manifest.json
"""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir

from trtpass import io, passes
from trtpass.anchors import find
from trtpass.calibrate import read_drift
from trtpass.canonicalize import RaiseReport, canonicalize
from trtpass.compare import Ladder, Probe, run_onnx
from trtpass.errors import InputError
from trtpass.ir import dims
from trtpass.layers import carry_drift
from trtpass.manifest import Check, Checks, Manifest, PassRecord, artifact, versions
from trtpass.paged_checks import half_flips
from trtpass.passes import WHOLE_PROMPT_KEY, Pass, PassResult
from trtpass.passes.cache_policy import CachePolicy, policy_of
from trtpass.passes.kvzap import RECIPE_KEY
from trtpass.passes.logits import LastLogits
from trtpass.passes.lower import counted, lower
from trtpass.passes.paged_cache import PAGE
from trtpass.plans import DTYPES, Plans, Source, write_plans
from trtpass.plans import TARGETS as PLANS
from trtpass.progress import Report, silent
from trtpass.reduction.decoder_pass import SpanMethod
from trtpass.staging import staged
from trtpass.variants import sites_of

if TYPE_CHECKING:
    from graphs import Loaded, Recipe

TARGETS = ("cpu", "portable", "tensorrt-rtx", "tensorrt")
DEFAULT_CONTEXT = 8192  # tokens; for an ONNX file, which does not say
DENSE, REWRITTEN, WEIGHTS = "dense.onnx", "model.onnx", "weights.bin"
CARRIED = "policy.safetensors"  # the checkpoint of a cache policy


@dataclass(frozen=True)
class Request:
    """What to build.

    Args:
        model: a known name, a Hugging Face folder, or an ONNX file.
        passes: textual passes, or None for the recipe's own; an empty list is the dense engine.
        target: one of ``TARGETS``.
        sm: compute capabilities of a TensorRT-RTX plan, such as ``("SM89",)``; empty means all that can be built.
        out: folder of all engines.
        logits: ``last`` or ``all`` tokens from the engine's graphs.
        kernels: False leaves native kernels out of a CPU engine, for a machine that will not have their library.
        dtype: ``float16`` or ``bfloat16``, of a plan's weights, activations and cache.
        page: slots of a page, where a cache policy makes the cache paged.
        sizes: of an encoder: numbers for its open sizes. A plan is built for every choice of them.
        inputs: of an encoder: an ``.npz`` file with an array for each input, to check with.
    """

    model: str
    passes: Sequence[str] | None = None
    target: str = "cpu"
    sm: tuple[str, ...] = ()
    out: Path = Path("engines")
    logits: str = "last"
    kernels: bool = True
    dtype: str = "float16"
    page: int = PAGE
    sizes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    inputs: Path | None = None


def build(request: Request, report: Report = silent) -> tuple[Manifest, Path]:
    """Build, prove and write one engine; returns its manifest and folder.

    The folder appears whole or not at all. A failed check is in the manifest, not an exception. A graph that is no
    decoder becomes the engine of an encoder (``trtpass.encoder_build``).

    Raises:
        InputError: anything about the request, the model or the disk that is wrong.
    """
    from graphs import resolve
    from trtpass.encoder_build import build_encoder, default_passes, kind_of

    started = time.monotonic()
    _check_target(request)
    recipe = resolve(request.model)
    pipeline = [passes.parse(text) for text in (default_passes(recipe) if request.passes is None else request.passes)]
    policy = _check_pipeline(pipeline)
    folder = request.out / recipe.name / slug(pipeline, request.target)
    with staged(folder) as work:
        report("loading weights", 0.02)
        loaded = recipe.load()
        for step in pipeline:
            if isinstance(step, SpanMethod):
                step.check_length(loaded.context or DEFAULT_CONTEXT)
        model, raised = _canonical(recipe, loaded, report)
        job = Job(request, recipe, loaded, model, raised, pipeline, work, report, started)
        if kind_of(recipe, model, find(model)) == "encoder":
            manifest = build_encoder(job)
        else:
            manifest = _build_decoder(job, policy)
        manifest.write(work)
    return manifest, folder


@dataclass(frozen=True)
class Job:
    """A build in progress: what was asked for, the raised ``model``, and the folder that is being written."""

    request: Request
    recipe: Recipe
    loaded: Loaded
    model: ir.Model
    raised: RaiseReport
    pipeline: Sequence[Pass]
    work: Path
    report: Report
    started: float

    def manifest(self, lowered: Plans, checks: Checks, records: list[PassRecord], **own: Any) -> Manifest:
        """The manifest of what now lies in the folder; ``own``: the fields that only this kind of engine has."""
        self.report("hashing", 0.97)
        return Manifest(
            model=self.recipe.name,
            origin=self.request.model,
            passes=records,
            target=self.request.target,
            sm=list(lowered.sm),
            artifacts=[
                artifact(self.work, p)
                for p in sorted(self.work.iterdir())
                if p.is_file() and not p.name.startswith(".")
            ],
            checks=checks,
            lowering=lowered.notes,
            unbuilt=lowered.unbuilt,
            kernels=self.request.kernels,
            raised=self.raised.counts,
            near_misses=list(self.raised.near_misses),
            versions=versions(),
            seconds=round(time.monotonic() - self.started, 1),
            peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            **own,
        )


def _build_decoder(job: Job, policy: CachePolicy | None) -> Manifest:
    """Rewrite, cache, lower, prove and write into ``job.work``."""
    request, recipe, loaded, pipeline = job.request, job.recipe, job.loaded, job.pipeline
    work, report = job.work, job.report
    _refuse_sizes(request, recipe)
    context = loaded.context or DEFAULT_CONTEXT
    drift = read_drift(recipe)
    if drift is not None:
        carry_drift(job.model, drift)
    report("writing weights", 0.25)
    io.save(job.model, work / DENSE, weights=WEIGHTS)
    dense = io.load(work / DENSE)
    if policy is not None and context % request.page:
        raise InputError(
            f"pages of {request.page} slots for a context of {context} tokens", "a page size that divides it"
        )
    report("rewriting", 0.30)
    dense.metadata_props[RECIPE_KEY] = recipe.name
    rewritten = dense.clone()
    results = passes.run(rewritten, pipeline)
    for thing in policy.files().values() if policy is not None else ():
        thing.save(work / CARRIED)
    write_graph(_with_last_logits(rewritten), work / REWRITTEN)
    report(f"lowering to {request.target}", 0.35)
    lowered = _lower(request, dense, rewritten, policy, work, context, report)
    report("checking", 0.45)
    probe = probe_for(loaded, dense, pipeline)
    ladder = Ladder(work, dense, rewritten, pipeline, results, probe, loaded.module, loaded.onnx, page=request.page)
    checks = check_ladder(ladder, request.target, report, request.kernels, lowered.unbuilt)
    _save_example(ladder, work)
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(work)
    return job.manifest(
        lowered, checks, _records(pipeline, results, ladder),
        context=context,
        stop_ids=_stop_ids(loaded),
        whole_prompt=dict(rewritten.metadata_props).get(WHOLE_PROMPT_KEY),
        page=request.page if policy is not None else None,
    )  # fmt: skip


def slug(pipeline: Sequence[Pass], target: str) -> str:
    """Folder name of a recipe: passes with the options that differ from their defaults, then the target."""
    parts = []
    for step in pipeline:
        default = step.Options()
        given = {f.name: getattr(step.options, f.name) for f in fields(step.options)
                 if getattr(step.options, f.name) != getattr(default, f.name)}  # fmt: skip
        own = [f"{name}={Path(value).stem if name == 'weights' else value}" for name, value in given.items()]
        parts.append("_".join([step.name, *own]).replace(":", "-").replace("/", "-"))
    return ".".join(["+".join(parts) or "dense", target])


def _carried(step: Pass) -> dict[str, Any]:
    """Options for the manifest; what the pass read is in the engine's folder."""
    options = step.describe()
    if isinstance(step, CachePolicy):
        options.update(dict.fromkeys(step.files(), CARRIED))
    return options


def _check_pipeline(pipeline: Sequence[Pass]) -> CachePolicy | None:
    """The pipeline's cache policy, which is proved alone."""
    policy = policy_of(pipeline)
    if policy is not None and len(pipeline) > 1:
        raise InputError(
            f"passes {', '.join(p.name for p in pipeline)} in one engine",
            f"the cache policy {policy.name} alone: no proof covers it beside another method yet",
        )
    shorter = next((p for p in pipeline if isinstance(p, SpanMethod)), None)
    if shorter is not None and len(pipeline) > 1:
        raise InputError(
            f"passes {', '.join(p.name for p in pipeline)} in one engine",
            f"{shorter.name} alone: no proof covers it beside another method yet",
        )
    return policy


def _check_target(request: Request) -> None:
    if request.target not in TARGETS:
        raise InputError(f"target '{request.target}'", f"one of {', '.join(TARGETS)}")
    if request.sm and request.target not in PLANS:
        raise InputError(f"SM={','.join(request.sm)} with target '{request.target}'", "no SM: only plans have one")
    if request.dtype not in DTYPES:
        raise InputError(f"dtype '{request.dtype}'", f"one of {', '.join(DTYPES)}")
    if request.dtype != "float16" and request.target not in PLANS:
        raise InputError(f"dtype {request.dtype} with target '{request.target}'", "no dtype: only plans have one")


def _canonical(recipe: Recipe, loaded: Loaded, report: Report) -> tuple[ir.Model, RaiseReport]:
    """The model as ONNX, exported or read, and raised."""
    if loaded.module is not None and loaded.onnx is None and recipe.exporter is not None:
        report("exporting", 0.05)
        model = recipe.exporter(loaded)
    elif loaded.module is not None and loaded.onnx is None:
        from trtpass.export import export

        report("exporting", 0.05)
        model = export(loaded.module, loaded.config, context=loaded.context or DEFAULT_CONTEXT)
    elif loaded.onnx is not None:
        report("reading ONNX", 0.05)
        model = io.load(loaded.onnx)
    else:
        raise InputError(f"the recipe '{recipe.name}' has neither a torch module nor an ONNX file")
    report("raising", 0.20)
    return model, canonicalize(model)


def _refuse_sizes(request: Request, recipe: Recipe) -> None:
    if request.sizes or request.inputs is not None:
        raise InputError(
            f"--size or --inputs for '{recipe.name}', a decoder", "neither: a decoder has a context and its own probe"
        )


def _with_last_logits(model: ir.Model) -> ir.Model:
    copy = model.clone()
    LastLogits()(copy)
    return copy


def write_graph(model: ir.Model, path: Path) -> None:
    """Write a graph whose large weights already lie in the folder; nothing of them is copied."""
    onnx.save_model(ir.to_proto(model), str(path))


def _lower(
    request: Request,
    dense: ir.Model,
    rewritten: ir.Model,
    policy: CachePolicy | None,
    work: Path,
    context: int,
    report: Report,
) -> Plans:
    """Write the engine's graphs (and plans); returns the lowering decisions in words and the plan's SMs."""
    graphs = Source(dense, rewritten, context, request.logits, request.dtype, policy, request.page)
    if request.target in PLANS:
        return write_plans(request.target, request.sm, graphs, work, request.out, report)
    decisions = []
    for phase, graph in graphs.phases().items():
        lowered = lower(graph, request.target, request.kernels)
        write_graph(lowered.model, work / f"{phase}.onnx")
        decisions += [(phase, decision) for decision in lowered.decisions]
    return Plans(counted(decisions), ())


def probe_for(loaded: Loaded, dense: ir.Model, pipeline: Sequence[Pass]) -> Probe:
    """Two rows, long enough that every method prunes (a quarter above its dense limit), of text where there is some."""
    limits = [p.options.min_tokens + p.options.window for p in pipeline if hasattr(p.options, "min_tokens")]
    limits += [2 * p.options.window for p in pipeline if isinstance(p, CachePolicy)]
    limits += [p.least_tokens for p in pipeline if isinstance(p, SpanMethod)]
    dense_limit = max(*limits, 160) if limits else 160
    longest = min(loaded.context or DEFAULT_CONTEXT, dense_limit + dense_limit // 4 + 8)
    lengths = np.array([longest, max(longest - longest // 16, 1)], np.int32)
    rows = np.stack([token_row(loaded, dense, longest, seed) for seed in range(2)])
    rows[1, lengths[1] :] = 0
    return Probe(rows, lengths)


def token_row(loaded: Loaded, dense: ir.Model, count: int, seed: int) -> np.ndarray:
    """``count`` token ids: the public-domain text where it and a tokenizer are there, else seeded random ids."""
    from trtpass.corpus import LOCATIONS, text_corpus

    if loaded.tokenizer is not None and any(path.is_file() for path in LOCATIONS):
        text = text_corpus()
        start = 20_000 + seed * 12 * count
        ids = loaded.tokenizer(text[start : start + 12 * count], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= count:
            return np.array(ids[:count], np.int64)
    logits = find(dense).logits
    vocabulary = (dims(logits) or [2])[-1]
    return np.random.default_rng(seed).integers(0, vocabulary, count).astype(np.int64)


def check_ladder(
    ladder: Ladder, target: str, report: Report = silent, kernels: bool = True, unbuilt: str = ""
) -> Checks:
    """All three checks; a plan that cannot run here, or could not be built (``unbuilt``), says so."""
    report("checking torch = raised ONNX", 0.45)
    export = ladder.export()
    report("checking twin = rewritten ONNX", 0.60)
    rewrite = ladder.rewrite()
    report("checking rewritten ONNX = engine", 0.80)
    if unbuilt:
        engine = Check.not_run(f"there is no plan, only the graphs that TensorRT would read: {unbuilt}")
    elif target == "tensorrt":
        engine = Check.not_run(
            "`make test-gpu` on this machine compares plans with PyTorch; no plan is executed while it is built"
        )
    elif target == "tensorrt-rtx":
        engine = Check.not_run(
            "a TensorRT-RTX plan executes on a GPU only; `make test-gpu` on a machine with one runs this check. "
            f"Not proved here: float16 numbers, the fused kernels, and speed{_in_half(ladder)}"
        )
    else:
        engine = ladder.engine(target, kernels)
    return Checks(export=export, rewrite=rewrite, engine=engine)


def _in_half(ladder: Ladder) -> str:
    """How many of a policy's decisions change in a plan's precision, in words to be appended."""
    policy = policy_of(ladder.passes)
    if policy is None:
        return ""
    return "; " + half_flips(ladder, policy, next(r for r in ladder.results if r.name == policy.name))


def _save_example(ladder: Ladder, work: Path) -> None:
    """Inputs, and the outputs of torch where there is a torch model."""
    model = io.load(work / REWRITTEN)
    feed: dict[str, Any] = ladder.probe.feed(model)
    output = str(find(ladder.dense).logits.name)  # type: ignore[union-attr]
    logits = ladder.saved.logits if ladder.saved is not None else run_onnx(model, work, feed)[output]
    save_example(work, feed, {output: logits}, "torch" if ladder.saved is not None else "onnxruntime")


def save_example(folder: Path, feed: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray], runner: str) -> None:
    """Both in Polygraphy's own form, for ``polygraphy run model.onnx --load-inputs --load-outputs``."""
    from polygraphy.comparator import RunResults
    from polygraphy.json import save_json
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        save_json([dict(feed)], str(folder / "inputs.json"), description="inputs")
        results = RunResults()
        results.add([dict(outputs)], runner_name=runner)
        results.save(str(folder / "outputs.json"))


def _stop_ids(loaded: Loaded) -> list[int]:
    """Tokens that end a text, from the configuration and the tokenizer."""
    ids: set[int] = set()
    for source in (loaded.config, loaded.tokenizer):
        value = getattr(source, "eos_token_id", None)
        ids.update(value if isinstance(value, list) else [] if value is None else [int(value)])
    return sorted(ids)


def _records(pipeline: Sequence[Pass], results: Sequence[PassResult], ladder: Ladder) -> list[PassRecord]:
    records = []
    for step, result in zip(pipeline, results, strict=True):
        layers = [site.layer for site in result.sites]
        prunes = sites_of([result]) or isinstance(step, (CachePolicy, SpanMethod))
        kept = [ladder.kept[layer] for layer in layers if layer in ladder.kept] if prunes else []
        records.append(
            PassRecord(
                name=step.name,
                options=_carried(step),
                sites=len(layers),
                layers=layers,
                near_misses=list(result.near_misses),
                notes=list(result.notes),
                warnings=list(result.warnings),
                pruned=round(1 - float(np.mean(kept)), 6) if kept else None,
            )
        )
    return records

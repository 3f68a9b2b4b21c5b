"""Run the quality checks of an engine folder and write their results into its ``quality/``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from trtpass import io, layers
from trtpass.anchors import find
from trtpass.build import DENSE
from trtpass.corpus import text_corpus
from trtpass.errors import CheckFailed, InputError
from trtpass.manifest import NAME as MANIFEST
from trtpass.manifest import Manifest, Quality, versions
from trtpass.passes import Pass
from trtpass.passes.lower import TARGETS
from trtpass.progress import Report, silent
from trtpass.quality import plots
from trtpass.quality.local_error import local_error, summarize
from trtpass.quality.output import write
from trtpass.quality.plan import FULL, SHORT, Plan
from trtpass.quality.sides import Decode, Prefill, activations
from trtpass.quality.tasks import Sample, Tasks
from trtpass.text import Tokenizer
from trtpass.validate import pipeline_of, verify_files


def measure(
    engine_folder: Path, *, text: Path | None = None, short: bool = False, report: Report = silent
) -> dict[str, Any]:
    """Measure quality, dense against rewritten; write ``quality/`` and the manifest's ``quality``.

    Args:
        engine_folder: an engine with a pass that has a coverage, or of an encoder (``trtpass.quality.encoder_folder``).
        text: the text of the continuation task; None takes the public-domain one.
        short: the short form: two coverages, up to 2048 tokens, few samples.

    Returns:
        What ``quality/quality.json`` holds; docs/quality.md explains it.

    Raises:
        InputError: not such an engine, no tokenizer, a text or a context that is too short, matplotlib missing.
        CheckFailed: a file has changed since the engine was built, or the layers are not those that its options name.
    """
    if Manifest.read(engine_folder).kind == "encoder":
        from trtpass.quality import encoder_folder

        return encoder_folder.measure(engine_folder, text=text, short=short, report=report)
    return measure_plan(engine_folder, SHORT if short else FULL, text=text, report=report)


def measure_plan(
    folder: Path, plan: Plan, *, text: Path | None = None, report: Report = silent, threads: int | None = None
) -> dict[str, Any]:
    """``measure`` with a plan of its own."""
    started = time.monotonic()
    plots.need()
    manifest = Manifest.read(folder)
    pipeline = pipeline_of(manifest, folder)
    selecting = _selecting(pipeline)
    verify_files(folder, manifest)
    dense = io.load(folder / DENSE)
    plan = plan.fit(manifest.context)
    tasks = Tasks.make(Tokenizer.open(folder), text_corpus(text), plan)
    target = manifest.target if manifest.target in TARGETS else "cpu"
    own = pipeline[selecting].options
    used = _layers(dense, manifest, selecting, own)
    run = _Run(dense, pipeline, selecting, tasks, Decode(dense, target, threads), target, threads)

    work = [(Setting("dense", None), tasks)]
    work += [(Setting(f"coverage {c:g}", replace(own, coverage=c), True), tasks) for c in plan.sweep(own.coverage)]
    work += [(setting, tasks.without_longest()) for setting in _others(own, plan)]
    cost = [t.cost for _, t in work]
    rows: list[dict[str, Any]] = []
    reference: dict[str, Any] = {}
    for i, (setting, todo) in enumerate(work):
        done, share = sum(cost[:i]) / sum(cost), cost[i] / sum(cost)

        def tell(what: str, part: float, done: float = done, share: float = share, name: str = setting.name) -> None:
            report(f"{name}: {what}", 0.02 + 0.93 * (done + part * share))

        rows.append(run.setting(setting, todo, reference, tell))
        reference = reference or rows[0]
    report("coverage 0 is dense", 0.95)
    identity = run.identity(replace(own, coverage=0.0)) if 0.0 in (own.coverage, *plan.coverages) else None
    report("local error bound", 0.97)
    result = {
        "engine": {"model": manifest.model, "target": manifest.target, "measured_on": f"{target}, float32, CPU"},
        "options": pipeline[selecting].describe(),
        "layers": used,
        "text": text.name if text else "jargon-text",
        "continuation": plan.continuation,
        "settings": rows,
        "identity_max_abs": identity,
        "local_error": run.local_error(plan.bound_tokens),
        "versions": versions(),
    }
    result["seconds"] = round(time.monotonic() - started, 1)
    report("writing", 0.99)
    write(folder, result)
    _record(folder, manifest, rows, own.coverage, plan)
    return result


@dataclass(frozen=True)
class Setting:
    """One side: a name for reports, the selecting pass's options (None: dense), and whether it is part of the sweep."""

    name: str
    options: Any
    swept: bool = False


@dataclass
class _Run:
    """What stays the same from one setting to the next; ``first``: the dense side's logits after ``reference``."""

    dense: ir.Model
    pipeline: Sequence[Pass]
    selecting: int
    tasks: Tasks
    decode: Decode
    target: str
    threads: int | None
    first: np.ndarray | None = None

    def steps(self, options: Any) -> list[Pass]:
        """The pipeline with other options for the selecting pass; empty for None."""
        if options is None:
            return []
        steps = list(self.pipeline)
        steps[self.selecting] = type(steps[self.selecting])(options)
        return steps

    def prefill(self, options: Any) -> Prefill:
        return Prefill(self.dense, self.steps(options), self.target, self.threads)

    def setting(self, setting: Setting, tasks: Tasks, dense: dict[str, Any], tell: Report) -> dict[str, Any]:
        """All tasks on one side; ``dense`` is the row of the dense side (empty for itself)."""
        side = self.prefill(setting.options)
        described = None if setting.options is None else type(self.pipeline[self.selecting])(setting.options).describe()
        row: dict[str, Any] = {"name": setting.name, "swept": setting.swept, "options": described}
        row.update(passkey={}, text={}, kept={})
        spent = 0.0
        for kind, length, samples in tasks.all():
            logs, exact, kept = [], [], []
            for sample in samples:
                tell(f"{kind}, {length} tokens", spent / tasks.cost)
                read = side.run(sample.prompt, len(sample.target))
                if setting.options is None and sample is self.reference:
                    self.first = read.logits
                log_p, greedy = self.decode.log_probabilities(read, sample.target)
                logs.append(float(log_p.mean()))
                exact.append(bool(greedy.all()))
                kept.append({layer: float(share.mean()) for layer, share in read.kept.items()})
                spent += sample.cost
            entry: dict[str, Any] = {"samples": len(samples), "log_likelihoods": logs}
            entry.update(mean=float(np.mean(logs)), error=_error(logs))
            if kind == "passkey":
                entry["exact"] = sum(exact)
            if not np.isfinite(logs).all():
                label = samples[int(np.argmin(np.isfinite(logs)))].label
                raise CheckFailed(f"{setting.name}: the likelihood of '{label}' is not finite")
            base = dense.get(kind, {}).get(str(length))
            if base is not None:
                gaps = [a - b for a, b in zip(logs, base["log_likelihoods"], strict=True)]
                entry.update(change=float(np.mean(gaps)), change_error=_error(gaps))
            row[kind][str(length)] = entry
            if side.sites:
                row["kept"][f"{kind} {length}"] = {str(n): float(np.mean([k[n] for k in kept])) for n in kept[0]}
        return row

    @property
    def reference(self) -> Sample:
        """The prompt on which coverage 0 is compared with dense: the first document of the shortest context."""
        return self.tasks.documents[min(self.tasks.documents)][0]

    def identity(self, options: Any) -> float:
        """Largest difference of the logits after ``reference`` between coverage 0 and dense: the identity setting."""
        logits = self.prefill(options).run(self.reference.prompt, 1).logits
        return float(np.abs(logits - self.first).max())

    def local_error(self, tokens: int) -> dict[str, Any]:
        """m, bound and movement in every sparse layer, on the first document's context."""
        found = activations(self.dense, self.pipeline, self.tasks.bound)
        kept = {n: float(np.mean([len(s) for s in heads.sets])) / tokens for n, heads in found.items()}
        return {"tokens": tokens, "layers": summarize({n: local_error(heads) for n, heads in found.items()}, kept)}


def _selecting(pipeline: Sequence[Pass]) -> int:
    """The index of the pass that has a coverage.

    Raises:
        InputError: there is none.
    """
    for i, step in enumerate(pipeline):
        if hasattr(step.options, "coverage"):
            return i
    raise InputError(
        "this engine has no pass with a coverage, so there is nothing to compare with dense",
        "an engine built with -p token-sparse:coverage=...",
        "build one, for example trtpass build smollm2-135m",
    )


def _others(own: Any, plan: Plan) -> list[Setting]:
    """The engine's options with the other ``select`` and with the other ``mode``."""
    if not plan.compare or own.coverage == 0:
        return []
    select = "group" if own.select == "head" else "head"
    mode = "paper" if own.mode == "repo" else "repo"
    return [
        Setting(f"coverage {own.coverage:g}, select={select}", replace(own, select=select)),
        Setting(f"coverage {own.coverage:g}, mode={mode}", replace(own, mode=mode)),
    ]


def _layers(dense: ir.Model, manifest: Manifest, selecting: int, own: Any) -> dict[str, Any]:
    """Which layers the pass used, and that they are those that its options name with the drift that the graph carries.

    Raises:
        CheckFailed: they are not.
    """
    count, drift = len(find(dense).blocks), layers.carried_drift(dense)
    used = manifest.passes[selecting].layers
    wanted = list(layers.resolve(own.layers, count, drift))
    if used != wanted:
        raise CheckFailed(f"the engine's pass is in layers {used}", f"layers={own.layers}: {wanted}", "build again")
    rule = own.layers
    if rule == "auto":
        rule = "auto, which is all: the model has no drift calibration" if drift is None else "auto, which is drift:0.5"
    return {"rule": rule, "used": used, "of": count, "drift": drift}


def _error(values: Sequence[float]) -> float | None:
    """Standard error of the mean; None for fewer than two values."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def _record(folder: Path, manifest: Manifest, rows: Sequence[dict[str, Any]], own: float, plan: Plan) -> None:
    """Put the shortest continuation task at the engine's own coverage into the manifest."""
    length, documents = min(plan.documents)
    mine = next((r for r in rows if r["name"] == f"coverage {own:g}"), rows[0])
    manifest.quality = Quality(
        metric=f"log-likelihood a token of a {plan.continuation}-token continuation after {length} tokens "
        f"(nats, {documents} documents)",
        dense=rows[0]["text"][str(length)]["mean"],
        rewritten=mine["text"][str(length)]["mean"],
    )
    temporary = folder / ".manifest.json"
    temporary.write_text(manifest.model_dump_json(indent=2) + "\n")
    temporary.replace(folder / MANIFEST)

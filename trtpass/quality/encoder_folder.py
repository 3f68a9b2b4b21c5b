"""Quality of the engine of an encoder: its dense graph against its engine, on the recipe's real inputs.

For ``trtpass validate --quality``. Writes ``quality/`` into the folder and one line into the manifest.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trtpass import io
from trtpass.build import DENSE
from trtpass.encoder_engine import EncoderEngine
from trtpass.errors import CheckFailed, InputError
from trtpass.manifest import NAME as MANIFEST
from trtpass.manifest import Manifest, Quality, versions
from trtpass.progress import Report, silent
from trtpass.quality import encoder_photos, encoder_plots, encoder_speech, plots
from trtpass.quality.encoder_metrics import word_difference
from trtpass.quality.encoder_sides import Seen, Side
from trtpass.quality.output import FOLDER, RESULT
from trtpass.runtime import ENGINE
from trtpass.staging import replacing, staged
from trtpass.validate import pipeline_of, verify_files

Runner = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Sides:
    """Of an engine's folder: the dense graph, the engine, and the rewritten graph, which says what was carried."""

    dense: Runner
    engine: Runner
    rewritten: Side
    measured_on: str


@dataclass(frozen=True)
class Measured:
    """What a metric found: a cell for each sample, one number a side for the manifest, pictures by file name."""

    title: str
    note: str
    samples: dict[str, dict[str, float]]
    quality: Quality
    pictures: dict[str, bytes] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)


def measure(
    folder: Path, *, text: Path | None = None, short: bool = False, report: Report = silent, threads: int | None = None
) -> dict[str, Any]:
    """Measure the engine of an encoder; write ``quality/`` and the manifest's ``quality``.

    Args:
        folder: an engine of a recipe that has a metric (`METRICS`).
        text: refused: an encoder reads no text.
        short: one photo, or the first 30 s.

    Returns:
        What ``quality/quality.json`` holds.

    Raises:
        InputError: another model, a text, or an input or matplotlib that is not installed.
        CheckFailed: a file has changed since the engine was built, or an output is not finite.
    """
    started = time.monotonic()
    manifest = Manifest.read(folder)
    metric = METRICS.get(manifest.model)
    if metric is None:
        raise InputError(
            f"there is no quality metric for the encoder '{manifest.model}'", f"one of {', '.join(METRICS)}"
        )
    if text is not None:
        raise InputError(f"--text {text} for an encoder", "none: it reads images or sound")
    plots.need()
    verify_files(folder, manifest)
    report("opening graphs", 0.1)
    sides = _open(folder, manifest, threads)
    report("measuring", 0.4)
    found = metric(sides, short)
    result = {
        "encoder": "engine",
        "title": found.title,
        "note": found.note,
        "engine": {"model": manifest.model, "target": manifest.target, "measured_on": sides.measured_on},
        "passes": [step.model_dump() for step in manifest.passes],
        "samples": found.samples,
        **found.more,
        "versions": versions(),
        "seconds": round(time.monotonic() - started, 1),
    }
    with staged(folder / FOLDER) as work:
        (work / RESULT).write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        for name, data in found.pictures.items():
            (work / name).write_bytes(data)
    manifest.quality = found.quality
    data = (manifest.model_dump_json(indent=2) + "\n").encode()
    with replacing(folder / MANIFEST, len(data)) as handle:
        handle.write(data)
    return result


def _open(folder: Path, manifest: Manifest, threads: int | None) -> Sides:
    rewritten = Side(io.load(folder / DENSE), pipeline_of(manifest, folder), threads)
    dense = EncoderEngine.open({ENGINE: folder / DENSE}, threads=threads).run
    if (folder / f"{ENGINE}.onnx").is_file():
        return Sides(dense, EncoderEngine.open(folder, threads=threads).run, rewritten, "the engine's graph, CPU")
    words = "the rewritten graph, float32, CPU: there is no plan for this machine"
    return Sides(dense, lambda feed: rewritten.run(feed).outputs, rewritten, words)


def _finite(array: np.ndarray, what: str) -> np.ndarray:
    if not np.isfinite(array).all():
        raise CheckFailed(f"{what} holds NaN or infinity")
    return array


def heat_maps(sides: Sides, short: bool) -> Measured:
    """Heat maps of photos: correlation, and IoU at 0.5."""
    from graphs.dinov2_saliency import photos

    shown = dict(list(photos().items())[: 1 if short else None])
    inputs, output = encoder_photos.feeds(shown), encoder_photos.OUTPUT
    dense = {name: _finite(sides.dense(feed)[output], f"the dense heat map of {name}") for name, feed in inputs.items()}
    made = {name: _finite(sides.engine(feed)[output], f"the heat map of {name}") for name, feed in inputs.items()}
    seen = encoder_photos.look(sides.rewritten, inputs)
    samples = {}
    for name in shown:
        fit = encoder_photos.Fidelity.of(dense[name], made[name])
        samples[name] = {"correlation": fit.correlation, "iou": fit.iou, "kept": seen[name].kept}
    mean, overlap = (float(np.mean([cell[key] for cell in samples.values()])) for key in ("correlation", "iou"))
    maps = [(side, {name: one[0, 0] for name, one in of.items()}) for side, of in (("dense", dense), ("engine", made))]
    pictures = {"heat_maps.png": encoder_plots.heat_maps(shown, maps)}
    owners = {name: one.owner for name, one in seen.items() if one.owner is not None}
    if len(owners) == len(shown):
        pictures["tokens.png"] = encoder_plots.tokens(shown, [("tokens", patches(owners))], encoder_photos.GRID)
    metric = f"correlation with the dense heat map, mean over {len(shown)} photos (IoU at 0.5: {overlap:.3f})"
    return Measured(
        "heat maps, dense against engine", "kept: tokens carried, mean over blocks; iou: where at least 0.5", samples,
        Quality(metric=metric, dense=1.0, rewritten=mean), pictures,
    )  # fmt: skip


def patches(owners: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Owners `[patches]` of one row `[1, N]`, without the class token and what else stands in front."""
    return {name: owner[0, -(encoder_photos.GRID**2) :] for name, owner in owners.items()}


def transcripts(sides: Sides, short: bool) -> Measured:
    """The transcript of the speech: words that differ from the dense encoder's."""
    from graphs.whisper_tiny_en import features, speech, torch_module

    say, output = encoder_speech.voice(torch_module()), encoder_speech.OUTPUT
    windows = features(speech())[: 1 if short else None]
    samples, said = {}, {"dense": list[str](), "engine": list[str]()}
    for number, window in enumerate(windows):
        feed = {encoder_speech.INPUT: window[None]}
        for side, runner in (("dense", sides.dense), ("engine", sides.engine)):
            states = _finite(runner(feed)[output], f"the {side} output of window {number}")
            said[side].append(say(states))
        seen: Seen = sides.rewritten.run(feed)
        samples[f"window {number}"] = {
            "word difference": word_difference(said["dense"][number], said["engine"][number]),
            "kept": seen.kept,
        }
    whole = word_difference(" ".join(said["dense"]), " ".join(said["engine"]))
    metric = f"edits of words per word of the dense encoder's transcript, {30 * len(windows)} s of speech"
    return Measured(
        "transcripts, dense against engine", "greedy decoding; kept: tokens carried, mean over blocks", samples,
        Quality(metric=metric, dense=0.0, rewritten=whole), more={"said": said},
    )  # fmt: skip


METRICS: dict[str, Callable[[Sides, bool], Measured]] = {
    encoder_photos.RECIPE: heat_maps,
    encoder_speech.RECIPE: transcripts,
}

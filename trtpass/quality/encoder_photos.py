"""Heat-map fidelity of DINOv2 saliency: the heat map of each photo, rewritten against unchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from trtpass import passes
from trtpass.progress import Report, silent
from trtpass.quality.encoder_metrics import correlation, iou
from trtpass.quality.encoder_plan import Setting
from trtpass.quality.encoder_sides import Seen, Side

INPUT, OUTPUT = "input_image", "output_importance"
GRID = 16  # patches a side
RECIPE = "dinov2-saliency"


@dataclass(frozen=True)
class Fidelity:
    """Of one heat map: Pearson correlation, and intersection over union where it is at least 0.5."""

    correlation: float
    iou: float

    @staticmethod
    def of(dense: np.ndarray, rewritten: np.ndarray) -> Fidelity:
        return Fidelity(correlation(dense, rewritten), iou(dense, rewritten))


def feeds(photos: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """The inputs `[1, 3, 224, 224]` of RGB photos `[224, 224, 3]`."""
    from graphs.dinov2_saliency import normalised

    return {name: {INPUT: normalised(photo)[None]} for name, photo in photos.items()}


def canonical() -> ir.Model:
    """The graph in canonical form, from the installed package.

    Raises:
        InputError: it is not installed.
    """
    from graphs.dinov2_saliency import onnx_file
    from trtpass import io
    from trtpass.canonicalize import canonicalize

    model = io.load(onnx_file())
    canonicalize(model)
    return model


def look(side: Side, inputs: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Seen]:
    """What one side makes of each photo."""
    return {name: side.run(feed) for name, feed in inputs.items()}


def sweep(
    dense: ir.Model,
    photos: Mapping[str, np.ndarray],
    settings: Sequence[Setting],
    report: Report = silent,
    threads: int | None = None,
) -> list[dict[str, Any]]:
    """One row for each setting: means over photos and seeds, ``spread`` over seeds, and every photo.

    Args:
        dense: canonical, its weights in a file.
        photos: by name, RGB uint8 `[224, 224, 3]`.
    """
    inputs = feeds(photos)
    base = look(Side(dense, [], threads), inputs)
    rows = []
    for number, setting in enumerate(settings):
        runs = []
        for text in setting.passes:
            report(text, number / len(settings))
            seen = look(Side(dense, [passes.parse(text)], threads), inputs)
            runs.append({
                name: (Fidelity.of(base[name].outputs[OUTPUT], one.outputs[OUTPUT]), one.kept, one.last)
                for name, one in seen.items()
            })  # fmt: skip
        rows.append(_row(setting, runs))
    return rows


def _row(setting: Setting, runs: Sequence[Mapping[str, tuple[Fidelity, float, int]]]) -> dict[str, Any]:
    names = list(runs[0])
    by_run = [np.mean([[f.correlation, f.iou, kept, last] for f, kept, last in run.values()], 0) for run in runs]
    mean = np.mean(by_run, 0)
    return {
        "group": setting.group,
        "method": setting.method,
        "passes": list(setting.passes),
        "kept": round(float(mean[2]), 4),
        "last": round(float(mean[3]), 1),
        "correlation": round(float(mean[0]), 5),
        "iou": round(float(mean[1]), 5),
        "spread": [round(float(v), 5) for v in np.std(by_run, 0)[:2]] if len(runs) > 1 else None,
        "photos": {
            name: {
                "correlation": round(float(np.mean([run[name][0].correlation for run in runs])), 5),
                "iou": round(float(np.mean([run[name][0].iou for run in runs])), 5),
                "kept": round(float(np.mean([run[name][1] for run in runs])), 4),
            }
            for name in names
        },
    }

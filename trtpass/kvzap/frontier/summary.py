"""From the lines of a log to numbers a cell: means over prompts, changes against dense on the same prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

FIXED = ", fixed threshold"  # added to the name of a surrogate whose threshold comes from other text
PROBES = ("repeat", "continuation")


def summary(
    lines: Sequence[Mapping[str, Any]], surrogates: Mapping[str, Mapping[str, str]], asked: int
) -> dict[str, Any]:
    """What quality.json holds: of the prompts on which every policy was measured.

    Args:
        lines: of the log, the first of which is of the run.
        surrogates: name to file name and digest; lines of other checkpoints are left out.
        asked: number of prompts of the whole plan.

    Returns:
        The run, the surrogates, ``results[task][length][policy][cut]`` (cuts as text, ``"0"`` of ``dense``) and
        ``heads[policy]``: the kept fraction of each head `[L Hkv]` at the cut of the histogram, mean over texts.
    """
    chosen = [line for line in _latest(lines) if line["source"] == surrogates.get(line["policy"], {}).get("sha256", "")]
    done: dict[str, set[str]] = {}
    for line in chosen:
        done.setdefault(line["prompt"], set()).add(line["policy"])
    everything = set().union(*done.values(), surrogates)
    chosen = [line for line in chosen if done[line["prompt"]] == everything]
    dense = {line["prompt"]: line["points"][0] for line in chosen if line["policy"] == "dense"}
    cells: dict[tuple[str, str, str, str], list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    heads: dict[str, list[list[float]]] = {}
    for line in chosen:
        for point in line["points"]:
            name = line["policy"] + (FIXED if "threshold" in point else "")
            place = (line["task"], str(line["length"]), name, f"{point['cut']:g}")
            cells.setdefault(place, []).append((point, dense[line["prompt"]]))
            if "heads" in point and line["task"] == "text":
                heads.setdefault(name, []).append(point["heads"])
    results: dict[str, Any] = {}
    for (task, length, name, cut), pairs in cells.items():
        row = results.setdefault(task, {}).setdefault(length, {}).setdefault(name, {})
        row[cut] = _passkey(pairs) if task == "passkey" else _text(pairs)
    return {
        "run": lines[0]["run"],
        "prompts": {"measured": len({line["prompt"] for line in chosen}), "planned": asked},
        "surrogates": {name: dict(item) for name, item in surrogates.items()},
        "thresholds": {
            line["calibration"]: line["thresholds"]
            for line in lines
            if line.get("source") and line["source"] == surrogates.get(line.get("calibration", ""), {}).get("sha256")
        },
        "results": results,
        "heads": {name: np.mean(rows, axis=0).round(4).tolist() for name, rows in heads.items()},
        "seconds": round(sum(line["seconds"] for line in chosen), 1),
    }


def policies(result: Mapping[str, Any]) -> list[str]:
    """Every policy but dense, in the order of the first prompt's lines."""
    found: dict[str, None] = {}
    for groups in result["results"].values():
        for rows in groups.values():
            found.update(dict.fromkeys(rows))
    return [name for name in found if name != "dense"]


def _latest(lines: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One line for each prompt, policy and checkpoint."""
    return list({(line["prompt"], line["policy"], line["source"]): line for line in lines if "prompt" in line}.values())


def _passkey(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> dict[str, Any]:
    found = [point["passkey"]["exact"] for point, _ in pairs]
    means = [point["passkey"]["mean"] for point, _ in pairs]
    return {**_removed(pairs), "samples": len(pairs), "found": sum(found), "mean": float(np.mean(means))}


def _text(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> dict[str, Any]:
    cell: dict[str, Any] = {**_removed(pairs), "samples": len(pairs)}
    for probe in PROBES:
        values = [point[probe]["mean"] for point, _ in pairs]
        changes = [point[probe]["mean"] - base[probe]["mean"] for point, base in pairs]
        cell[probe] = {"mean": float(np.mean(values)), "error": _error(values), "change": float(np.mean(changes)),
                       "change_error": _error(changes)}  # fmt: skip
    return cell


def _removed(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> dict[str, Any]:
    return {"removed": float(np.mean([point["removed"] for point, _ in pairs]))}


def _error(values: Sequence[float]) -> float | None:
    """Standard error of the mean over prompts; None for one prompt."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None

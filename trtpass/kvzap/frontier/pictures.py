"""Pictures of a frontier, as PNG bytes: quality over the fraction removed, and how uneven the heads are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trtpass.kvzap.frontier.summary import FIXED, policies
from trtpass.quality import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_COLOURS = (
    "#1b6ca8",
    "#7a4fa3",
    "#111111",
    "#d1603d",
    "#c9a227",
    "#3c8d5a",
    "#999999",
    "#d98cb3",
    "#5bb5c5",
    "#8c564b",
)
_MARKERS = "osD^vP*Xhd"
_FLOOR = -3.0  # changes below it are drawn at it: what is lost is lost


def all_of(result: Mapping[str, Any]) -> dict[str, bytes]:
    """File name to picture: one for each question, one of heads where a policy recorded them."""
    made = {}
    for task, probe, title in (
        ("passkey", "passkey", "pass keys found"),
        ("text", "repeat", "repeated text: change, nats a token"),
        ("text", "continuation", "continuation: change, nats a token"),
    ):
        if task in result["results"]:
            made[f"frontier_{probe}.png"] = _frontier(result, task, probe, title)
    if result["heads"]:
        made["frontier_heads.png"] = _heads(result)
    return made


def _frontier(result: Mapping[str, Any], task: str, probe: str, title: str) -> bytes:
    """One question: a column for each length, one scale."""
    groups = sorted(result["results"][task].items(), key=lambda item: int(item[0]))
    figure, axes = _figure(len(groups), 3.4, 4.2)
    lines: dict[str, Line2D] = {}
    for axis, (length, rows) in zip(axes, groups, strict=True):
        plots.finish(axis)  # before there is anything for a legend: the figure has one for all columns
        for i, name in enumerate(n for n in policies(result) if not n.endswith(FIXED)):
            cells = sorted((float(cut), cell) for cut, cell in rows.get(name, {}).items())
            if cells:
                xs = [0.0, *(cut for cut, _ in cells)]
                ys = [_value(cell, probe) for cell in (rows["dense"]["0"], *(cell for _, cell in cells))]
                style: dict[str, Any] = {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)]}
                (lines[name],) = axis.plot(xs, ys, markersize=5, linewidth=1.3, **style)
        axis.set(title=f"{length} tokens (prompts: {rows['dense']['0']['samples']})", xlabel="fraction removed")
        if probe == "passkey":
            axis.set_ylim(-0.05, 1.05)
    axes[0].set_ylabel(title)
    figure.legend(
        list(lines.values()), list(lines), loc="outside lower center", ncols=2 * len(groups), fontsize=9, frameon=False
    )
    return plots.png(figure)


def _value(cell: Mapping[str, Any], probe: str) -> float:
    if probe == "passkey":
        return float(cell["found"] / cell["samples"])
    return max(float(cell[probe]["change"]), _FLOOR)


def _heads(result: Mapping[str, Any]) -> bytes:
    """Number of KV heads over the fraction of their keys that stays."""
    chosen = [name for name in policies(result) if name in result["heads"] and name not in ("random", "streaming-llm")]
    figure, axes = _figure(len(chosen), 3.2, 3.2)
    axes[0].set_ylabel("KV heads")
    for axis, name in zip(axes, chosen, strict=True):
        values = result["heads"][name]
        axis.hist(values, bins=20, range=(0.0, 1.0), color=_COLOURS[0])
        axis.axvline(sum(values) / len(values), color="black", linewidth=0.8, linestyle=":")
        axis.set(title=name, xlabel="kept fraction of a head")
        plots.finish(axis)
    return plots.png(figure)


def _figure(columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns + 0.2, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, columns, squeeze=False, sharey=True)[0])

"""Pictures of encoders that carry fewer tokens, as PNG bytes: sweeps, heat maps, and which tokens merged."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from trtpass.quality import plots
from trtpass.quality.encoder_plan import ALONG, EVERY, ONE, OWN, SCC

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]

_COLOURS = ("#1b6ca8", "#d1603d", "#3c8d5a", "#7a4fa3", "#c9a227", "#5bb5c5", "#d98cb3", "#8c564b")
_MARKERS = "os^DvPXh"
_GOLDEN = 0.61803398875  # of a turn: hues of successive groups lie far apart
_CONTROLS = (("#444444", "x", "--"), ("#888888", "+", ":"), ("#b0a898", "1", "-."))
_TINT, _DARK = 0.55, 0.15
_MOST = 1.25  # word differences above it are not drawn: nothing is left of the transcript


def photos(rows: Rows) -> bytes:
    """Correlation and IoU over the kept fraction, a column for each group."""
    groups = [(EVERY, "the same share in every block"), (OWN, "layers as published"), (SCC, "components, one block")]
    figure, axes = _grid(2, 3, 13.0, 8.4)
    for column, (group, title) in enumerate(groups):
        for line, (name, words) in enumerate((("correlation", "Pearson correlation"), ("iou", "IoU at 0.5"))):
            axis = axes[line][column]
            _lines(axis, [row for row in rows if row["group"] == group], "kept", name, line)
            axis.set(ylabel=words, ylim=(-0.05, 1.03), xlim=(1.02, 0.22), title=title if not line else "")
            axis.set_xlabel("kept fraction of tokens, mean over blocks")
            plots.finish(axis)
    return plots.png(figure)


def speech(rows: Rows, tokens: int) -> bytes:
    """Word difference over the kept fraction, and over what is left at the end, a column for each group."""
    figure, axes = _grid(2, 2, 13.0, 8.4)
    shown = [{**row, "share": row["last"] / tokens} for row in rows]
    overs = (
        ("kept", "kept fraction of tokens, mean over blocks"),
        ("share", "tokens at the end, share of all"),
    )
    for column, (group, title) in enumerate(((ALONG, "every block"), (ONE, "one block"))):
        for line, (over, words) in enumerate(overs):
            axis = axes[line][column]
            _lines(axis, [row for row in shown if row["group"] == group], over, "difference")
            axis.set(ylim=(-0.03, _MOST), xlim=(1.02, 0.0), title=title if not line else "", xlabel=words)
            axis.set_ylabel("word difference from the unmerged")
            plots.finish(axis)
    return plots.png(figure)


def tokens(
    photographs: Mapping[str, np.ndarray], columns: Sequence[tuple[str, Mapping[str, np.ndarray]]], grid: int
) -> bytes:
    """Photos with the patches that ended in one token in one colour, and the dropped ones dark.

    Args:
        photographs: by name, RGB uint8 `[side, side, 3]`.
        columns: title and, by photo, owners int32 `[patches]` row by row.
        grid: patches a side.
    """
    figure, axes = _grid(len(photographs), len(columns) + 1, 2.1 * (len(columns) + 1), 2.25 * len(photographs))
    for line, (name, photo) in zip(axes, photographs.items(), strict=True):
        _picture(line[0], photo, name)
        for axis, (title, owners) in zip(line[1:], columns, strict=True):
            owner = owners[name].reshape(grid, grid)
            left = len(np.unique(owner[owner >= 0]))
            _picture(axis, overlay(photo, owner), f"{title}\n{left} of {owner.size} patches' tokens")
    return _small(plots.png(figure))


def overlay(photo: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """``photo`` `[side, side, 3]` uint8 with the groups of ``owner`` `[rows, columns]` (-1: dropped) drawn over it."""
    side = photo.shape[0] // owner.shape[0]
    shown = photo.astype(np.float32) / 255
    large = owner.repeat(side, 0).repeat(side, 1)
    values, counts = np.unique(owner, return_counts=True)
    shown[large < 0] *= _DARK
    for number, (value, count) in enumerate(zip(values, counts, strict=True)):
        if value >= 0 and count > 1:
            colour = np.array(colorsys.hsv_to_rgb(number * _GOLDEN % 1.0, 0.85, 1.0), np.float32)
            here = large == value
            shown[here] = (1 - _TINT) * shown[here] + _TINT * colour
    edge = np.zeros(large.shape, bool)
    edge[1:] |= large[1:] != large[:-1]
    edge[:, 1:] |= large[:, 1:] != large[:, :-1]
    shown[edge] = 1.0
    return (shown * 255).round().astype(np.uint8)


def heat_maps(photographs: Mapping[str, np.ndarray], columns: Sequence[tuple[str, Mapping[str, np.ndarray]]]) -> bytes:
    """Photos beside heat maps `[side, side]` of 0 to 1, by title and photo."""
    figure, axes = _grid(len(photographs), len(columns) + 1, 2.4 * (len(columns) + 1), 2.5 * len(photographs))
    for line, (name, photo) in zip(axes, photographs.items(), strict=True):
        _picture(line[0], photo, name)
        for axis, (title, maps) in zip(line[1:], columns, strict=True):
            _picture(axis, maps[name], title, vmin=0.0, vmax=1.0, cmap="inferno")
    return plots.png(figure)


def _lines(axis: Axes, rows: Rows, over: str, what: str, of_spread: int = 0) -> None:
    """One line for each method; controls grey and dashed, with the spread over their seeds."""
    methods = list(dict.fromkeys(str(row["method"]) for row in rows))
    controls = [method for method in methods if method.startswith("random")]
    coloured = [method for method in methods if method not in controls]
    for method in methods:
        own = sorted((row for row in rows if row["method"] == method), key=lambda row: -row[over])
        xs, ys = [row[over] for row in own], [row[what] for row in own]
        if method in coloured:
            i = coloured.index(method)
            style: dict[str, Any] = {"color": _COLOURS[i % 8], "marker": _MARKERS[i % 8]}
            axis.plot(xs, ys, label=method, markersize=5, linewidth=1.5, **style)
            continue
        spread = [np.atleast_1d(row["spread"] if row["spread"] is not None else [0.0, 0.0])[of_spread] for row in own]
        colour, marker, line = _CONTROLS[controls.index(method) % 3]
        axis.errorbar(xs, ys, spread, label=method, color=colour, marker=marker, linestyle=line, capsize=2)


def _grid(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, [list(line) for line in axes]


def _small(picture: bytes) -> bytes:
    """A PNG with a palette of 256 colours: a quarter of the size, where photos are shown."""
    from PIL import Image  # which matplotlib needs as well

    buffer = BytesIO()
    with Image.open(BytesIO(picture)) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _picture(axis: Axes, image: np.ndarray, title: str, **style: Any) -> None:
    axis.imshow(image, interpolation="nearest", **style)
    axis.set_title(title, fontsize=8)
    axis.set_axis_off()

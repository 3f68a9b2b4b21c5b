"""Pictures of the results, as PNG bytes (matplotlib without a display)."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from trtpass.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#1b6ca8", "#d1603d", "#3c8d5a", "#7a4fa3")
_MARKERS = ("o", "s", "^", "D")


def need() -> None:
    """Raise unless matplotlib is installed.

    Raises:
        InputError: it is not.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(
            "the package 'matplotlib' is not installed",
            "it, for the pictures of --quality",
            "pip install 'trtpass[plot]'",
        ) from error


def sweep(result: dict[str, Any]) -> bytes:
    """Pass keys, change of the likelihood, and kept fraction, over coverage."""
    figure, axes = _figure(3, 12.0, 3.9)
    rows = _swept(result)
    xs = [r["options"]["coverage"] for r in rows]
    for i, n in enumerate(result["settings"][0]["passkey"]):
        rates = [r["passkey"][n]["exact"] / r["passkey"][n]["samples"] for r in rows]
        dense = result["settings"][0]["passkey"][n]
        axes[0].plot(xs, rates, label=f"{n} tokens (dense {dense['exact']}/{dense['samples']})", **_style(i))
    axes[0].set(ylim=(-0.05, 1.05), ylabel="pass keys found", title="Pass-key retrieval")
    for i, n in enumerate(result["settings"][0]["text"]):
        entries = [r["text"][n] for r in rows]
        axes[1].errorbar(
            xs, [e["change"] for e in entries], [e["change_error"] or 0.0 for e in entries], capsize=3,
            label=f"after {n} tokens ({entries[0]['samples']} documents)", **_style(i),
        )  # fmt: skip
        shares = [list(r["kept"][f"text {n}"].values()) for r in rows]
        axes[2].plot(xs, [sum(s) / len(s) for s in shares], label=f"{n} tokens", **_style(i))
    axes[1].axhline(0, color="black", linewidth=0.8)
    axes[1].set(ylabel="change against dense, nats a token", title=f"Next {result['continuation']} tokens of a text")
    axes[2].set(ylim=(-0.02, 1.05), ylabel="kept fraction, mean over sparse layers", title="Tokens kept")
    for axis in axes:
        axis.set_xscale("log")
        axis.set_xticks(xs, [f"{x:g}" for x in xs], rotation=45, fontsize=8)
        axis.minorticks_off()
        axis.set_xlabel("coverage")
        finish(axis)
    return png(figure)


def layers(result: dict[str, Any]) -> bytes:
    """Kept fraction of each layer at each coverage, at the longest context; and the local error of each layer."""
    figure, axes = _figure(2, 12.0, 4.2)
    rows = _swept(result)
    longest = max(result["settings"][0]["text"], key=int)
    names = list(rows[0]["kept"][f"text {longest}"])
    import matplotlib

    shades = matplotlib.colormaps["viridis"]
    for i, row in enumerate(rows):
        colour = shades(0.9 * i / max(len(rows) - 1, 1))
        axes[0].plot(names, list(row["kept"][f"text {longest}"].values()), color=colour, marker="o", markersize=3,
                     label=f"coverage {row['options']['coverage']:g}")  # fmt: skip
    axes[0].set(
        ylim=(-0.02, 1.05), xlabel="layer", ylabel="kept fraction, mean over heads", title=f"Text, {longest} tokens"
    )
    local = result["local_error"]
    names = [str(r["layer"]) for r in local["layers"]]
    for i, (key, label) in enumerate(
        (("mass", "m, dropped mass"), ("bound", "bound 2 m max|v|"), ("moved", "|Δo|, measured"))
    ):
        style: dict[str, Any] = {"color": _COLOURS[i], "marker": _MARKERS[i], "markersize": 4}
        axes[1].plot(names, [r[key][0] for r in local["layers"]], label=f"{label}: median", **style)
        axes[1].plot(names, [r[key][2] for r in local["layers"]], linestyle=":", label="99%", **style)
    axes[1].set_yscale("symlog", linthresh=1e-4)
    axes[1].set(
        xlabel="layer",
        ylabel="over heads and kept queries",
        title=f"Local error of kept queries, {local['tokens']} tokens",
    )
    for axis in axes:
        axis.tick_params(axis="x", labelsize=8)
        finish(axis, below=True)
    return png(figure)


def _swept(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [r for r in result["settings"] if r["swept"]]


def _figure(columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, columns))


def _style(i: int) -> dict[str, Any]:
    return {"color": _COLOURS[i % 4], "marker": _MARKERS[i % 4], "markersize": 5, "linewidth": 1.5}


def finish(axis: Axes, below: bool = False) -> None:
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if axis.get_legend_handles_labels()[0]:
        place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 3} if below else {}
        axis.legend(fontsize=8, frameon=False, **place)


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return buffer.getvalue()

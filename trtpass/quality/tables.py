"""The results as tables: for a terminal, and as rows of text for the HTML page."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class Grid:
    """A table of text with a title and a line that says how to read it."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def render(result: dict[str, Any]) -> Group:
    """Tables for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text  # plain: brackets in a cell are not markup

    if "policy" in result:  # of a cache policy
        from trtpass.quality import cache

        parts: list[Any] = []
        shown = list(cache.grids(result))
    elif "encoder" in result:
        from trtpass.quality import encoder_tables

        parts, shown = [], encoder_tables.grids(result)
    else:
        parts, shown = [*map(Text, facts(result)), ""], grids(result)
    for grid in shown:
        table = Table(*grid.header, pad_edge=False)
        for column in table.columns[1:]:
            column.justify = "right"
        for row in grid.rows:
            table.add_row(*map(Text, row))
        parts += [Text(grid.title, style="bold"), table, Text(grid.note), ""]
    return Group(*parts)


def markdown(tables: Iterable[Grid]) -> str:
    """Tables as Markdown."""
    parts = []
    for grid in tables:
        rows = ["| " + " | ".join(cells) + " |" for cells in grid.rows]
        marks = "| --- |" + " ---: |" * (len(grid.header) - 1)
        parts.append(
            "\n".join([f"**{grid.title}** ({grid.note})", "", "| " + " | ".join(grid.header) + " |", marks, *rows])
        )
    return "\n\n".join(parts) + "\n"


def facts(result: dict[str, Any]) -> list[str]:
    """What was measured, in lines."""
    engine, layers = result["engine"], result["layers"]
    lines = [
        f"{engine['model']}, {engine['target']}; measured on: {engine['measured_on']}; text: {result['text']}",
        f"sparse layers: {', '.join(map(str, layers['used']))} ({len(layers['used'])} of {layers['of']}), "
        f"by {layers['rule']}",
    ]
    if result["identity_max_abs"] is not None:
        lines.append(f"coverage 0 against dense: logits differ by at most {result['identity_max_abs']:.1e}")
    return lines


def grids(result: dict[str, Any]) -> list[Grid]:
    """All tables, in the order of reading."""
    return [_passkeys(result), _texts(result), _kept(result), _local(result)]


def _lengths(result: dict[str, Any], kind: str) -> list[str]:
    return list(result["settings"][0][kind])


def _passkeys(result: dict[str, Any]) -> Grid:
    lengths = _lengths(result, "passkey")

    def cell(entry: dict[str, Any] | None) -> str:
        return "-" if entry is None else f"{entry['exact']}/{entry['samples']} ({entry['mean']:+.3f})"

    return Grid(
        "pass key found (greedy, exact)",
        "in brackets: mean log-likelihood of a token of the key, nats; -: not measured",
        ("setting", *(f"{n} tokens" for n in lengths)),
        tuple((r["name"], *(cell(r["passkey"].get(n)) for n in lengths)) for r in result["settings"]),
    )


def _texts(result: dict[str, Any]) -> Grid:
    lengths = _lengths(result, "text")

    def cell(entry: dict[str, Any] | None) -> str:
        if entry is None:
            return "-"
        if "change" not in entry:
            return f"{entry['mean']:.4f}{_error(entry['error'])}"
        return f"{entry['change']:+.4f}{_error(entry['change_error'])}"

    counts = ", ".join(str(result["settings"][0]["text"][n]["samples"]) for n in lengths)
    return Grid(
        f"log-likelihood a token of the {result['continuation']} tokens after a context (nats)",
        f"dense: mean; others: change against dense on the same {counts} documents; ± standard error over documents",
        ("setting", *(f"after {n}" for n in lengths)),
        tuple((r["name"], *(cell(r["text"].get(n)) for n in lengths)) for r in result["settings"]),
    )


def _kept(result: dict[str, Any]) -> Grid:
    rows = [r for r in result["settings"] if r["kept"]]
    columns = [f"{kind} {n}" for kind in ("passkey", "text") for n in _lengths(result, kind)]

    def cell(kept: dict[int, float] | None) -> str:
        if kept is None:
            return "-"
        values = list(kept.values())
        return f"{sum(values) / len(values):.3f} [{min(values):.2f}, {max(values):.2f}]"

    return Grid(
        "kept fraction of the tokens in sparse layers",
        "mean over layers [least, most layer]; each layer is in quality.json and in the picture",
        ("setting", *columns),
        tuple((r["name"], *(cell(r["kept"].get(c)) for c in columns)) for r in rows),
    )


def _local(result: dict[str, Any]) -> Grid:
    local = result["local_error"]

    def cells(values: list[float]) -> str:
        return " ".join(f"{v:.1e}" for v in values)

    return Grid(
        f"local error of kept queries at the engine's own coverage, {local['tokens']} tokens",
        "each cell: median, 90%, 99%, largest over heads and kept queries. m: softmax mass of the dropped visible keys "
        "under full attention; |Δo| <= 2 m max|v|. Not covered: queries that were dropped (their output is 0), and how "
        "layers add up",
        ("layer", "kept", "m", "2 m max|v|", "|Δo|", "|Δo| / |o|"),
        tuple(
            (str(r["layer"]), f"{r['kept']:.3f}", *(cells(r[name]) for name in ("mass", "bound", "moved", "relative")))
            for r in local["layers"]
        ),
    )


def _error(value: float | None) -> str:
    return "" if value is None else f" ± {value:.4f}"

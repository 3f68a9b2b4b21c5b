"""Results of encoders as tables, for a terminal, a page of Markdown, and HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trtpass.quality.encoder_plan import ALONG, EVERY, ONE, OWN, PARTS, SCC
from trtpass.quality.tables import Grid

Rows = Sequence[Mapping[str, Any]]

FRACTIONS = (0.9, 0.75, 0.6, 0.5, 0.4, 0.25)
_NEAR = 0.015  # a kept fraction that is further from its column's says so in the cell
_PAIR = "each cell: correlation / IoU at 0.5, mean over photos; ± standard deviation over seeds"


def grids(result: Mapping[str, Any]) -> list[Grid]:
    """The tables of a result of ``trtpass.quality.encoder``, or of the quality of one engine."""
    if result["encoder"] == "engine":
        return [_engine(result)]
    rows = result["rows"]

    def of(group: str) -> Rows:
        return [row for row in rows if row["group"] == group]

    if result["encoder"] == "speech":
        return [
            _spoken(of(ALONG), "Word difference, tokens merged in every block"),
            _spoken(of(ONE), "Word difference, tokens merged once"),
        ]
    return [
        _by_fraction(of(EVERY), "Heat maps, the same share kept in every block", _PAIR),
        _by_fraction(of(OWN), "Heat maps, blocks as published", _PAIR + "; -: not reached in these blocks"),
        _listed(of(SCC), "Heat maps, connected components in one block"),
        _parts(of(PARTS), "Heat maps, what goes against what becomes of it: 16 tokens in every block, 0.6 kept"),
    ]


def methods(rows: Rows) -> list[str]:
    """Methods in the order in which they were measured."""
    return list(dict.fromkeys(str(row["method"]) for row in rows))


def _pair(row: Mapping[str, Any]) -> str:
    spread = row["spread"]
    sides = (("correlation", 3), ("iou", 2))
    return " / ".join(
        f"{row[name]:.{digits}f}" + (f" ± {spread[i]:.{digits}f}" if spread else "")
        for i, (name, digits) in enumerate(sides)
    )


def _by_fraction(rows: Rows, title: str, note: str) -> Grid:
    def cell(method: str, fraction: float) -> str:
        near = [r for r in rows if r["method"] == method and _column(r["kept"]) == fraction]
        if not near:
            return "-"
        row = min(near, key=lambda r: abs(r["kept"] - fraction))
        return _pair(row) + ("" if abs(row["kept"] - fraction) <= _NEAR else f" at {row['kept']:.2f}")

    header = ("kept", *(f"{fraction:g}" for fraction in FRACTIONS))
    return Grid(title, note, header, tuple((m, *(cell(m, f) for f in FRACTIONS)) for m in methods(rows)))


def _column(kept: float) -> float:
    return min(FRACTIONS, key=lambda fraction: abs(kept - fraction))


def _setting(row: Mapping[str, Any]) -> str:
    text = str(row["passes"][0])
    seeds = len(row["passes"])
    return f"`{text}`" if seeds == 1 else f"`{text.rpartition(',seed=')[0]}`, {seeds} seeds"


def _listed(rows: Rows, title: str) -> Grid:
    made = tuple((_setting(row), f"{row['kept']:.3f}", f"{row['last']:.0f}", _pair(row)) for row in rows)
    return Grid(title, _PAIR, ("setting", "kept", "tokens at the end", "correlation / IoU"), made)


def _parts(rows: Rows, title: str) -> Grid:
    cells = {tuple(str(row["method"]).split(", ", 1)): _pair(row) for row in rows}
    lines, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    made = tuple((line, *(cells[line, column] for column in columns)) for line in lines)
    return Grid(title, "each cell: correlation / IoU at 0.5, mean over photos", ("", *columns), made)


def _spoken(rows: Rows, title: str) -> Grid:
    def cell(row: Mapping[str, Any]) -> str:
        spread = row["spread"]
        return f"{row['difference']:.3f}" + ("" if spread is None else f" ± {spread:.3f}")

    made = tuple(
        (_setting(row), f"{row['kept']:.3f}", f"{row['last']:.0f}", f"{row['keys']:.0f}", cell(row)) for row in rows
    )
    note = "edits of words per word of the unmerged transcript; ± standard deviation over seeds"
    header = ("setting", "kept", "tokens at the end", "keys of cross attention", "word difference")
    return Grid(title, note, header, made)


def _engine(result: Mapping[str, Any]) -> Grid:
    rows = []
    for name, cell in result["samples"].items():
        rows.append((name, *(f"{value:.4f}" for value in cell.values())))
    columns = next(iter(result["samples"].values()))
    return Grid(result["title"], result["note"], ("", *columns), tuple(rows))

"""The folder ``quality/`` of an engine: quality.json, PNG pictures, and one HTML page that holds them all."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

from trtpass.quality import plots
from trtpass.quality.tables import Grid, facts, grids
from trtpass.staging import staged

FOLDER, RESULT, PAGE = "quality", "quality.json", "report.html"

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13px;display:block;overflow-x:auto}"
    "th,td{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}"
    "th:first-child,td:first-child{text-align:left}img{max-width:100%}p.note{color:#555}"
)


def write(folder: Path, result: dict[str, Any]) -> Path:
    """Write ``folder/quality``, whole or not at all; an earlier one is replaced. Returns it."""
    pictures = {"sweep.png": plots.sweep(result), "layers.png": plots.layers(result)}
    with staged(folder / FOLDER) as work:
        (work / RESULT).write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        for name, data in pictures.items():
            (work / name).write_bytes(data)
        (work / PAGE).write_text(page(result, pictures), encoding="utf-8")
    return folder / FOLDER


def page(result: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """One self-contained HTML page."""
    title = html.escape(f"Quality of {result['engine']['model']}: dense against rewritten")
    parts = [f"<h1>{title}</h1>", *(f"<p>{html.escape(line)}</p>" for line in facts(result))]
    for name, data in pictures.items():
        parts.append(
            f'<p><img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(data).decode()}"></p>'
        )
    parts += [_table(grid) for grid in grids(result)]
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _table(grid: Grid) -> str:
    def row(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(row(r, "td") for r in grid.rows)
    return (
        f"<h2>{html.escape(grid.title)}</h2><table><thead>{row(grid.header, 'th')}</thead><tbody>{body}</tbody></table>"
        f'<p class="note">{html.escape(grid.note)}</p>'
    )

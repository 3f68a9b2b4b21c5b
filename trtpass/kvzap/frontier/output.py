"""What a run leaves: quality.json, tables.md, pictures; and the tables of a page of the documentation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trtpass.errors import InputError
from trtpass.kvzap.frontier import pictures
from trtpass.kvzap.frontier.summary import FIXED, policies
from trtpass.quality import tables
from trtpass.quality.tables import Grid
from trtpass.staging import replacing

RESULT, TABLES = "quality.json", "tables.md"
BEGIN, END = "<!-- frontier: begin -->", "<!-- frontier: end -->"


def write(folder: Path, result: Mapping[str, Any]) -> None:
    """Write quality.json, tables.md and the pictures, each whole or not at all; the log beside them stays."""
    _write(folder / TABLES, markdown(result).encode())
    for name, data in pictures.all_of(result).items():
        _write(folder / name, data)
    _write(folder / RESULT, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())


def update_page(result_file: Path, page: Path) -> None:
    """Put the tables of a quality.json between the two marks of a page of Markdown.

    Raises:
        InputError: a file that cannot be read, that is no result, or a page without the marks.
    """
    try:
        result, text = json.loads(result_file.read_text(encoding="utf-8")), page.read_text(encoding="utf-8")
        made = markdown(result)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"the tables of {result_file} cannot be put into {page}: {type(error).__name__} {error}", "a quality.json"
        ) from error
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise InputError(f"{page} lacks the marks {BEGIN} and {END}", "both, in this order")
    _write(page, f"{head}{BEGIN}\n\n{made}\n{END}{tail}".encode())


def markdown(result: Mapping[str, Any]) -> str:
    """Every table as Markdown."""
    return tables.markdown(grids(result))


def grids(result: Mapping[str, Any]) -> Iterator[Grid]:
    """A table for each question and length, then thresholds that were fixed on other text."""
    for task, probe, title in (
        ("passkey", "passkey", "Pass keys found"),
        ("text", "repeat", "Repeated text, nats a token"),
        ("text", "continuation", "Continuation, nats a token"),
    ):
        for length, rows in sorted(result["results"].get(task, {}).items(), key=lambda item: int(item[0])):
            yield _grid(result, probe, title, length, rows)
    yield from _fixed(result)


def _grid(result: Mapping[str, Any], probe: str, title: str, length: str, rows: Mapping[str, Any]) -> Grid:
    cuts = [f"{cut:g}" for cut in result["run"]["plan"]["cuts"]]
    base = rows["dense"]["0"]
    if probe == "passkey":
        note = f"dense: {base['found']} of {base['samples']}; in brackets the mean log-likelihood of a token of the key"
    else:
        shown = f"{base[probe]['mean']:.3f}{_error(base[probe]['error'])}"
        note = f"dense: {shown}; the others: paired change against it; texts: {base['samples']}; ± standard error"
    table = tuple(
        (name, *(_cell(rows[name].get(cut), probe) for cut in cuts))
        for name in policies(result)
        if name in rows and not name.endswith(FIXED)
    )
    return Grid(f"{title}, after {length} tokens", note, ("removed", *(f"{float(cut):.0%}" for cut in cuts)), table)


def _cell(cell: Mapping[str, Any] | None, probe: str) -> str:
    if cell is None:
        return "-"
    if probe == "passkey":
        return f"{cell['found']}/{cell['samples']} ({cell['mean']:.2f})"
    return f"{cell[probe]['change']:+.3f}{_error(cell[probe]['change_error'])}"


def _fixed(result: Mapping[str, Any]) -> Iterator[Grid]:
    """What an engine has: one threshold for every prompt."""
    for name in policies(result):
        if not name.endswith(FIXED):
            continue
        known = result["thresholds"][name.removesuffix(FIXED)]
        rows = []
        for task, groups in result["results"].items():
            for length, found in sorted(groups.items(), key=lambda item: int(item[0])):
                for cut, cell in found.get(name, {}).items():
                    numbers = [_cell(cell, probe) if probe in (*cell, task) else "-" for probe in
                               ("passkey", "repeat", "continuation")]  # fmt: skip
                    rows.append((f"{task}, {length} tokens", f"{float(cut):.0%}", f"{cell['removed']:.1%}", *numbers))
        marks = ", ".join(f"{value:.3f} for {float(cut):.0%}" for cut, value in known.items() if value is not None)
        yield Grid(
            name, f"natural log: {marks}, from text that is not measured", ("prompts", "meant", "removed",
            "pass keys", "repeated text", "continuation"), tuple(rows),
        )  # fmt: skip


def _error(value: float | None) -> str:
    return "" if value is None else f" ± {value:.3f}"


def _write(path: Path, content: bytes) -> None:
    with replacing(path, len(content)) as file:
        file.write(content)

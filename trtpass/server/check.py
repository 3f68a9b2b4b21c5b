"""``trtpass validate --url``: what a server answers against what PyTorch answered when the engine was built.

Text models: the logits after each saved prompt, and, the engine being at hand, that the server's greedy tokens are the
runtime's. Encoders: every output for the saved inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from trtpass.errors import InputError
from trtpass.manifest import Manifest
from trtpass.server import client

if TYPE_CHECKING:
    from rich.table import Table

    from trtpass.compare import Difference

TOKENS = 16  # of the answers that are compared with the runtime's
EXACT = "exact"


@dataclass(frozen=True)
class Compared:
    """One output of the server and what it has to equal.

    Attributes:
        what: its name, with the row of a prompt.
        against: who made the other side: ``torch``, ``onnxruntime`` (there was no torch model), or ``runtime``.
        shape: of the output.
        max_abs: largest difference; None where a side holds NaN or infinity.
        max_rel: that over the largest magnitude.
        tolerance: ``|l - r| <= atol + rtol |r|`` in words, or ``exact``.
        note: what is wrong, in words.
    """

    what: str
    against: str
    shape: tuple[int, ...]
    max_abs: float | None
    max_rel: float | None
    tolerance: str
    passed: bool
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def check_server(folder: Path, url: str, *, model: str = "", grpc: str = "") -> list[Compared]:
    """Ask a server for everything that is saved beside an engine.

    Args:
        folder: the engine's folder.
        url: ``http://host:port`` of the server.
        model: its name there; empty: the name that ``trtpass deploy`` gives it.
        grpc: ``host:port``, for encoders; empty: the port after that of ``url``.

    Raises:
        InputError: no engine, nothing saved beside it, no server, or a server that refuses a request.
    """
    from trtpass.deploy.repository import default_name

    manifest = Manifest.read(folder)
    name = model or default_name(manifest)
    feed, runner, expected = saved(folder)
    if manifest.kind == "encoder":
        return _arrays(name, grpc or next_port(url), feed, runner, expected)
    rows = _rows(folder, feed)
    return [*_logits(url, name, rows, runner, expected), *_tokens(url, name, rows, folder, manifest)]


def saved(folder: Path) -> tuple[dict[str, np.ndarray], str, dict[str, np.ndarray]]:
    """The inputs saved beside an engine, who ran them, and the outputs, by name.

    Raises:
        InputError: a file is missing or is not Polygraphy's.
    """
    from polygraphy.comparator import RunResults
    from polygraphy.exception import PolygraphyException
    from polygraphy.json import load_json
    from polygraphy.logger import G_LOGGER

    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            [feed] = load_json(str(folder / "inputs.json"))
            [(runner, [outputs])] = RunResults.load(str(folder / "outputs.json")).items()
            return dict(feed), str(runner), {name: outputs[name] for name in outputs}
    except (OSError, ValueError, TypeError, KeyError, PolygraphyException) as error:
        raise InputError(
            f"the inputs and outputs saved in {folder} cannot be read: {str(error)[:200]}",
            "inputs.json and outputs.json, as they were built",
            "build the engine again",
        ) from error


def next_port(url: str) -> str:
    """``host:port`` of gRPC, by Triton's custom one above that of HTTP."""
    where = urlsplit(url)
    return f"{where.hostname}:{(where.port or 8000) + 1}"


def _rows(folder: Path, feed: Mapping[str, np.ndarray]) -> list[list[int]]:
    """The saved prompts, without padding."""
    ids = feed.get("input_ids")
    if ids is None or ids.ndim != 2:
        raise InputError(f"inputs.json in {folder} has {', '.join(feed) or 'nothing'}", "input_ids [B, S] and lengths")
    lengths = feed.get("lengths", np.full(len(ids), ids.shape[1]))
    return [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]


def _logits(
    url: str, model: str, rows: list[list[int]], runner: str, expected: Mapping[str, np.ndarray]
) -> list[Compared]:
    from trtpass.compare import ATOL, RTOL

    [logits] = expected.values()  # [B, 1, V]
    found = []
    for i, row in enumerate(rows):
        answer = client.generate(url, model, row, max_tokens=1, return_logits=True)
        if answer.logits is None:
            raise InputError(f"'{model}' gives no logits", "the output 'logits', as trtpass deploy writes it")
        found.append(_compared(f"logits of row {i}", runner, answer.logits, logits[i, -1], ATOL, RTOL))
    return found


def _arrays(
    model: str, address: str, feed: Mapping[str, np.ndarray], runner: str, expected: Mapping[str, np.ndarray]
) -> list[Compared]:
    from trtpass.encoder_checks import ATOL, RTOL

    made = client.infer(address, model, feed)
    if missing := sorted(expected.keys() - made.keys()):
        raise InputError(f"'{model}' gives {', '.join(made)}", f"also {', '.join(missing)}", "deploy the engine again")
    return [_compared(name, runner, made[name], right, ATOL, RTOL) for name, right in expected.items()]


def _tokens(url: str, model: str, rows: list[list[int]], folder: Path, manifest: Manifest) -> list[Compared]:
    """The server's greedy answers and those of the runtime: each row alone, whole prompts with room for an answer."""
    from trtpass.generate import RUNNABLE
    from trtpass.runtime import Engine

    if manifest.target not in RUNNABLE:
        return []
    engine = Engine.open(folder, "cpu", context=manifest.context)
    found = []
    for i, row in enumerate(rows):
        prompt = row[: max(1, min(len(row), (engine.context or len(row) + TOKENS) - TOKENS))]
        steps = engine.generate([prompt], TOKENS, manifest.stop_ids)
        mine = [token for step in steps for token in step.tokens if token is not None]
        theirs = list(client.generate(url, model, prompt, max_tokens=TOKENS).tokens)
        note = "" if theirs == mine else f"the server says {theirs}, the runtime {mine}"
        found.append(Compared(f"tokens of row {i}", "runtime", (len(theirs),), None, None, EXACT, theirs == mine, note))
    return found


def _compared(what: str, against: str, left: np.ndarray, right: np.ndarray, atol: float, rtol: float) -> Compared:
    """By Polygraphy; another shape is a difference."""
    from trtpass.compare import difference

    row = Compared(what, against, left.shape, None, None, f"atol {atol:g}, rtol {rtol:g}", False)
    if left.shape != right.shape:
        return replace(row, note=f"{against} has shape {list(right.shape)}")
    gap: Difference = difference({what: left}, {what: right}, atol, rtol)
    return replace(row, max_abs=gap.max_abs, max_rel=gap.max_rel, passed=gap.ok, note="" if gap.ok else gap.words)


def render(rows: list[Compared], title: str) -> Table:
    """The comparisons as a table for a terminal."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title)
    for column in ("server's output", "against", "shape", "max abs", "max rel", "tolerance", ""):
        table.add_column(column, overflow="fold")
    for row in rows:
        gaps = ["" if gap is None else f"{gap:.1e}" for gap in (row.max_abs, row.max_rel)]
        verdict = "[green]PASSED[/]" if row.passed else f"[bold red]FAILED[/] {escape(row.note)}"
        table.add_row(row.what, row.against, escape(str(list(row.shape))), *gaps, row.tolerance, verdict)
    return table

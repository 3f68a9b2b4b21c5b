"""What an engine folder says about itself: ``manifest.json``, and the table that ``trtpass engine`` ends with."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from trtpass import native
from trtpass.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

NAME = "manifest.json"
Status = Literal["passed", "failed", "not_run"]
Kind = Literal["decoder", "encoder"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PassRecord(_Strict):
    """A pass that was applied. ``pruned``: mean share of tokens dropped in its layers, as measured by the check.

    Where it makes a stream shorter, ``tokens``: of the stream before the first and after each of its sites; ``kept``:
    their mean over all blocks of the model, as a share.
    """

    name: str
    options: dict[str, Any]
    sites: int
    layers: list[int]
    near_misses: list[str] = []
    notes: list[str] = []
    warnings: list[str] = []
    pruned: float | None = None
    kept: float | None = None
    tokens: list[int] = []


class Artifact(_Strict):
    path: str
    sha256: str
    bytes: int


class Check(_Strict):
    """One equality. ``flipped``: share of selection decisions that differ when both sides choose freely."""

    status: Status
    reason: str = ""
    max_abs: float | None = None
    max_rel: float | None = None
    tolerance: str = ""
    flipped: float | None = None

    @staticmethod
    def not_run(reason: str) -> Check:
        return Check(status="not_run", reason=reason)


class Checks(_Strict):
    """``export``: torch, or the given ONNX file, = raised ONNX; ``rewrite``: twin = rewritten; ``engine``: rewritten =
    engine."""

    export: Check
    rewrite: Check
    engine: Check

    def items(self) -> list[tuple[str, Check]]:
        return [("export", self.export), ("rewrite", self.rewrite), ("engine", self.engine)]

    @property
    def failed(self) -> list[str]:
        return [name for name, check in self.items() if check.status == "failed"]


class Quality(_Strict):
    """Dense against rewritten on the recipe's metric: a number, never a pass or a fail."""

    metric: str
    dense: float
    rewritten: float


class Manifest(_Strict):
    """See docs/design.md; paths are relative to the engine's folder.

    The engine of an encoder is one graph with the inputs that its model has: no tokens in, no cache, context 0.
    """

    kind: Kind = "decoder"
    model: str
    origin: str  # what `trtpass build` was given: a known name, or a path
    passes: list[PassRecord]
    target: str
    sm: list[str]
    context: int
    stop_ids: list[int] = []
    whole_prompt: str | None = None
    artifacts: list[Artifact]
    checks: Checks
    quality: Quality | None = None
    lowering: list[str] = []
    inputs: dict[str, str] = {}  # of an encoder: dtype and shape, as the graph has them
    outputs: dict[str, str] = {}
    variants: list[dict[str, int]] = []  # of an encoder's plans: what the symbolic sizes are in each
    unbuilt: str = ""  # why there is no plan beside the graphs of a target that has plans
    page: int | None = None  # slots of a page, where the cache is paged
    kernels: bool = True  # whether native kernels may be used, where they fit
    raised: dict[str, int] = {}
    near_misses: list[str] = []
    versions: dict[str, str]
    seconds: float
    peak_memory_bytes: int

    def write(self, folder: Path) -> None:
        (folder / NAME).write_text(self.model_dump_json(indent=2) + "\n")

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Read a folder's manifest.

        Raises:
            InputError: no manifest, or not one of ours.
        """
        path = folder / NAME
        try:
            return Manifest.model_validate_json(path.read_bytes())
        except FileNotFoundError as error:
            raise InputError(
                f"'{folder}' has no {NAME}", "an engine folder", "build one with `make engine MODEL=...`"
            ) from error
        except (ValidationError, UnicodeDecodeError) as error:
            raise InputError(
                f"'{path}' is not a trtpass manifest: {str(error).splitlines()[0]}", fix="build again"
            ) from error


def artifact(folder: Path, path: Path) -> Artifact:
    """Size and hash of a finished file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return Artifact(path=str(path.relative_to(folder)), sha256=digest.hexdigest(), bytes=path.stat().st_size)


def versions() -> dict[str, str]:
    """Versions of what can change a result, those that are installed."""
    found = {"python": platform.python_version()}
    for name in (
        "trtpass",
        "torch",
        "transformers",
        "onnx",
        "onnx-ir",
        "onnxscript",
        "onnxruntime",
        "tensorrt-rtx-cu13",
        "tensorrt",
        "triton",
    ):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    library = native.find()
    if isinstance(library, native.Library):
        found["native kernels"] = f"{native.fingerprint()} by {library.compiler}, {native.isa()}"
    return found


LINES = 10  # of the lowering, in the closing table


def render(manifest: Manifest, folder: Path) -> Table:
    """The closing table."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{manifest.model} -> {folder}", title_justify="left", show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for record in manifest.passes:
        table.add_row("pass", f"{record.name} on {record.sites} of the layers: {_ranges(record.layers)}")
        table.add_row("", ", ".join(f"{k}={v}" for k, v in record.options.items()))
        if {"min_tokens", "window"} <= record.options.keys():
            limit = record.options["min_tokens"] + record.options["window"]
            table.add_row("", f"rows of at most {limit} tokens stay dense (min_tokens + window)")
        if record.pruned is not None:
            what = "keys evicted from the cache" if manifest.page else "tokens dropped in those layers"
            table.add_row("", f"{record.pruned:.1%} of the {what}, in the check below")
        if record.tokens:
            path = " -> ".join(map(str, record.tokens))
            table.add_row("", f"tokens {path}; kept {record.kept or 0:.1%}, mean over all blocks")
        for note in record.notes:
            table.add_row("", escape(note))
        for warning in record.warnings:
            table.add_row("warning", f"[yellow]{escape(warning)}[/]")
    if manifest.page:
        table.add_row("cache", f"paged per layer, row and KV head, pages of {manifest.page} slots")
    if not manifest.passes:
        table.add_row("pass", "none (dense)")
    if manifest.kind == "encoder":
        table.add_row("kind", "encoder: one graph, without text or cache")
        for label, ports in (("in", manifest.inputs), ("out", manifest.outputs)):
            table.add_row(label, escape(", ".join(f"{name} {port}" for name, port in ports.items())))
    table.add_row("target", manifest.target + (f" ({', '.join(manifest.sm)})" if manifest.sm else ""))
    for number, line in enumerate(manifest.lowering[:LINES]):
        table.add_row("" if number else "lowered", escape(line))
    if len(manifest.lowering) > LINES:
        table.add_row("", f"and {len(manifest.lowering) - LINES} more kinds of node, in manifest.json")
    meaning = {
        "export": "torch = raised ONNX",
        "rewrite": "torch twin = rewritten ONNX",
        "engine": "rewritten ONNX = engine",
    }
    if manifest.kind == "encoder":
        meaning["export"] = "the model = raised ONNX"
    colour = {"passed": "green", "failed": "bold red", "not_run": "yellow"}
    for name, check in manifest.checks.items():
        text = f"[{colour[check.status]}]{check.status}[/]  {meaning[name]}"
        if check.max_abs is not None:
            text += f"; max abs {check.max_abs:.1e}, max rel {check.max_rel or 0:.1e}"
        if check.tolerance:
            text += f" ({check.tolerance})"
        if check.flipped is not None:
            text += f"; {check.flipped:.2%} of free decisions differ"
        table.add_row(f"check {name}", text + escape(f"; {check.reason}" if check.reason else ""))
    if manifest.quality is not None:
        q = manifest.quality
        table.add_row("quality", f"{q.metric}: dense {q.dense:.4f}, rewritten {q.rewritten:.4f}")
    for item in manifest.artifacts:
        table.add_row("file", f"{item.path}  {_size(item.bytes)}  sha256 {item.sha256[:12]}")
    table.add_row("cost", f"{manifest.seconds:.0f} s, peak memory {_size(manifest.peak_memory_bytes)}")
    return table


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _ranges(numbers: list[int]) -> str:
    """``[1, 2, 3, 7]`` as ``1-3, 7``."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)

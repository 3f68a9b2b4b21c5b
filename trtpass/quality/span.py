"""Quality of the span methods on a decoder: a long document is the span, and tokens of it are dropped in prefill.

``python -m trtpass.quality.span ENGINE -o DIR [--short]`` takes the dense graph of any engine folder and measures, with
the engine of each setting on the CPU, whether a pass key in the document is still found, and the likelihood of how the
text goes on, for fastv, ficoco-l and random-span at the same kept fractions. It writes ``span_quality.json``,
``span_quality.md`` and ``span_quality.png``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trtpass import io, passes
from trtpass.anchors import find
from trtpass.build import DENSE
from trtpass.canonicalize import canonicalize
from trtpass.corpus import text_corpus
from trtpass.errors import CheckFailed, InputError, TrtpassError
from trtpass.manifest import Manifest
from trtpass.passes.cache import insert_cache
from trtpass.passes.lower import lower
from trtpass.progress import Report, bar, silent
from trtpass.quality.plots import finish, need, png
from trtpass.quality.sides import log_softmax_at
from trtpass.quality.tables import Grid, markdown
from trtpass.quality.tasks import Sample, continuations, passkeys
from trtpass.reduction.decoder import SPAN_KEY
from trtpass.runtime import DECODE, PREFILL, Engine
from trtpass.staging import replacing
from trtpass.text import Tokenizer

START, BEHIND = 4, 32  # the span is START:-BEHIND: the document without its ends, and without the question
SITES = 3  # of ficoco-l, by default
DEEP = ", half depth"
FILES = ("span_quality.json", "span_quality.md", "span_quality.png")


@dataclass(frozen=True)
class Plan:
    """What is measured: shares of the span that stay, ``(tokens, prompts)`` of each task, tokens that are scored."""

    kept: tuple[float, ...] = (0.5, 0.25, 0.75)
    passkeys: tuple[tuple[int, int], ...] = ((1000, 4),)
    documents: tuple[tuple[int, int], ...] = ((1000, 3),)
    scored: int = 32


SHORT = Plan((0.5,), ((300, 1),), ((300, 1),), 8)


def settings(plan: Plan, layers: int) -> list[tuple[str, float, str]]:
    """Method, kept share of the span, and the pass in words (empty: dense). Each method also at half the depth."""
    span, made, half = f"span={START}:-{BEHIND}", [("dense", 1.0, "")], layers // 2
    for kept in plan.kept:
        made.append(("fastv", kept, f"fastv:{span},ratio={1 - kept:g}"))
        made.append((f"fastv{DEEP}", kept, f"fastv:{span},ratio={1 - kept:g},layer={half}"))
        keep = f"keep={kept ** (1 / SITES):.3f}"
        made.append(("ficoco-l", kept, f"ficoco-l:{span},{keep}"))
        made.append((f"ficoco-l{DEEP}", kept, f"ficoco-l:{span},{keep},layers={half}-{half + SITES - 1}"))
        made.append(("random-span", kept, f"random-span:{span},ratio={1 - kept:g}"))
        made.append((f"random-span{DEEP}", kept, f"random-span:{span},ratio={1 - kept:g},layer={half}"))
    return made


def measure(
    folder: Path, out: Path, plan: Plan, report: Report = silent, text: Path | None = None, threads: int | None = None
) -> dict[str, Any]:
    """Measure all settings that ``out`` does not hold yet; its files are written anew after each of them.

    Args:
        folder: an engine of the model, of any method: its dense graph and its tokenizer are read.
        threads: of the engine; None leaves the choice to ONNX Runtime.

    Raises:
        InputError: no such engine or tokenizer, or a text that is too short.
        CheckFailed: a likelihood is not finite.
    """
    need()
    manifest = Manifest.read(folder)
    tasks = _tasks(Tokenizer.open(folder), text_corpus(text), plan)
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "model": manifest.model, "span": f"{START}:-{BEHIND}", "scored": plan.scored,
        "passkeys": [list(pair) for pair in plan.passkeys], "documents": [list(pair) for pair in plan.documents],
    }  # fmt: skip
    result["results"] = _done(out / FILES[0], result)
    every = settings(plan, len(find(io.load(folder / DENSE)).blocks))
    for number, (method, kept, words) in enumerate(every):
        if any((row["method"], row["kept"]) == (method, kept) for row in result["results"]):
            continue
        report(f"{method} {kept:g}", number / len(every))
        engine = _engine(folder / DENSE, words, threads)
        result["results"] += [
            _row(engine, method, kept, task, tokens, samples) for (task, tokens), samples in tasks.items()
        ]
        _write(result, out)
    return result


def _done(file: Path, header: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier run with the same ``header``, empty without one.

    Raises:
        InputError: ``file`` is of another model or plan, or no result.
    """
    if not file.is_file():
        return []
    try:
        found = json.loads(file.read_bytes())
        rows = found.pop("results")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"'{file}' is not a result of this program", "an empty folder") from error
    if found != header:
        raise InputError(f"'{file}' holds another measurement: {found}", f"{header}", "give another folder")
    return list(rows)


def _tasks(tokenizer: Tokenizer, text: str, plan: Plan) -> dict[tuple[str, int], list[Sample]]:
    """Samples by task and tokens."""
    made = {("passkey", tokens): passkeys(tokenizer, tokens, count) for tokens, count in plan.passkeys}
    ids = tokenizer.encode(text, special=False)
    longest = max(tokens for tokens, _ in plan.documents)
    for tokens, count in plan.documents:
        made["text", tokens] = continuations(ids, tokens, count, plan.scored, longest)
    return made


def _engine(path: Path, words: str, threads: int | None) -> Engine:
    """The engine of one setting, from the dense graph at ``path``, whose weights it reads where they lie."""
    dense = io.load(path)
    canonicalize(dense)  # an engine of an earlier version may hold reshapes that are raised now
    rewritten = dense.clone()
    if words:
        passes.parse(words)(rewritten)
    record = rewritten.metadata_props.get(SPAN_KEY)
    graphs = {PREFILL: insert_cache(rewritten, PREFILL), DECODE: insert_cache(dense, DECODE, shortened=record)}
    return Engine.open({phase: lower(graph, "cpu").model for phase, graph in graphs.items()}, threads=threads)


def _row(engine: Engine, method: str, kept: float, task: str, tokens: int, samples: Sequence[Sample]) -> dict[str, Any]:
    """One cell: of each sample the mean log-likelihood in nats, and whether it was the greedy choice; keys held."""
    means, exact, held = [], [], []
    for sample in samples:
        prompt, target = sample.prompt.tolist(), sample.target
        state = engine.prefill([prompt], capacity=len(prompt) + len(target))
        held.append(1.0 if state.dropped is None else 1 - float(state.dropped.mean()) / len(prompt))
        logits = [state.logits[0]]
        for token in target[:-1].tolist():
            logits.append(engine.decode(state, [token])[0])
        stacked = np.stack(logits)
        means.append(float(log_softmax_at(stacked, target).mean()))
        exact.append(bool((stacked.argmax(-1) == target).all()))
    if not np.isfinite(means).all():
        raise CheckFailed(f"{method}, {kept:g} kept, {task}: a likelihood is not finite")
    return {
        "method": method, "kept": kept, "task": task, "tokens": tokens, "means": means, "exact": exact,
        "held": float(np.mean(held)),
    }  # fmt: skip


def grids(result: dict[str, Any]) -> list[Grid]:
    """The results as tables of text, a row a kept share."""
    cells = {(r["task"], r["tokens"], r["method"], r["kept"]): r for r in result["results"]}
    made = []
    for task, tokens in dict.fromkeys((r["task"], r["tokens"]) for r in result["results"]):
        dense = cells[task, tokens, "dense", 1.0]
        methods = [m for m in dict.fromkeys(r["method"] for r in result["results"]) if m != "dense"]
        rows = [("1", "1", *[_cell(dense, dense)] * len(methods))]
        for kept in sorted({r["kept"] for r in result["results"] if r["method"] != "dense"}, reverse=True):
            row = [cells.get((task, tokens, method, kept)) for method in methods]
            shares = " / ".join("" if cell is None else f"{cell['held']:.2f}" for cell in row)
            rows.append((f"{kept:g}", shares, *("" if cell is None else _cell(cell, dense) for cell in row)))
        what = "pass keys found" if task == "passkey" else f"next {result['scored']} tokens, change in nats a token"
        note = f"{len(dense['means'])} prompts" + ("" if task == "passkey" else ", ± standard error, paired with dense")
        made.append(Grid(f"{tokens} tokens: {what}", note, ("span kept", "keys held", *methods), tuple(rows)))
    return made


def _cell(cell: dict[str, Any], dense: dict[str, Any]) -> str:
    if cell["task"] == "passkey":
        return f"{sum(cell['exact'])} of {len(cell['exact'])}"
    mean, error = _change(cell, dense)
    return f"{mean:+.3f}" + ("" if error is None else f" ± {error:.3f}")


def _change(cell: dict[str, Any], dense: dict[str, Any]) -> tuple[float, float | None]:
    """Mean change against dense, prompt by prompt, and its standard error where there are several."""
    change = np.array(cell["means"]) - np.array(dense["means"])
    return float(change.mean()), float(change.std(ddof=1) / np.sqrt(len(change))) if len(change) > 1 else None


def picture(result: dict[str, Any]) -> bytes:
    """Pass keys found, and the change of the likelihood, over the kept share of the span."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = dict(zip(("passkey", "text"), figure.subplots(1, 2), strict=True))
    rows = result["results"]
    dense = {(r["task"], r["tokens"]): r for r in rows if r["method"] == "dense"}
    colours = {
        "fastv": "#1b6ca8", f"fastv{DEEP}": "#3c8d5a", "ficoco-l": "#d1603d", f"ficoco-l{DEEP}": "#7a4fa3",
        "random-span": "#7a7a7a",
        f"random-span{DEEP}": "#c4c4c4",
    }  # fmt: skip
    for number, (task, tokens) in enumerate(dense):
        for method, colour in colours.items():
            own = sorted(
                (r for r in rows if (r["task"], r["tokens"], r["method"]) == (task, tokens, method)),
                key=lambda r: -r["kept"],
            )
            base = dense[task, tokens]
            every = [base, *own]
            ys = [float(np.mean(r["exact"])) if task == "passkey" else _change(r, base)[0] for r in every]
            style = "-" if tokens == min(t for k, t in dense if k == task) else ":"
            label = f"{method}, {tokens} tokens"
            axes[task].plot([r["kept"] for r in every], ys, style, marker="os^D"[number % 4], color=colour, label=label)
    axes["passkey"].set(ylim=(-0.05, 1.05), ylabel="pass keys found", title="Pass key in the span")
    axes["text"].set(ylabel="change against dense, nats a token", title=f"Next {result['scored']} tokens of a text")
    for axis in axes.values():
        axis.invert_xaxis()
        axis.set_xlabel("share of the span's tokens that stays")
        finish(axis)
    return png(figure)


def _write(result: dict[str, Any], out: Path) -> None:
    contents = (
        (json.dumps(result, indent=1, allow_nan=False) + "\n").encode(),
        markdown(grids(result)).encode(),
        picture(result),
    )
    for name, data in zip(FILES, contents, strict=True):
        with replacing(out / name, len(data)) as handle:
            handle.write(data)


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 a number is not finite, 2 the request was wrong."""
    parser = argparse.ArgumentParser(prog="trtpass.quality.span", description="quality of methods that drop a span")
    parser.add_argument("engine", type=Path, help="an engine folder of the model, of any method")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--short", action="store_true", help="one prompt of each task, one kept share")
    parser.add_argument("--text", type=Path, help="a text of your own, UTF-8")
    parser.add_argument("--threads", type=int, help="of the engine")
    given = parser.parse_args(arguments)
    try:
        with bar("span quality") as report:
            plan = SHORT if given.short else Plan()
            result = measure(given.engine, given.out, plan, report, given.text, given.threads)
        print(markdown(grids(result)))
    except TrtpassError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

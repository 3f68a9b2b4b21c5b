"""Quality of an engine with a cache policy, by the engine itself: what it decodes after it has evicted keys.

The same prompts as the frontier's (``trtpass.kvzap.frontier``), of text that fitting does not read. A context is
prefilled, then the tokens that should follow are fed one by one, to the engine and to the dense one: the likelihood of
the context repeated, of its continuation, and whether a pass key is found that is asked for after eviction.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from trtpass import io
from trtpass.build import DENSE
from trtpass.corpus import text_corpus
from trtpass.errors import CheckFailed
from trtpass.kvzap.frontier.plan import FULL, SHORT, Plan, Probe, Prompt, prompts
from trtpass.manifest import Manifest, Quality
from trtpass.paged import PagedState
from trtpass.passes.cache import insert_cache
from trtpass.passes.lower import TARGETS, lower
from trtpass.progress import Report, silent
from trtpass.quality.tables import Grid
from trtpass.runtime import DECODE, PREFILL, Engine
from trtpass.staging import replacing
from trtpass.text import Tokenizer
from trtpass.validate import verify_files

FILE = "cache_quality.json"
SIDES = ("dense", "engine")
# An engine decodes token by token: fewer prompts than the frontier's, which has one forward for all of them.
PLANS = {
    False: replace(FULL, texts=((1000, 4), (2000, 4), (4000, 2)), passkeys=((1000, 4), (2000, 4), (4000, 2))),
    True: SHORT,
}


def measure(
    folder: Path, *, text: Path | None = None, short: bool = False, report: Report = silent, plan: Plan | None = None
) -> dict[str, Any]:
    """Measure an engine folder; write ``cache_quality.json`` and the manifest's ``quality`` there.

    Args:
        text: a text of one's own, of which the last quarter is read; None takes the public-domain one.
        short: one text and one pass key.
        plan: lengths and numbers of prompts, in place of these.

    Returns:
        What the file holds: ``results[task][length][side]``, and ``kept``: the share of the keys that stays.

    Raises:
        InputError: not such an engine, no tokenizer, or a text or context that is too short.
        CheckFailed: a file has changed since the engine was built, or a likelihood is not finite.
    """
    manifest = Manifest.read(folder)
    verify_files(folder, manifest)
    chosen = (plan or PLANS[short]).fit(manifest.context)
    asked = prompts(Tokenizer.open(folder), text_corpus(text), chosen)
    target = manifest.target if manifest.target in TARGETS else "cpu"
    model = io.load(folder / DENSE)
    dense = {phase: lower(insert_cache(model, phase), target).model for phase in (PREFILL, DECODE)}
    engines = {"dense": Engine.open(dense, context=manifest.context), "engine": Engine.open(folder)}
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    whole, spent = sum(len(p.ids) for p in asked), 0
    for prompt in asked:
        for side, engine in engines.items():
            report(f"{prompt.task}, {prompt.length} tokens, {side}", spent / whole)
            for probe in prompt.probes:
                made = _ask(engine, prompt, probe)
                if not np.isfinite(made["mean"]):
                    raise CheckFailed(f"{side}: the likelihood of '{prompt.key}' is not finite")
                found.setdefault((probe.name, str(prompt.length), side), []).append(made)
        spent += len(prompt.ids)
    results: dict[str, Any] = {}
    for (task, length, side), answers in found.items():
        results.setdefault(task, {}).setdefault(length, {})[side] = _summary(answers)
    result = {"model": manifest.model, "policy": manifest.passes[0].model_dump(), "results": results}
    data = (json.dumps(result, indent=1, allow_nan=False) + "\n").encode()
    with replacing(folder / FILE, len(data)) as handle:
        handle.write(data)
    _record(folder, manifest, results)
    return result


def _summary(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over prompts, with the standard error where there are several."""
    values = [one["mean"] for one in answers]
    return {
        "samples": len(answers),
        "mean": float(np.mean(values)),
        "error": float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None,
        "exact": sum(one["exact"] for one in answers),
        "kept": float(np.mean([one["kept"] for one in answers])),
    }


def _ask(engine: Engine, prompt: Prompt, probe: Probe) -> dict[str, Any]:
    """Likelihood in nats a token of what the probe scores, fed token by token; ``kept``: of the context's keys."""
    state = engine.prefill([list(prompt.ids)], capacity=len(prompt.ids) + len(probe.ids))
    kept = float(state.kept().mean()) if isinstance(state, PagedState) else 1.0
    logs, exact = [], []
    for place, token in enumerate(probe.ids):
        if place >= probe.first:
            logits = state.logits[0].astype(np.float64)
            shifted = logits - logits.max()
            logs.append(float(shifted[token] - np.log(np.exp(shifted).sum())))
            exact.append(int(logits.argmax()) == token)
        engine.decode(state, [token])
    return {"mean": float(np.mean(logs)), "exact": all(exact), "kept": kept}


def _record(folder: Path, manifest: Manifest, results: dict[str, Any]) -> None:
    """Put the repeated text at the longest length into the manifest."""
    length, sides = max(results["repeat"].items(), key=lambda item: int(item[0]))
    manifest.quality = Quality(
        metric=f"log-likelihood a token of a context's beginning, repeated after {length} tokens of which "
        f"{1 - sides['engine']['kept']:.0%} of the keys are evicted (nats, {sides['dense']['samples']} documents)",
        dense=sides["dense"]["mean"],
        rewritten=sides["engine"]["mean"],
    )
    data = (manifest.model_dump_json(indent=2) + "\n").encode()
    with replacing(folder / "manifest.json", len(data)) as handle:
        handle.write(data)


def grids(result: dict[str, Any]) -> Sequence[Grid]:
    """The results as tables of text."""
    made = []
    words = {"passkey": "pass key, asked for after eviction: found", "repeat": "repeated text: nats a token",
             "continuation": "continuation: nats a token"}  # fmt: skip
    for task, lengths in result["results"].items():
        rows = []
        for length, sides in sorted(lengths.items(), key=lambda item: int(item[0])):
            cells = [_cell(task, sides[side]) for side in SIDES]
            rows.append((length, f"{1 - sides['engine']['kept']:.1%}", *cells))
        made.append(Grid(words[task], "standard error over documents", ("tokens", "evicted", *SIDES), tuple(rows)))
    return made


def _cell(task: str, cell: dict[str, Any]) -> str:
    if task == "passkey":
        return f"{cell['exact']} of {cell['samples']}"
    return f"{cell['mean']:.3f}" + ("" if cell["error"] is None else f" ± {cell['error']:.3f}")

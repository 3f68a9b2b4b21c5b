"""The ladder's checks of a span method (``trtpass.reduction.decoder_pass``): twin = rewritten, rewritten = engine.

Choices are forced from one side on the other, where numbers must agree; freely, every token on which two sides disagree
must lie near the cut (``trtpass.encoder_checks.flips``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from trtpass.anchors import find
from trtpass.compare import Ladder, running
from trtpass.encoder_checks import FORCED, MARGIN, SEEN, Flips, flips, force, reducing
from trtpass.manifest import Check
from trtpass.passes import Pass, PassResult, Site
from trtpass.passes.cache import insert_cache
from trtpass.passes.logits import LastLogits
from trtpass.passes.lower import lower
from trtpass.reduction.decoder import DROPPED, SPAN_KEY
from trtpass.reduction.decoder_pass import SpanMethod
from trtpass.variants import expose, expose_hidden

STEPS = 16  # decode steps of the engine's check


def shortened_by(passes: Sequence[Pass], results: Sequence[PassResult]) -> tuple[SpanMethod, PassResult] | None:
    """The span method of a pipeline, where it has one that dropped something."""
    for step, result in zip(passes, results, strict=True):
        if isinstance(step, SpanMethod) and reducing([result]):
            return step, result
    return None


def _choices(sites: Sequence[Site], outputs: dict[str, np.ndarray]) -> dict[int, dict[str, np.ndarray]]:
    return {s.layer: {role: outputs[s.values[role]] for role in SEEN if role in s.values} for s in sites}


def _expose(graph: ir.Model, sites: Sequence[Site]) -> None:
    expose(graph, [s.values[role] for s in sites for role in (*SEEN, "count") if role in s.values])


def _only(chosen: dict[int, dict[str, np.ndarray]]) -> dict[int, dict[str, np.ndarray]]:
    return {layer: {role: made[role] for role in FORCED if role in made} for layer, made in chosen.items()}


def _count(ladder: Ladder, sites: Sequence[Site], outputs: dict[str, np.ndarray]) -> None:
    """``ladder.kept``: of each site the share of the prompts' tokens that are left behind it."""
    for site in sites:
        ladder.kept[site.layer] = float(np.mean(outputs[site.values["count"]] / ladder.probe.lengths))


def rewrite_check(ladder: Ladder, step: SpanMethod, result: PassResult) -> Check:
    """D = C: hidden states and last logits of the twin and of the rewritten graph."""
    sites = reducing([result])
    graph = ladder.rewritten.clone()
    hidden = expose_hidden(graph)
    LastLogits()(graph)
    _expose(graph, sites)
    outputs = ladder.run(graph, hidden)
    chosen = _choices(sites, outputs)
    _count(ladder, sites, outputs)
    if ladder.module is None:
        return Check.not_run("there is no torch model: the engine's check compares graphs alone")
    twin = step.twin(ladder.module, result)
    run = twin.run(ladder.probe.input_ids, ladder.probe.lengths, _only(chosen))
    left = {name: outputs[name] for name in ("hidden", "logits")}
    right = {"hidden": ladder.probe.valid(run.hidden), "logits": run.logits}
    return _verdict(ladder, left, right, flips(run.selections, chosen))


def engine_check(ladder: Ladder, step: SpanMethod, result: PassResult, target: str, kernels: bool) -> Check:
    """C = E: the prefill graph with C's choices, its caches, and decode steps over them, against the twin, which has no
    cache: it computes the prompt with the same choices and the new tokens behind it."""
    sites, probe = reducing([result]), ladder.probe
    graph = ladder.rewritten.clone()
    keys = {f"present.{b.layer}.{r}": str(getattr(b, r[0]).name) for b in find(graph).blocks for r in ("key", "value")}
    hidden = expose_hidden(graph)
    LastLogits()(graph)
    _expose(graph, sites)
    expose(graph, list(keys.values()))
    expected = ladder.run(graph, hidden)
    chosen = _choices(sites, expected)
    _count(ladder, sites, expected)

    lowered = ladder.rewritten.clone()
    expose_hidden(lowered)
    given = force(lowered, sites)
    _expose(lowered, sites)
    prefill = lower(insert_cache(lowered, "prefill"), target, kernels).model
    slots = probe.input_ids.shape[1] + STEPS
    feed = {name: chosen[layer][role] for name, (layer, role) in given.items()}
    got = ladder.run(prefill, hidden, {**ladder.empty(prefill, slots), **feed})
    left = {name: got[name] for name in ("hidden", "logits")}
    right = {name: expected[name] for name in ("hidden", "logits")}
    for name, key in keys.items():
        held = probe.lengths - expected[DROPPED][int(name.split(".")[1])]
        left[name], right[name] = _held(got[name], held), _held(expected[key], held)
    free = flips(_choices(sites, got), chosen)
    if ladder.module is not None:
        ids = np.random.default_rng(0).integers(0, got["logits"].shape[-1], (len(probe.lengths), STEPS))
        left["decode"] = _decode(ladder, target, kernels, got, ids)
        longer = np.zeros((len(ids), slots), np.int64)
        for row, prompt, length, new in zip(longer, probe.input_ids, probe.lengths, ids, strict=True):
            row[: length + STEPS] = np.concatenate([prompt[:length], new])
        twin = step.twin(ladder.module, result)
        right["decode"] = twin.run(longer, probe.lengths + STEPS, _only(chosen), STEPS).logits[:, 1:]
    return _verdict(ladder, left, right, free, f"{STEPS} decode steps = the twin without a cache")


def _held(cache: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Rows ``[B, Hkv, most, D]`` of a cache ``[B, Hkv, slots, D]`` that hold a token, the others 0."""
    most = cache[:, :, : int(held.max())]
    valid = np.arange(most.shape[2])[None, None, :, None] < held[:, None, None, None]
    return np.where(valid, most, 0.0).astype(np.float32)


def _decode(
    ladder: Ladder, target: str, kernels: bool, prefilled: dict[str, np.ndarray], ids: np.ndarray
) -> np.ndarray:
    """Logits ``[B, STEPS, V]`` of the engine's decode graph over the caches of its prefill."""
    record = ladder.rewritten.metadata_props[SPAN_KEY]
    decode = lower(insert_cache(ladder.dense, "decode", shortened=record), target, kernels).model
    caches = {n.replace("present.", "past.", 1): x for n, x in prefilled.items() if n.startswith("present.")}
    logits = []
    with running(decode, ladder.folder) as run:
        for step in range(ids.shape[1]):
            feed: dict[str, Any] = {
                "input_ids": ids[:, step : step + 1], "lengths": np.ones(len(ids), np.int32),
                "past_lengths": ladder.probe.lengths + step, DROPPED: prefilled[DROPPED], **caches,
            }  # fmt: skip
            made = run(feed)
            logits.append(made["logits"][:, -1])
            caches = {n.replace("present.", "past.", 1): x for n, x in made.items() if n.startswith("present.")}
    return np.stack(logits, 1)


def _verdict(
    ladder: Ladder, left: dict[str, np.ndarray], right: dict[str, np.ndarray], free: Flips, note: str = ""
) -> Check:
    """As ``Ladder.judge``, with the flips of token choices."""
    pruned = 1.0 - min(ladder.kept.values(), default=1.0)
    check = ladder.judge(left, right, None, pruned, note)
    check.flipped = free.share
    check.tolerance += f", free choices within {MARGIN:g} of the cut"
    if free.worst > MARGIN:
        flip = f"a flipped token lies {free.worst:.2e} of the scores' range from the cut"
        check.status, check.reason = "failed", f"{check.reason}; {flip}" if check.reason else flip
    return check

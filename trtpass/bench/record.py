"""What a benchmark reports: one ``Record`` a measurement, the limits they are held against, and the table."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class Record:
    """One measured ratio.

    Attributes:
        name: the benchmark, such as ``tsa.attention``.
        params: what was varied: ``tokens``, ``kept``, ``threads``, ``batch``, ``window``, ``scoring``, whichever apply.
        baseline: what it is compared with, in words.
        unit: of ``value`` and ``baseline_value``.
        value, baseline_value: medians of ours and of the baseline.
        ratio: median of the paired ratios: baseline over ours for a time, ours over baseline for a rate.
        ratio_min, ratio_max: their spread.
        limit: the best ratio possible for these parameters, or None where no formula bounds it.
        machine: see ``trtpass.bench.measure.Machine``.
    """

    name: str
    params: dict[str, Any]
    baseline: str
    unit: str
    value: float
    baseline_value: float | None
    ratio: float | None
    ratio_min: float | None
    ratio_max: float | None
    limit: float | None
    machine: dict[str, Any] = field(default_factory=dict)


LIMITS = {
    "dense.attention": "1 (the matmul peak, for the rate of the baseline itself)",
    "tsa.attention": "S(S+1) / n(n+1) without scoring, S(S+1) / (n(n+1) + W S) with it; costs averaged over layers",
    "gpu.attention": "as tsa.attention",
    "tsa.overhead": "(S+1) / W: scoring needs one product of W rows with S keys, attention two of S rows with S/2",
    "tsa.prefill": "1 / (1 - a + a c): a = share of dense prefill that is attention of sparse layers, "
    "c = 1 / limit of tsa.attention",
    "ragged.decode": "dense keys / held keys: bytes of K and V that a step must read, all layers and heads together",
    "kvzap.bytes": "1 / share of the keys that are kept, as held by each head",
    "kvzap.decode": "(weights + dense K and V) / (weights + held K and V): bytes that a step must read",
    "kvzap.attention": "as ragged.decode",
    "scc.components": "baseline's time / time of the products alone at the matmul peak: half of each square of "
    "similarities, and tokens times final rows",
    "merge.encoder": "operations of the baseline's whole graph, head included / of ours; aim: 0.9 of it",
    "merge.overhead": "1: filter, correlation, merging, sizes and restoring cost nothing",
    "serve.overhead": "1: the server costs nothing; aim: 0.95 at 4 clients",
    "compile.passes": "none; aims: 10 s and 1 GB",
}
"""The formula behind ``Record.limit``, in words."""


def pairs(tokens: int) -> int:
    """Query-key pairs of causal attention among ``tokens`` tokens, times two: n(n+1)."""
    return tokens * (tokens + 1)


def attention_limit(tokens: int, kept: Sequence[int], window: int | None) -> float:
    """Best ratio of causal attention over ``tokens`` to that over ``kept`` (one number a layer).

    Args:
        tokens: S.
        kept: tokens kept in each layer, n.
        window: rows W that score, where scoring is part of the work; None where it is not.
    """
    scoring = 0 if window is None else window * tokens
    return pairs(tokens) / float(np.mean([pairs(n) + scoring for n in kept]))


def decode_limit(dense_keys: int, held_keys: int) -> float:
    """Best ratio of a decode step, which reads every key and value once: ``dense_keys`` against ``held_keys``."""
    return dense_keys / max(1, held_keys)


def timed(
    name: str,
    params: dict[str, Any],
    baseline: str,
    ours: np.ndarray,
    theirs: np.ndarray,
    limit: float | None,
    machine: dict[str, Any],
) -> Record:
    """A record of a time, in ms, from paired seconds ``[repeats]`` of both sides."""
    ratios = theirs / ours
    return Record(
        name,
        params,
        baseline,
        "ms",
        round(float(np.median(ours)) * 1e3, 4),
        round(float(np.median(theirs)) * 1e3, 4),
        round(float(np.median(ratios)), 4),
        round(float(ratios.min()), 4),
        round(float(ratios.max()), 4),
        None if limit is None else round(limit, 4),
        machine,
    )


def pays_from(records: Iterable[Record]) -> dict[str, str]:
    """For each series over ``tokens``, the length from which its ratio passes 1, interpolated between lengths."""
    series: dict[str, list[tuple[int, float]]] = {}
    for r in records:
        if r.name in ("tsa.attention", "tsa.prefill") and r.ratio is not None:
            label = f"{r.name} ({', '.join(f'{k}={v}' for k, v in r.params.items() if k in _SERIES)})"
            series.setdefault(label, []).append((int(r.params["tokens"]), r.ratio))
    return {label: _crossing(sorted(points)) for label, points in series.items()}


_SERIES = ("keep", "scoring", "select", "batch", "threads")


def _crossing(points: list[tuple[int, float]]) -> str:
    if points[0][1] >= 1:
        return f"pays at {points[0][0]} tokens already, the shortest measured"
    for (short, low), (long, high) in itertools.pairwise(points):
        if low < 1 <= high:
            at = short * (long / short) ** (math.log(low) / math.log(low / high))
            return f"pays from about {round(at, -1):.0f} tokens"
    return f"does not pay up to {points[-1][0]} tokens"


def render(records: Sequence[Record]) -> Group:
    """Tables for a terminal: one a benchmark, with its limit's formula, then lengths that pay, then the machine."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = []
    for name in dict.fromkeys(r.name for r in records):
        chosen = [r for r in records if r.name == name]
        table = Table(
            title=name, caption=f"limit: {LIMITS.get(name, 'none')}", title_justify="left", caption_justify="left"
        )
        shown = [k for k in dict.fromkeys(k for r in chosen for k in r.params) if k not in _HIDDEN]
        for column in (*shown, "ours", "baseline", "ratio", "min-max", "limit", "of limit"):
            table.add_column(column, justify="right", overflow="fold")
        for r in chosen:
            table.add_row(*(_cell(r.params.get(k)) for k in shown), *_numbers(r))
        parts += [table, *(Text(f"  baseline: {b}", style="dim") for b in dict.fromkeys(r.baseline for r in chosen))]
    parts += [Text(f"{label}: {text}") for label, text in pays_from(records).items()]
    if records:
        machine = records[0].machine
        parts.append(Text("machine: " + ", ".join(f"{k} {v}" for k, v in machine.items())))
    return Group(*parts)


_HIDDEN = ("inputs", "layers", "heads", "model", "load", "cores")  # in the JSON; too long or too constant for a column


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _numbers(r: Record) -> list[str]:
    def unit(x: float | None) -> str:
        return "" if x is None else f"{x:.4g} {r.unit}"

    if r.ratio is None:
        return [unit(r.value), unit(r.baseline_value), "", "", "", ""]
    spread = "" if r.ratio_min is None or r.ratio_max is None else f"{r.ratio_min:.2f}-{r.ratio_max:.2f}"
    limit = ["", ""] if r.limit is None else [f"{r.limit:.2f}", f"{r.ratio / r.limit:.0%}"]
    return [unit(r.value), unit(r.baseline_value), f"{r.ratio:.2f}", spread, *limit]

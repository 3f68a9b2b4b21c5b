"""``tsa.attention`` and ``tsa.overhead``: one token-sparse layer against the fastest dense attention.

The graphs hold the nodes that the pass inserts, lowered as an engine's are. How much is kept is forced, or left to the
coverage's own budget (meaningful on real q, k, v only).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trtpass.bench import layer
from trtpass.bench.dense import ATOL, BASELINES, ROWS, RTOL, baseline_call, baselines, check_dense, fastest
from trtpass.bench.inputs import Layers, attention_rows, check_selection
from trtpass.bench.layer import Heads
from trtpass.bench.measure import Array, Call, Graph, Machine, interleave, poisoned, require_close, sets_for
from trtpass.bench.record import Record, attention_limit, timed
from trtpass.passes.lower import lower

KEPT = (0.67, 0.5, 0.25)
OWN = "coverage"  # the budget decides
SELECT = ("head", "group")


@dataclass
class Set:
    """One set of buffers: inputs of a layer and, per way of selecting, what it selected."""

    q: Array
    k: Array
    v: Array
    dense: Call
    checked: bool  # the first set of each layer of the inputs is compared with the oracle


@dataclass
class Graphs:
    """Sessions that all lengths share."""

    dense: dict[str, Graph]
    scoring: dict[str, Graph]
    attending: dict[str, Graph]
    choosing: dict[str, Graph]


def sessions(h: Heads, threads: int) -> Graphs:
    def made(model: Any) -> Graph:
        return Graph(lower(model, "cpu").model, threads)

    return Graphs(
        baselines(h, threads),
        {s: made(layer.sparse(h, s)) for s in SELECT},
        {s: made(layer.sparse(h, s, scoring=False)) for s in SELECT},
        {s: made(layer.overhead(h, s)) for s in SELECT},
    )


def run(
    names: Sequence[str], lengths: Sequence[int], layers: Layers, h: Heads, machine: Machine, repeats: int
) -> list[Record]:
    """Records of ``tsa.attention`` and ``tsa.overhead``, whichever are in ``names``."""
    graphs = sessions(h, machine.threads)
    records: list[Record] = []
    for tokens in lengths:
        form = fastest(graphs.dense, h, layers, tokens, machine.clock)
        sets = _sets(graphs.dense[form], form, h, layers, tokens)
        params = {
            "tokens": tokens, "batch": 1, "threads": machine.threads, "window": h.window, "dense": form,
            "inputs": layers.source,
        }  # fmt: skip
        fractions: list[float | str] = [*KEPT, *([OWN] if layers.real else [])]
        if "tsa.attention" in names:
            for fraction in fractions:
                records += _attention(graphs, h, sets, fraction, params, machine, repeats)
        if "tsa.overhead" in names:
            records += _overhead(graphs, h, sets, fractions[-1] if layers.real else 0.5, params, machine, repeats)
    return records


def _sets(dense: Graph, form: str, h: Heads, layers: Layers, tokens: int) -> list[Set]:
    sets = []
    for number in range(sets_for(h.bytes_a_set(1, tokens))):
        q, k, v = layers.take(number, tokens)
        call, out = baseline_call(dense, h, q, k, v)
        checked = number < len(layers.qkv)
        if checked:
            call()
            check_dense(f"{form} at {tokens} tokens", q, k, v, out, h)
        sets.append(Set(q, k, v, call, checked))
    return sets


def _attention(
    graphs: Graphs, h: Heads, sets: Sequence[Set], fraction: float | str, params: dict[str, Any], machine: Machine,
    repeats: int,
) -> list[Record]:  # fmt: skip
    """Four series of one kept fraction, in the same rounds as dense: scoring or not, a set a head or a group."""
    tokens = int(params["tokens"])
    sides: dict[tuple[bool, str], list[Call]] = {(scoring, s): [] for scoring in (True, False) for s in SELECT}
    kept: dict[str, list[int]] = {s: [] for s in SELECT}
    for item in sets:
        for select in SELECT:
            scored, chosen = _scored(graphs.scoring[select], h, item, select, forced(fraction, tokens))
            kept[select].append(int(chosen["keep"][0]))
            sides[True, select].append(scored)
            given = {"index": chosen["index"], "count": chosen["count"]}
            call, out = baseline_call(graphs.attending[select], h, item.q, item.k, item.v, extra=given)
            call()
            if item.checked:
                require_close(f"attention with given selections ({select})", out, chosen["out"], ATOL, RTOL)
            sides[False, select].append(call)
    seconds = interleave([[item.dense for item in sets], *sides.values()], repeats, machine.clock)
    records = []
    for row, (scoring, select) in enumerate(sides, start=1):
        mine = {
            **params, "keep": fraction, "kept": round(float(np.mean(kept[select])) / tokens, 4),
            "scoring": scoring, "select": select,
        }  # fmt: skip
        limit = attention_limit(tokens, kept[select], h.window if scoring else None)
        records.append(
            timed("tsa.attention", mine, BASELINES[params["dense"]], seconds[row], seconds[0], limit, machine.as_dict())
        )
    return records


def forced(fraction: float | str, tokens: int) -> int:
    """Tokens to keep; 0 leaves it to the budget."""
    return 0 if isinstance(fraction, str) else max(1, round(fraction * tokens))


def _scored(graph: Graph, h: Heads, item: Set, select: str, keep: int) -> tuple[Call, dict[str, Array]]:
    """A checked call with scoring, and the buffers of all that it makes."""
    batch, tokens, _ = item.q.shape
    sets = h.sets(select)
    made = {
        "mass": poisoned((batch, h.heads, tokens)),
        "keep": poisoned((batch,), np.int32),
        "index": poisoned((batch, sets, tokens), np.int32),
        "count": poisoned((batch, sets), np.int32),
    }
    extra = {"lengths": np.full(batch, tokens, np.int32), "forced": np.full(batch, keep, np.int32)}
    call, out = baseline_call(graph, h, item.q, item.k, item.v, extra=extra, outputs=made)
    call()
    made["out"] = out
    if item.checked:
        _check(f"token-sparse attention ({select}, {tokens} tokens)", h, item, made, keep)
    return call, made


def _check(what: str, h: Heads, item: Set, made: dict[str, Array], keep: int) -> None:
    """Selections against the mass, mass and attended rows against the oracle, and dropped rows exactly zero."""
    tokens = item.q.shape[1]
    if keep:
        require_close(f"{what}, keep", made["keep"].astype(float), np.array([float(keep)]), 0.0, 0.0)
    check_selection(made["mass"], made["keep"], made["index"], made["count"], h, h.window, what)
    for head in range(h.heads):
        chosen_set = head * h.sets("head") // h.heads if made["index"].shape[1] == h.heads else head // h.group
        chosen = made["index"][0, chosen_set, : int(made["count"][0, chosen_set])]
        got = made["out"][0, :, head * h.width : (head + 1) * h.width]
        dropped = np.setdiff1d(np.arange(tokens), chosen)
        require_close(f"{what}, dropped rows", got[dropped], np.zeros((len(dropped), h.width)), 0.0, 0.0)
        rows = chosen[np.unique(np.linspace(0, len(chosen) - 1, ROWS).astype(int))]
        expected = attention_rows(item.q[0], item.k[0], item.v[0], head, rows, h, chosen)
        require_close(what, got[rows], expected, ATOL, RTOL)


def _overhead(
    graphs: Graphs, h: Heads, sets: Sequence[Set], fraction: float | str, params: dict[str, Any], machine: Machine,
    repeats: int,
) -> list[Record]:  # fmt: skip
    """Scoring, budget and selection alone: ``ratio`` is how many times they fit into dense attention."""
    tokens = int(params["tokens"])
    sides: dict[str, list[Call]] = {s: [] for s in SELECT}
    for item in sets:
        for select in SELECT:
            batch = item.q.shape[0]
            q, k = (
                np.ascontiguousarray(x.reshape(batch, tokens, n, h.width).transpose(0, 2, 1, 3))
                for x, n in ((item.q, h.heads), (item.k, h.kv_heads))
            )
            feeds = {
                "q": q, "k": k, "lengths": np.full(batch, tokens, np.int32),
                "forced": np.full(batch, forced(fraction, tokens), np.int32),
            }  # fmt: skip
            made = {
                "keep": poisoned((batch,), np.int32),
                "index": poisoned((batch, h.sets(select), tokens), np.int32),
                "count": poisoned((batch, h.sets(select)), np.int32),
            }
            call = graphs.choosing[select].bind(feeds, made)
            call()
            if item.checked:
                _, full = _scored(graphs.scoring[select], h, item, select, forced(fraction, tokens))
                for role in made:
                    require_close(f"selection alone, {role}", made[role].astype(float), full[role], 0.0, 0.0)
            sides[select].append(call)
    seconds = interleave([[item.dense for item in sets], *sides.values()], repeats, machine.clock)
    records = []
    for row, select in enumerate(sides, start=1):
        share = round(float(np.median(seconds[row] / seconds[0])), 4)
        mine = {**params, "keep": fraction, "select": select, "share": share}
        limit = (tokens + 1) / h.window
        records.append(
            timed("tsa.overhead", mine, BASELINES[params["dense"]], seconds[row], seconds[0], limit, machine.as_dict())
        )
    return records

"""``tsa.prefill``: whole prefill into a cache, the rewritten model against the dense one, over the same weights.

Beside it stands the share of attention in dense prefill, from a profile in the same process, and the limit that follows
from it (Amdahl): what is not attention in a sparse layer does not get faster.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from trtpass import io, passes
from trtpass.anchors import find
from trtpass.bench.inputs import text_ids
from trtpass.bench.measure import Array, Call, Graph, Machine, interleave, poisoned, require_close
from trtpass.bench.record import Record, attention_limit, timed
from trtpass.bench.sparse import KEPT, OWN, forced
from trtpass.ir import add_input, constant, make_node
from trtpass.passes import Site
from trtpass.passes.cache import insert_cache
from trtpass.passes.lower import lower

ATOL, RTOL = 2e-3, 2e-3  # of logits, as in trtpass.compare: 30 layers of float32
BASELINE = "the dense engine, lowered with the fastest attention, over the same weights"
ATTENTION = ("CausalAttention", "GroupQueryAttention", "Attention")


def run(
    lengths: Sequence[int], folder: Path, machine: Machine, repeats: int, spec: str = "token-sparse"
) -> list[Record]:
    """Prefill of one row at each length, with forced kept fractions in every sparse layer and with the coverage's own.

    Args:
        folder: of an engine; its ``dense.onnx`` and weights are read, and ``spec`` is applied to them anew.
        spec: the pass, in its textual form.
    """
    dense = io.load(folder / "dense.onnx")
    blocks = find(dense).blocks
    rewritten = dense.clone()
    step = passes.parse(spec)
    sites = step(rewritten).sites
    choose_keep(rewritten, sites)
    window = int(step.options.window)
    engines = {
        name: _Prefill(
            lower(insert_cache(model, "prefill"), "cpu").model, machine.threads, sites if name == "ours" else ()
        )
        for name, model in (("dense", dense), ("ours", rewritten))
    }
    ids = text_ids(folder, max(lengths))
    records: list[Record] = []
    for tokens in lengths:
        row = ids[:, :tokens]
        reference, expected = engines["dense"].bind(row, 0)
        reference()
        identity, logits = engines["ours"].bind(row, tokens)
        identity()
        require_close(f"prefill of {tokens} tokens, all of them kept", logits["logits"], expected["logits"], ATOL, RTOL)
        share = attention_share(dense, row, machine.threads)
        fractions: list[float | str] = [*KEPT, OWN]
        for fraction in fractions:
            call, outputs = engines["ours"].bind(row, forced(fraction, tokens))
            call()
            require_close(f"prefill at {fraction}", np.isnan(outputs["logits"]).astype(float), np.zeros(1), 0.0, 0.0)
            kept = [int(outputs[str(site.values["keep"]) + ".used"][0]) for site in sites]
            # In pairs: the memory of a side that waits for minutes may be reclaimed, which would favour the others.
            reference()
            seconds = interleave([[reference], [call]], repeats, machine.clock, warm=0)
            left = 1 / attention_limit(tokens, kept, window)
            sparse_share = share * len(sites) / len(blocks)
            params = {
                "tokens": tokens, "batch": 1, "threads": machine.threads, "window": window, "keep": fraction,
                "kept": round(float(np.mean(kept)) / tokens, 4), "scoring": True,
                "attention": round(share, 4), "sparse layers": f"{len(sites)}/{len(blocks)}",
                "select": step.options.select, "model": folder.parent.name,
            }  # fmt: skip
            limit = 1 / (1 - sparse_share + sparse_share * left)
            records.append(timed("tsa.prefill", params, BASELINE, seconds[1], seconds[0], limit, machine.as_dict()))
    return records


def choose_keep(model: ir.Model, sites: Sequence[Site]) -> None:
    """Add the input ``forced [batch]``, in place: tokens to keep in every sparse layer; 0 leaves it to its budget.

    What was used becomes an output, ``{keep}.used``.
    """
    graph = model.graph
    values = {v.name: v for node in graph for v in node.outputs}
    first = values[sites[0].values["keep"]]
    given = add_input(graph, "forced", ir.DataType.INT32, list(first.shape or []))
    nought = constant(graph, "forced.none", np.zeros(1, np.int32))
    for site in sites:
        own = values[site.values["keep"]]
        producer = own.producer()
        if producer is None:
            raise ValueError(f"'{own.name}' is an input")  # a pass makes it
        uses = list(own.uses())
        asked = make_node("Greater", [given, nought], [(f"{own.name}.asked", ir.DataType.BOOL, own.shape)])
        used = make_node("Where", [asked.outputs[0], given, own], [(f"{own.name}.used", ir.DataType.INT32, own.shape)])
        graph.insert_after(producer, [asked, used])
        for node, index in uses:
            node.replace_input_with(index, used.outputs[0])
        graph.outputs.append(used.outputs[0])


class _Prefill:
    """A prefill graph with its cache bound as past and present alike."""

    def __init__(self, model: ir.Model, threads: int, sites: Sequence[Site], profile: Path | None = None) -> None:
        self.graph = Graph(model, threads, profile)
        self.sites = sites
        self.past = {str(v.name): (v.shape, v.dtype) for v in model.graph.inputs if str(v.name).startswith("past.")}
        shape = next(v.shape for v in model.graph.outputs if v.name == "logits")
        self.vocab = int(shape[-1])  # type: ignore[index, arg-type]
        self.caches: dict[int, dict[str, Array]] = {}

    def bind(self, row: Array, keep: int) -> tuple[Call, Mapping[str, Array]]:
        """A call on one row of tokens ``[1, S]`` and its outputs; calls of one length share a cache."""
        tokens = row.shape[1]
        if tokens not in self.caches:
            self.caches = {
                tokens: {
                    name: np.zeros((1, int(shape[1]), tokens, int(shape[3])), np.float32)  # type: ignore[index, arg-type]
                    for name, (shape, _) in self.past.items()
                }
            }
        cache = self.caches[tokens]
        feeds: dict[str, Any] = {
            "input_ids": np.ascontiguousarray(row),
            "lengths": np.array([tokens], np.int32),
            "forced": np.array([keep], np.int32),
            **cache,
        }
        outputs = {"logits": poisoned((1, 1, self.vocab))}
        outputs |= {str(site.values["keep"]) + ".used": poisoned((1,), np.int32) for site in self.sites}
        outputs |= {name.replace("past.", "present.", 1): array for name, array in cache.items()}
        return self.graph.bind(feeds, outputs), outputs


def attention_share(dense: ir.Model, row: Array, threads: int) -> float:
    """Share of attention nodes in the time of all nodes of one dense prefill, the second of two."""
    with tempfile.TemporaryDirectory(prefix="trtpass-bench-") as folder:
        model = lower(insert_cache(dense, "prefill"), "cpu").model
        engine = _Prefill(model, threads, (), Path(folder) / "profile")
        call, _ = engine.bind(row, 0)
        call()
        call()
        events = json.loads(Path(engine.graph.session.end_profiling()).read_text())
    runs = [e["ts"] for e in events if e.get("name") == "model_run"]
    nodes = [
        e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time") and e["ts"] >= max(runs)
    ]
    attention = sum(e["dur"] for e in nodes if e["args"]["op_name"] in ATTENTION)
    return float(attention / sum(e["dur"] for e in nodes))

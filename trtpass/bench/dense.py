"""``dense.attention``: which dense form is fastest here, and how near it is to the matmul peak.

The fastest is the baseline of every sparse benchmark: the contrib GroupQueryAttention, or our own kernel in dense form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trtpass import native
from trtpass.bench import layer
from trtpass.bench.inputs import Layers, attention_rows
from trtpass.bench.layer import Heads
from trtpass.bench.measure import Array, Call, Graph, Machine, interleave, poisoned, require_close, sets_for
from trtpass.bench.record import Record, pairs, timed
from trtpass.errors import InputError

CONTRIB, OWN = "GroupQueryAttention", "CausalAttention"
BASELINES = {
    CONTRIB: "com.microsoft::GroupQueryAttention, past and present in one buffer",
    OWN: "trtpass::CausalAttention, the dense form of the same kernel, with the layer's cache written",
}
ATOL, RTOL = 2e-5, 1e-4  # rows are averages of v, a few units large; float32 sums of S terms
ROWS = 8  # rows a head that the oracle computes


def run(lengths: Sequence[int], layers: Layers, h: Heads, machine: Machine, repeats: int) -> list[Record]:
    """GroupQueryAttention against the other dense forms, and as a rate against the matmul peak."""
    from trtpass.passes.lower import lower

    graphs = {
        **baselines(h, machine.threads),
        "Attention-24, lowered to GroupQueryAttention": Graph(
            lower(layer.dense(h), "cpu", kernels=False).model, machine.threads
        ),
        "Attention-24": Graph(lower(layer.dense(h), "portable").model, machine.threads),
        "MultiHeadAttention": Graph(layer.multi_head(h), machine.threads),
    }
    records: list[Record] = []
    for tokens in lengths:
        count = sets_for(h.bytes_a_set(1, tokens))
        sides = {name: [] for name in graphs}  # type: dict[str, list[Call]]
        torch_side = torch_calls(h, layers, tokens, count, machine.threads)
        for number in range(count):
            q, k, v = layers.take(number, tokens)
            for name, graph in graphs.items():
                call, out = baseline_call(graph, h, q, k, v, cached=name != "MultiHeadAttention")
                if number < len(layers.qkv):
                    call()
                    check_dense(f"{name} at {tokens} tokens", q, k, v, out, h)
                sides[name].append(call)
        if torch_side:
            sides["torch scaled_dot_product_attention"] = torch_side
        seconds = interleave(list(sides.values()), repeats, machine.clock)
        params = {"tokens": tokens, "batch": 1, "threads": machine.threads, "inputs": layers.source}
        for row, name in enumerate(sides):
            if row:
                mine = {**params, "form": name}
                records.append(
                    timed(
                        "dense.attention", mine, BASELINES[CONTRIB], seconds[row], seconds[0], None, machine.as_dict()
                    )
                )
        for row, name in enumerate(sides):
            if name in BASELINES:
                records.append(_rate(name, params, pairs(tokens) * h.heads * 2 * h.width, seconds[row], machine))
    return records


def baselines(h: Heads, threads: int) -> dict[str, Graph]:
    """The forms that may be the fastest: GroupQueryAttention, and our own where the library of kernels is here."""
    from trtpass.passes.lower import lower

    found = {CONTRIB: Graph(layer.contrib(h), threads)}
    if isinstance(native.find(), native.Library):
        found[OWN] = Graph(lower(layer.dense(h), "cpu").model, threads)
    return found


def fastest(graphs: Mapping[str, Graph], h: Heads, layers: Layers, tokens: int, clock: str) -> str:
    """Which of them is, by the median of three rounds at this length."""
    calls = [[baseline_call(graph, h, *layers.take(0, tokens))[0]] for graph in graphs.values()]
    seconds = np.median(interleave(calls, 3, clock), axis=1)
    return list(graphs)[int(seconds.argmin())]


def _rate(form: str, params: dict[str, Any], operations: float, seconds: Array, machine: Machine) -> Record:
    rates = operations / seconds / 1e9
    ratios = rates / machine.matmul_gflops
    return Record(
        "dense.attention",
        {**params, "form": f"{form}, causal products only"},
        "matmul peak, float32 2048 x 2048 x 2048",
        "GFLOP/s",
        round(float(np.median(rates)), 1),
        machine.matmul_gflops,
        round(float(np.median(ratios)), 4),
        round(float(ratios.min()), 4),
        round(float(ratios.max()), 4),
        1.0,
        machine.as_dict(),
    )


def baseline_call(
    graph: Graph,
    h: Heads,
    q: Array,
    k: Array,
    v: Array,
    *,
    cached: bool = True,
    extra: dict[str, Array] | None = None,
    outputs: dict[str, Array] | None = None,
) -> tuple[Call, Array]:
    """A call of a layer graph on q, k, v ``[B, S, *]``, with a cache of S slots, and its poisoned output."""
    batch, tokens, _ = q.shape
    out = poisoned((batch, tokens, h.heads * h.width))
    feeds = {
        "q_flat": q, "k_flat": k, "v_flat": v,
        "seqlens": np.full(batch, tokens - 1, np.int32), "total": np.array(tokens, np.int32), **(extra or {}),
    }  # fmt: skip
    split = next(item.shape for item in graph.session.get_outputs() if item.name == "out")
    made = {"out": out if len(split) == 3 else out.reshape(batch, tokens, h.heads, h.width), **(outputs or {})}
    if cached:
        for role in ("key", "value"):
            # zeros, not NaN: past and present are one buffer, and a kernel may read a slot before it is written
            feeds[f"past_{role}"] = made[f"present_{role}"] = np.zeros((batch, h.kv_heads, tokens, h.width), np.float32)
    return graph.bind(feeds, made), out


def check_dense(what: str, q: Array, k: Array, v: Array, out: Array, h: Heads) -> None:
    """Some rows of every head against the oracle; no NaN is left anywhere."""
    tokens = q.shape[1]
    rows = np.unique(np.linspace(0, tokens - 1, ROWS).astype(int))
    require_close(f"{what}, unwritten values", np.isnan(out).astype(np.float32), np.zeros_like(out), 0.0, 0.0)
    for head in range(h.heads):
        got = out[0, rows, head * h.width : (head + 1) * h.width]
        require_close(what, got, attention_rows(q[0], k[0], v[0], head, rows, h), ATOL, RTOL)


def torch_calls(h: Heads, layers: Layers, tokens: int, count: int, threads: int) -> list[Call]:
    """The same on torch, where it is installed; checked like the others."""
    try:
        import torch
    except ImportError:
        return []
    torch.set_num_threads(threads)
    calls: list[Call] = []
    for number in range(count):
        flat = layers.take(number, tokens)
        heads = (h.heads, h.kv_heads, h.kv_heads)
        q, k, v = (
            torch.from_numpy(x).view(1, tokens, n, h.width).transpose(1, 2) for x, n in zip(flat, heads, strict=True)
        )

        def attend(q: Any = q, k: Any = k, v: Any = v) -> Any:
            with torch.inference_mode():
                out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                return out.transpose(1, 2).reshape(1, tokens, -1)

        if number < len(layers.qkv):
            check_dense(f"torch at {tokens} tokens", *flat, attend().numpy(), h)
        calls.append(attend)
    return calls


def need_lengths(lengths: Sequence[int]) -> None:
    """Raises InputError unless every length is at least 1."""
    if not lengths or min(lengths) < 1:
        raise InputError(f"lengths {list(lengths)}", "one or more, each at least 1 token")

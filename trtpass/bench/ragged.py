"""``ragged.decode``: one decode step of attention over what each KV head holds, against a dense step over everything.

A call is one step of a whole model: a graph of as many attention nodes as it has layers, each over a cache of its own,
so that every node finds its keys in memory and not in the processor's cache. Ours reads a pool of pages in random
order, through a table; dense reads contiguous rows of the whole context, and writes the new token's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from plugins import all_ops
from trtpass import native
from trtpass.bench.dense import ATOL, BASELINES, CONTRIB, RTOL
from trtpass.bench.layer import Heads, parse
from trtpass.bench.measure import CLOCKS, Array, Call, Graph, Machine, interleave, poisoned, require_close
from trtpass.bench.record import Record, decode_limit, timed
from trtpass.errors import InputError

KEPT = (1.0, 0.5, 0.25, 0.1)
PAGES = (16, 32, 64, 128)
SPREAD = 0.2  # lengths of heads are within this fraction of their mean, which is exact
CONTEXT = 8192
BATCHES = (1, 4)
LAYERS = 30
DTYPES = {
    "q": "float32",
    "k_pages": "float32",
    "v_pages": "float32",
    "page_table": "int32",
    "lengths": "int32",
    "queries": "int32",
}
OWN = "RaggedAttention of this library, all keys held, in pages of {page}"


@dataclass(frozen=True)
class Held:
    """What the owners of one layer hold: ``table`` int32 ``[B, Hkv, M]`` and ``lengths`` int32 ``[B, Hkv]``."""

    table: Array
    lengths: Array


@dataclass
class Layer:
    """Buffers of one layer.

    Attributes:
        q: ``[B, H, 1, D]``, both sides.
        new: key and value of this step for the dense side, ``[B, 1, Hkv D]`` each.
        cache: its keys and values ``[B, Hkv, context, D]`` each; the last row is for the new token.
        pools: our keys and values ``[slots, D]`` each, to be seen as pages of any size.
    """

    q: Array
    new: tuple[Array, Array]
    cache: tuple[Array, Array]
    pools: tuple[Array, Array]


def run(
    machine: Machine,
    repeats: int,
    h: Heads | None = None,
    context: int = CONTEXT,
    batches: Sequence[int] = BATCHES,
    layers: int = LAYERS,
) -> list[Record]:
    """Kept fractions and page sizes against the fastest dense step: GroupQueryAttention, or our own over everything.

    Raises:
        InputError: there is no library of native kernels.
        CheckFailed: a result is wrong.
    """
    return [r for batch in batches for r in _one_batch(machine, repeats, h or Heads(), context, batch, layers)]


def _one_batch(machine: Machine, repeats: int, h: Heads, context: int, batch: int, layers: int) -> list[Record]:
    if (fits := native.fits(all_ops()["RaggedAttention"], DTYPES)) is not True:
        raise InputError(f"ragged.decode: {fits}", "the library of native kernels", native.BUILD)
    rng = np.random.default_rng(batch)
    stack = [buffers(rng, h, context, batch) for _ in range(layers)]
    ours = Graph(paged(h, layers), machine.threads)
    sides: dict[tuple[float | None, int], Call]  # by kept fraction, None for the dense step, and page size
    sides = {(None, 0): dense_call(Graph(contiguous(h, layers), machine.threads), h, stack)}
    held: dict[float, int] = {}
    for fraction in KEPT:
        for page in PAGES:
            owned = [hold(rng, h, context, batch, fraction, page) for _ in stack]
            held[fraction] = sum(int(x.lengths.sum()) for x in owned)
            sides[fraction, page] = paged_call(ours, h, stack, owned, page)
    seconds = dict(zip(sides, interleave([[call] for call in sides.values()], repeats, machine.clock), strict=True))
    everything = layers * batch * h.kv_heads * context
    best = min((key for key in sides if key[0] in (None, 1.0)), key=lambda key: float(np.median(seconds[key])))
    baseline = BASELINES[CONTRIB] if best[0] is None else OWN.format(page=best[1])
    read = read_rate(machine.threads, machine.clock)
    records = []
    for (kept, page), times in seconds.items():
        keys = everything if kept is None else held[kept]
        rate = 2 * keys * h.width * 4 / float(np.median(times)) / 1e9
        params = {
            "context": context, "batch": batch, "threads": machine.threads, "layers": layers,
            "form": CONTRIB if kept is None else "RaggedAttention",
            "kept": 1.0 if kept is None else round(keys / everything, 4), "page": page or None,
            "GB/s": round(rate, 2), "of read": round(rate / read, 3),
            f"over {CONTRIB}": round(float(np.median(seconds[None, 0] / times)), 2),
        }  # fmt: skip
        limit = decode_limit(everything, keys)
        records.append(timed("ragged.decode", params, baseline, times, seconds[best], limit, machine.as_dict()))
    return records


def buffers(rng: np.random.Generator, h: Heads, context: int, batch: int) -> Layer:
    """A layer of noise; the cache's last row, which the new token is written to, is zero."""
    owners = batch * h.kv_heads

    def noise(*shape: int) -> Array:
        return rng.standard_normal(shape, np.float32, out=aligned(shape))

    cache = noise(batch, h.kv_heads, context, h.width), noise(batch, h.kv_heads, context, h.width)
    for x in cache:
        x[:, :, -1] = 0
    new = noise(batch, 1, h.kv_heads * h.width), noise(batch, 1, h.kv_heads * h.width)
    slots = owners * -(-context // max(PAGES)) * max(PAGES)
    return Layer(noise(batch, h.heads, 1, h.width), new, cache, (noise(slots, h.width), noise(slots, h.width)))


def aligned(shape: Sequence[int], to: int = 2 << 20) -> Array:
    """Uninitialised float32 that begins and ends with a huge page, so that the system can use no others for it."""
    memory = np.empty(-(-4 * math.prod(shape) // to) * to + to, np.uint8)
    start = -memory.ctypes.data % to
    return memory[start : start + 4 * math.prod(shape)].view(np.float32).reshape(shape)


def hold(rng: np.random.Generator, h: Heads, context: int, batch: int, kept: float, page: int) -> Held:
    """Lengths around ``kept`` of the context, of which their mean is exact, over the first pages in random order."""
    owners = batch * h.kv_heads
    mean = max(1, round(kept * context))
    away = np.zeros(owners, int)
    far = min(int(SPREAD * mean), mean - 1, context - mean)  # everything held leaves no room for more
    half = np.linspace(far, 0, owners // 2, endpoint=False).astype(int)
    away[: owners // 2], away[owners - owners // 2 :] = half, -half
    lengths = (mean + rng.permutation(away)).astype(np.int32)
    need = -(-lengths // page)
    pages = iter(rng.permutation(int(need.sum())))
    table = np.full((owners, int(need.max())), -1, np.int32)  # entries that are not used are no pages
    for owner, count in enumerate(need):
        table[owner, :count] = [next(pages) for _ in range(count)]
    return Held(table.reshape(batch, h.kv_heads, -1), lengths.reshape(batch, h.kv_heads))


def paged(h: Heads, layers: int) -> ir.Model:
    """A RaggedAttention node for each layer."""
    inputs = ", ".join(
        f"float[batch,{h.heads},1,{h.width}] q{i}, float[pages,page,{h.width}] k{i}, float[pages,page,{h.width}] v{i}, "
        f"int32[batch,{h.kv_heads},entries{i}] table{i}, int32[batch,{h.kv_heads}] lengths{i}"
        for i in range(layers)
    )
    outputs = ", ".join(f"float[batch,{h.heads},1,{h.width}] out{i}" for i in range(layers))
    body = "\n".join(
        f"out{i} = trtpass.RaggedAttention<scale=0.0>(q{i}, k{i}, v{i}, table{i}, lengths{i}, queries)"
        for i in range(layers)
    )
    return parse(f"paged ({inputs}, int32[batch] queries) => ({outputs}) {{{body}}}")


def contiguous(h: Heads, layers: int) -> ir.Model:
    """A GroupQueryAttention node for each layer, past and present to be bound to one buffer."""
    wide, narrow = h.heads * h.width, h.kv_heads * h.width
    cache = f"float[batch,{h.kv_heads},capacity,{h.width}]"
    inputs = ", ".join(
        f"float[batch,1,{wide}] q{i}, float[batch,1,{narrow}] k{i}, float[batch,1,{narrow}] v{i}, "
        f"{cache} past_key{i}, {cache} past_value{i}"
        for i in range(layers)
    )
    outputs = ", ".join(
        f"float[batch,1,{wide}] out{i}, {cache} present_key{i}, {cache} present_value{i}" for i in range(layers)
    )
    node = f"com.microsoft.GroupQueryAttention<num_heads={h.heads},kv_num_heads={h.kv_heads}>"
    body = "\n".join(
        f"out{i}, present_key{i}, present_value{i} = {node}("
        f"q{i}, k{i}, v{i}, past_key{i}, past_value{i}, seqlens, total)"
        for i in range(layers)
    )
    return parse(f"contiguous ({inputs}, int32[batch] seqlens, int32 total) => ({outputs}) {{{body}}}")


def dense_call(graph: Graph, h: Heads, stack: Sequence[Layer]) -> Call:
    """A checked step over the whole context."""
    batch, _, context, _ = stack[0].cache[0].shape
    feeds: dict[str, Array] = {"seqlens": np.full(batch, context - 1, np.int32), "total": np.array(context, np.int32)}
    made: dict[str, Array] = {}
    for i, x in enumerate(stack):
        feeds |= {f"q{i}": x.q.reshape(batch, 1, -1), f"k{i}": x.new[0], f"v{i}": x.new[1]}
        for role, cache in zip(("key", "value"), x.cache, strict=True):
            feeds[f"past_{role}{i}"] = made[f"present_{role}{i}"] = cache
        made[f"out{i}"] = poisoned((batch, 1, h.heads * h.width))
    call = graph.bind(feeds, made)
    call()
    for i, x in enumerate(stack):
        for new, cache in zip(x.new, x.cache, strict=True):
            require_close("the new token in the cache", cache[:, :, -1].reshape(batch, -1), new[:, 0], 0.0, 0.0)
        _check(f"GroupQueryAttention, layer {i}", made[f"out{i}"], x.q, *x.cache, i in (0, len(stack) - 1))
    return call


def paged_call(graph: Graph, h: Heads, stack: Sequence[Layer], owned: Sequence[Held], page: int) -> Call:
    """A checked step over what is held, in pages of ``page`` slots."""
    feeds: dict[str, Array] = {"queries": np.ones(len(stack[0].q), np.int32)}
    made: dict[str, Array] = {}
    for i, (x, held) in enumerate(zip(stack, owned, strict=True)):
        k, v = (pool.reshape(-1, page, h.width) for pool in x.pools)
        feeds |= {f"q{i}": x.q, f"k{i}": k, f"v{i}": v, f"table{i}": held.table, f"lengths{i}": held.lengths}
        made[f"out{i}"] = poisoned(x.q.shape)
    call = graph.bind(feeds, made)
    call()
    for i, (x, held) in enumerate(zip(stack, owned, strict=True)):
        what, checked = f"RaggedAttention, pages of {page}, layer {i}", i in (0, len(stack) - 1)
        for b, g in np.ndindex(held.lengths.shape) if checked else []:
            slots = (held.table[b, g].astype(np.int64)[:, None] * page + np.arange(page)).ravel()[: held.lengths[b, g]]
            mine = slice(b, b + 1), slice(g * h.group, (g + 1) * h.group)
            k, v = (pool[slots][None, None] for pool in x.pools)
            _check(what, made[f"out{i}"][mine], x.q[mine], k, v)
        _check(what, made[f"out{i}"], x.q, *x.cache, False)
    return call


def _check(what: str, out: Array, q: Array, k: Array, v: Array, values: bool = True) -> None:
    """No NaN is left in ``out``, ``[B, H, 1, D]`` in any form; with ``values``, it is attention in float64."""
    require_close(f"{what}, unwritten values", np.isnan(out).astype(np.float32), np.zeros_like(out), 0.0, 0.0)
    if values:
        grouped = q.reshape(*k.shape[:2], -1, k.shape[-1]).astype(np.float64)  # [B, Hkv, G, D]
        scores = grouped @ k.swapaxes(2, 3) / np.sqrt(k.shape[-1])
        weight = np.exp(scores - scores.max(-1, keepdims=True))
        expected = weight @ v / weight.sum(-1, keepdims=True)
        require_close(what, out.ravel(), expected.ravel(), ATOL, RTOL)


def read_rate(threads: int, clock: str = "wall", size: int = 1 << 24, repeats: int = 5) -> float:
    """GB/s at which ``threads`` threads read memory: the best of several dot products of ``size`` floats each."""
    pairs = [(np.ones(size, np.float32), np.ones(size, np.float32)) for _ in range(threads)]
    now, best = CLOCKS[clock], np.inf
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            start = now()
            list(pool.map(lambda pair: np.dot(*pair), pairs))
            best = min(best, now() - start)
    return 2 * size * 4 * threads / best / 1e9

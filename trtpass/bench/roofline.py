"""A roofline of the native kernels on this machine: ``python -m trtpass.bench.roofline docs/images/roofline.png``.

Each point is one operator at one size: its arithmetic (products only, as the limits of the benchmarks count them) over
the bytes that it must read and write at least once, and the rate that it reaches. The roof is what the machine was
measured to do in the same process: ONNX Runtime's float32 matmul, and reading memory.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trtpass.bench import ragged
from trtpass.bench.layer import Heads, parse
from trtpass.bench.measure import Array, Call, Graph, cores, interleave, matmul_peak, poisoned, sets_for
from trtpass.errors import InputError

TOKENS = 8192
REPEATS = 5


@dataclass(frozen=True)
class Point:
    """``flops`` and ``bytes`` of one call, and the seconds that it took (median)."""

    name: str
    flops: float
    bytes: float
    seconds: float

    @property
    def intensity(self) -> float:
        """FLOP a byte."""
        return self.flops / self.bytes

    @property
    def rate(self) -> float:
        """GFLOP/s."""
        return self.flops / self.seconds / 1e9


Inputs = dict[str, Array]
Make = Callable[[np.random.Generator], tuple[Inputs, Inputs]]


def points(h: Heads, threads: int) -> list[Point]:
    """All operators on noise, each over as many sets of buffers as defeat the last-level cache."""
    return [
        *(_dense(h, threads, tokens) for tokens in (256, 1024, TOKENS)),
        *(_sparse(h, threads, kept) for kept in (0.5, 0.25)),
        _mass(h, threads),
        _decode(h, threads, 0.25),
    ]


def _time(text: str, threads: int, make: Make) -> float:
    graph = Graph(parse(text), threads)
    rng = np.random.default_rng(0)
    first = make(rng)
    size = sum(x.nbytes for side in first for x in side.values())
    sets = [first, *(make(rng) for _ in range(sets_for(size) - 1))]
    calls: list[Call] = [graph.bind(*item) for item in sets]
    return float(np.median(interleave([calls], REPEATS)))


def _noise(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape, np.float32)


def _qkv(rng: np.random.Generator, h: Heads, tokens: int) -> Inputs:
    narrow = (1, tokens, h.kv_heads, h.width)
    return {"q": _noise(rng, 1, tokens, h.heads, h.width), "k": _noise(rng, *narrow), "v": _noise(rng, *narrow)}


def _layout(h: Heads) -> str:
    narrow = f"float[1,tokens,{h.kv_heads},{h.width}]"
    return f"float[1,tokens,{h.heads},{h.width}] q, {narrow} k, {narrow} v"


def _dense(h: Heads, threads: int, tokens: int) -> Point:
    def make(rng: np.random.Generator) -> tuple[Inputs, Inputs]:
        return _qkv(rng, h, tokens), {"out": poisoned((1, tokens, h.heads, h.width))}

    text = f"dense ({_layout(h)}) => (float[1,tokens,{h.heads},{h.width}] out) {{"
    seconds = _time(text + "out = trtpass.bshd.CausalAttention<scale=0.0>(q, k, v) }", threads, make)
    flops = 2.0 * h.width * h.heads * tokens * (tokens + 1)
    return Point(
        f"CausalAttention, {tokens} tokens", flops, 4.0 * tokens * h.width * 2 * (h.heads + h.kv_heads), seconds
    )


def _sparse(h: Heads, threads: int, kept: float) -> Point:
    number = round(kept * TOKENS)

    def make(rng: np.random.Generator) -> tuple[Inputs, Inputs]:
        chosen = np.full((1, h.heads, TOKENS), TOKENS, np.int32)
        for head in range(h.heads):
            chosen[0, head, :number] = np.sort(rng.permutation(TOKENS)[:number])
        given = {"index": chosen, "count": np.full((1, h.heads), number, np.int32)}
        return {**_qkv(rng, h, TOKENS), **given}, {"out": poisoned((1, TOKENS, h.heads, h.width))}

    text = (
        f"sparse ({_layout(h)}, int32[1,{h.heads},slots] index, int32[1,{h.heads}] count) => "
        f"(float[1,tokens,{h.heads},{h.width}] out) {{"
        "out = trtpass.bshd.TokenSparseAttention<scale=0.0>(q, k, v, index, count) }"
    )
    flops = 2.0 * h.width * h.heads * number * (number + 1)
    moved = 4.0 * h.width * h.heads * (3 * number + TOKENS)
    return Point(f"TokenSparseAttention, {kept} of {TOKENS}", flops, moved, _time(text, threads, make))


def _mass(h: Heads, threads: int) -> Point:
    def make(rng: np.random.Generator) -> tuple[Inputs, Inputs]:
        given = {name: x for name, x in _qkv(rng, h, TOKENS).items() if name != "v"}
        return {**given, "lengths": np.full(1, TOKENS, np.int32)}, {"mass": poisoned((1, h.heads, TOKENS))}

    qk = _layout(h).rpartition(", ")[0]
    text = (
        f"mass ({qk}, int32[1] lengths) => (float[1,{h.heads},tokens] mass) {{ mass = trtpass.bshd.ColumnMass"
        f"<window={h.window},pool={h.pool},prefix=1,scale=0.0>(q, k, lengths) }}"
    )
    flops = 2.0 * h.width * h.heads * h.window * TOKENS
    moved = 4.0 * (TOKENS * h.width * h.kv_heads + h.window * h.width * h.heads + TOKENS * h.heads)
    return Point(f"ColumnMass, {TOKENS} tokens", flops, moved, _time(text, threads, make))


def _decode(h: Heads, threads: int, kept: float, page: int = 64) -> Point:
    """A step of a whole model: one node alone would be mostly the waking of threads."""
    number, rng = round(kept * TOKENS), np.random.default_rng(0)
    stack = [ragged.buffers(rng, h, TOKENS, 1) for _ in range(ragged.LAYERS)]
    held = [ragged.hold(rng, h, TOKENS, 1, kept, page) for _ in stack]
    call = ragged.paged_call(Graph(ragged.paged(h, len(stack)), threads), h, stack, held, page)
    seconds = float(np.median(interleave([[call]], REPEATS)))
    flops, moved = 4.0 * h.width * h.heads * number, 8.0 * h.width * h.kv_heads * number
    return Point(f"RaggedAttention, decode over {number} keys", flops * len(stack), moved * len(stack), seconds)


def plot(found: list[Point], peak: float, read: float, file: Path) -> None:
    """``peak`` in GFLOP/s, ``read`` in GB/s."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    x = np.geomspace(0.5, 4 * max(p.intensity for p in found), 200)
    axes.plot(x, np.minimum(peak, read * x), color="black", linewidth=1.5)
    axes.text(peak / read * 1.1, peak * 1.05, f"ONNX Runtime's matmul: {peak:.0f} GFLOP/s", fontsize=8)
    axes.text(0.8, read * 0.62, f"reading memory:\n{read:.0f} GB/s", fontsize=8, ha="left")
    for p, marker in zip(found, itertools.cycle("osD^vP*"), strict=False):
        axes.plot(p.intensity, p.rate, marker, label=p.name, markersize=7, alpha=0.8)
    axes.legend(loc="lower right", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte that must be moved", ylabel="GFLOP/s")
    axes.grid(True, which="both", alpha=0.2)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main(file: Path) -> None:
    """Measure, print a table, and draw."""
    threads, h = cores(), Heads()
    peak, read = matmul_peak(threads), ragged.read_rate(threads)
    found = points(h, threads)
    print(f"matmul {peak:.0f} GFLOP/s, reading {read:.1f} GB/s, {threads} threads")
    for p in found:
        roof = min(peak, read * p.intensity)
        print(f"{p.name:<44} {p.intensity:8.1f} FLOP/B {p.rate:7.1f} GFLOP/s {p.rate / roof:6.0%} of the roof")
    plot(found, peak, read, file)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(str(InputError("no file to draw into", "one path, such as docs/images/roofline.png")))
    main(Path(sys.argv[1]))

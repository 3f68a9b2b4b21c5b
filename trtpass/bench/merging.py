"""``scc.components``: merging tokens by semantic connected components, whole, against others and a floor.

The baseline is the faster of two, both vectorised, with scipy for the components: PyTorch (where it is installed) and
NumPy. Times of both are in the records.

Two shapes: the two steps of LLaVA-Scissor (arXiv 2506.21862, section 3) on 32 frames of 14 x 14 tokens, and one step on
a stream of 2048. The floor is the time that the products of the similarities alone take at the machine's matmul rate:
half of each square, and tokens times final rows. That rate is ONNX Runtime's, which a kernel may exceed. Tokens are
made up: frames of a scene whose things come, change a little and go, some tokens of each frame like nothing else; how
many representatives that leaves is in the records.

NumPy runs on the threads that its BLAS takes. Environment variables OPENBLAS_* slow it on some machines: unset them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from trtpass import native
from trtpass.bench.layer import parse
from trtpass.bench.measure import Array, Call, Graph, Machine, interleave, poisoned, require_close, sets_for
from trtpass.bench.merging_baselines import ATOL, BASELINES, RTOL, TAU, Merged, in_numpy, in_torch, require_same
from trtpass.bench.record import Record, timed
from trtpass.errors import CheckFailed, InputError
from trtpass.passes.lower import lower

SETTLE = 0.1  # seconds between calls, while the threads of NumPy's products still spin
ROOM = 1.25  # slots for representatives over the most that any set of tokens needs


class NotHere(InputError):
    """This machine lacks what the benchmark needs."""


@dataclass(frozen=True)
class Shape:
    """Tokens `[F, n, E]`; ``steps`` 2: components of each frame, of their means, and a join; 1: components and means.

    ``things`` are seen in each frame; a fraction ``gone`` of them is others in the next one.
    """

    frames: int
    tokens: int
    width: int
    steps: int
    things: int
    gone: float = 0.3

    @property
    def all(self) -> int:
        return self.frames * self.tokens


SHAPES = (Shape(32, 196, 896, 2, 24), Shape(1, 2048, 384, 1, 150))


def run(machine: Machine, repeats: int, shapes: Sequence[Shape] = SHAPES) -> list[Record]:
    """A record a shape: time of our graph against the faster baseline's, the best ratio from the floor.

    Raises:
        NotHere: scipy is not installed.
        CheckFailed: our labels, matches or rows, or PyTorch's, differ from NumPy's.
    """
    try:
        import scipy  # noqa: F401
    except ImportError as error:
        raise NotHere("scipy is not installed", "scipy, for the baseline", "pip install scipy") from error
    with torch_threads(machine.threads) as has_torch:
        return [_one_shape(machine, repeats, shape, has_torch) for shape in shapes]


@contextmanager
def torch_threads(threads: int) -> Iterator[bool]:
    """PyTorch on as many threads, and whether it is installed."""
    try:
        import torch
    except ImportError:
        yield False
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield True
    finally:
        torch.set_num_threads(before)


def _one_shape(machine: Machine, repeats: int, shape: Shape, has_torch: bool) -> Record:
    sets = [scene(seed, shape) for seed in range(sets_for(4 * shape.all * shape.width))]
    expected = [in_numpy(x, shape.steps) for x in sets]
    capacities = _capacities(shape, expected)
    graph = Graph(lower(two_steps(shape, capacities) if shape.steps == 2 else one_step(capacities), "cpu").model,
                  machine.threads)  # fmt: skip
    ours: list[Call] = []
    for x, right in zip(sets, expected, strict=True):
        call, made = bound(graph, x, shape, capacities)
        call()
        check(made, right)
        ours.append(call)
    sides = {"numpy": _calls(in_numpy, sets, shape.steps)}
    if has_torch:
        for x, right in zip(sets, expected, strict=True):
            require_same(in_torch(x, shape.steps), right)
        sides["torch"] = _calls(in_torch, sets, shape.steps)
    seconds = interleave([ours, *sides.values()], repeats, machine.clock, settle=SETTLE)
    times = dict(zip(sides, np.median(seconds[1:], 1), strict=True))
    fastest = min(times, key=lambda side: times[side])
    theirs = seconds[1 + list(sides).index(fastest)]
    floor = float(np.mean([operations(shape, right.counts) for right in expected])) / machine.matmul_gflops / 1e9
    counts = np.mean([right.counts for right in expected], 0)
    library = native.find()
    params: dict[str, Any] = {
        "frames": shape.frames, "tokens": shape.tokens, "width": shape.width, "steps": shape.steps, "tau": TAU,
        "threads": machine.threads, "a frame": round(float(counts[0]) / shape.frames, 1),
        "representatives": round(float(counts[0])), "final": round(float(counts[-1])),
        "kernels": "none" if isinstance(library, str) else native.isa(),
        "floor_ms": round(floor * 1e3, 3), "times_floor": round(float(np.median(seconds[0])) / floor, 3),
        **{f"{side}_ms": round(float(seconds) * 1e3, 3) for side, seconds in times.items()},
    }  # fmt: skip
    limit = float(times[fastest]) / floor
    return timed("scc.components", params, BASELINES[fastest], seconds[0], theirs, limit, machine.as_dict())


def _calls(side: Callable[[Array, int], Merged], sets: Sequence[Array], steps: int) -> list[Call]:
    def call_of(x: Array) -> Call:
        def call() -> None:
            side(x, steps)

        return call

    return [call_of(x) for x in sets]


def operations(shape: Shape, counts: Sequence[int]) -> int:
    """Multiplications and additions that no form can do without: every pair of a comparison once."""
    pairs = shape.frames * shape.tokens * (shape.tokens - 1) // 2
    if shape.steps == 2:
        representatives, final = counts
        pairs += representatives * (representatives - 1) // 2 + shape.all * final
    return 2 * shape.width * pairs


def scene(seed: int, shape: Shape) -> Array:
    """Tokens `[F, n, E]` float32: within a thing cosines of about 0.95, 0.99 from its mean in one frame to the next."""
    rng = np.random.default_rng(seed)

    def directions(*count: int) -> Array:
        return rng.standard_normal((*count, shape.width), np.float32) / np.float32(np.sqrt(shape.width))

    things, frames = directions(shape.things), []
    for _ in range(shape.frames):
        cut = np.sort(rng.integers(shape.tokens, size=shape.things - 1))  # regions of all sizes, in raster order
        seen = things[np.searchsorted(cut, np.arange(shape.tokens), side="right")]
        odd = rng.random((shape.tokens, 1)) < 0.03
        tokens = np.where(odd, directions(shape.tokens), seen + 0.2 * directions(shape.tokens))
        frames.append(tokens * np.exp(0.3 * rng.standard_normal((shape.tokens, 1))) * 30)
        others = rng.random((shape.things, 1)) < shape.gone
        things = np.where(others, directions(shape.things), things + 0.1 * directions(shape.things))
        things /= np.linalg.norm(things, axis=1, keepdims=True)
    return np.ascontiguousarray(np.stack(frames), np.float32)


def _capacities(shape: Shape, expected: Sequence[Merged]) -> list[int]:
    """``max_segments_permille`` of each step's means, with room to spare over what was counted."""
    slots, permille = shape.all, []
    for most in np.max([right.counts for right in expected], 0):
        permille.append(int(np.clip(-(-ROOM * most * 1000 // slots), 1, 1000)))
        slots = (slots * permille[-1] + 999) // 1000
    return permille


def one_step(permille: Sequence[int]) -> ir.Model:
    return parse(
        f"""one_step (float[frames,tokens,width] x, int32[frames] lengths)
            => (int32[frames,tokens] label, int32[frames] components, float[frames,slots,width] merged,
                int32[frames,slots] size) {{
            label, components = trtpass.ConnectedComponents<tau={TAU}>(x, lengths)
            merged, size = trtpass.SegmentMean<max_segments_permille={permille[0]}>(x, label)
        }}"""
    )


def two_steps(shape: Shape, permille: Sequence[int]) -> ir.Model:
    """The representatives of all frames are one row, whose components are joined by every token."""
    width = shape.width
    return parse(
        f"""two_steps (float[frames,tokens,{width}] x, int32[frames] lengths)
            => (int32[1,all] numbered, int32[1] total, int32[1] final, int32[1,all] match,
                float[1,rows,{width}] merged, float[1,rows] size) {{
            axis0 = Constant<value_ints=[0]>()
            axis1 = Constant<value_ints=[1]>()
            along = Constant<value_int=0>()
            row = Constant<value_ints=[1,-1]>()
            rows_of = Constant<value_ints=[1,-1,{width}]>()
            label, components = trtpass.ConnectedComponents<tau={TAU}>(x, lengths)
            before = CumSum<exclusive=1>(components, along)
            first = Unsqueeze(before, axis1)
            numbers = Add(label, first)
            numbered = Reshape(numbers, row)
            flat = Reshape(x, rows_of)
            mean, members = trtpass.SegmentMean<max_segments_permille={permille[0]}>(flat, numbered)
            total = ReduceSum<keepdims=1>(components, axis0)
            group, final = trtpass.ConnectedComponents<tau={TAU}>(mean, total)
            base, joined = trtpass.SegmentMean<max_segments_permille={permille[1]}>(mean, group)
            match, similarity = trtpass.BipartiteMatch(flat, base, final)
            base_shape = Shape<start=0,end=2>(base)
            flat_shape = Shape<start=0,end=2>(flat)
            base_size = ConstantOfShape<value=float[1] {{1}}>(base_shape)
            flat_size = ConstantOfShape<value=float[1] {{1}}>(flat_shape)
            merged, size = trtpass.MergeTokens(base, base_size, flat, flat_size, match)
        }}"""
    )


def bound(graph: Graph, x: Array, shape: Shape, permille: Sequence[int]) -> tuple[Call, dict[str, Array]]:
    """A call on one set of tokens, and its poisoned outputs."""
    slots = (shape.all * permille[0] + 999) // 1000
    integer = np.int32
    if shape.steps == 2:
        slots = (slots * permille[1] + 999) // 1000
        made = {
            "numbered": poisoned((1, shape.all), integer), "total": poisoned((1,), integer),
            "final": poisoned((1,), integer), "match": poisoned((1, shape.all), integer),
            "merged": poisoned((1, slots, shape.width)), "size": poisoned((1, slots)),
        }  # fmt: skip
    else:
        made = {
            "label": poisoned((1, shape.all), integer), "components": poisoned((1,), integer),
            "merged": poisoned((1, slots, shape.width)), "size": poisoned((1, slots), integer),
        }  # fmt: skip
    feeds = {"x": x, "lengths": np.full(shape.frames, shape.tokens, np.int32)}
    return graph.bind(feeds, made), made


def check(made: dict[str, Array], right: Merged) -> None:
    """Labels, counts, matches and sizes exactly, rows within rounding."""
    label = made["numbered"] if "numbered" in made else made["label"]
    count = right.counts[-1]
    exact = {"label": (label[0], right.label), "size": (made["size"][0, :count], right.size)}
    for name, number in zip(("total", "final") if "total" in made else ("components",), right.counts, strict=True):
        exact[name] = (made[name], np.array([number]))
    if right.match is not None:
        exact["match"] = (made["match"][0], right.match)
    for name, (got, expected) in exact.items():
        require_close(f"scc.components, {name}", got.astype(np.float64), expected.astype(np.float64), 0.0, 0.0)
    require_close("scc.components, rows", made["merged"][0, :count], right.merged.astype(np.float64), ATOL, RTOL)
    if not np.all(made["merged"][0, count:] == 0):
        raise CheckFailed(
            "scc.components: rows behind the last are not zero", "zeros", "run the tests of the operators"
        )

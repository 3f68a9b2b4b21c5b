"""``scc.components``: merging tokens by semantic connected components, whole, against NumPy and scipy and a floor.

Two shapes: the two steps of LLaVA-Scissor (arXiv 2506.21862, section 3) on 32 frames of 14 x 14 tokens, and one step on
a stream of 2048. The floor is the time that the products of the similarities alone take at the machine's matmul rate:
half of each square, and tokens times final rows. That rate is ONNX Runtime's, which a kernel may exceed. Tokens are
made up: frames of a scene whose things come, change a little and go, some tokens of each frame like nothing else; how
many representatives that leaves is in the records.

NumPy runs on the threads that its BLAS takes. Environment variables OPENBLAS_* slow it on some machines: unset them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from trtpass import native
from trtpass.bench.layer import parse
from trtpass.bench.measure import Array, Call, Graph, Machine, interleave, poisoned, require_close, sets_for
from trtpass.bench.record import Record, timed
from trtpass.errors import CheckFailed, InputError
from trtpass.passes.lower import lower

SETTLE = 0.1  # seconds between calls, while the threads of NumPy's products still spin
BASELINE = "NumPy (batched products, segment sums as sparse products) and scipy.sparse.csgraph.connected_components"
TAU = 0.9
ATOL, RTOL = 1e-4, 1e-4  # means of float32 values of size 1 to 10
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


@dataclass
class Merged:
    """What both sides make.

    Attributes:
        label: of each token, over all frames, ``[F n]``.
        counts: components after each step.
        match: with two steps, the final row that each token joins ``[F n]``.
        merged: means of the first step `[K, E]`, or the rows after the join.
        size: tokens in each, float.
    """

    label: Array
    counts: list[int]
    match: Array | None
    merged: Array
    size: Array


def run(machine: Machine, repeats: int, shapes: Sequence[Shape] = SHAPES) -> list[Record]:
    """A record a shape: time of our graph against NumPy's, the best ratio from the floor.

    Raises:
        NotHere: scipy is not installed.
        CheckFailed: labels, matches or rows differ from NumPy's.
    """
    try:
        import scipy  # noqa: F401
    except ImportError as error:
        raise NotHere("scipy is not installed", "scipy, for the baseline", "pip install scipy") from error
    return [_one_shape(machine, repeats, shape) for shape in shapes]


def _one_shape(machine: Machine, repeats: int, shape: Shape) -> Record:
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
    theirs: list[Call] = [lambda x=x: _discard(in_numpy(x, shape.steps)) for x in sets]  # type: ignore[misc]
    seconds = interleave([ours, theirs], repeats, machine.clock, settle=SETTLE)
    floor = float(np.mean([operations(shape, right.counts) for right in expected])) / machine.matmul_gflops / 1e9
    counts = np.mean([right.counts for right in expected], 0)
    library = native.find()
    params: dict[str, Any] = {
        "frames": shape.frames, "tokens": shape.tokens, "width": shape.width, "steps": shape.steps, "tau": TAU,
        "threads": machine.threads, "a frame": round(float(counts[0]) / shape.frames, 1),
        "representatives": round(float(counts[0])), "final": round(float(counts[-1])),
        "kernels": "none" if isinstance(library, str) else native.isa(),
        "floor_ms": round(floor * 1e3, 3), "times_floor": round(float(np.median(seconds[0])) / floor, 3),
    }  # fmt: skip
    limit = float(np.median(seconds[1])) / floor
    return timed("scc.components", params, BASELINE, seconds[0], seconds[1], limit, machine.as_dict())


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


def in_numpy(x: Array, steps: int) -> Merged:
    """The same in NumPy and scipy: what one would write without our operators, no loop over frames or tokens."""
    flat = x.reshape(-1, x.shape[-1])
    unit = _unit(flat)
    label = _components(unit.reshape(x.shape))
    member = _members(label)
    size = np.diff(member.indptr)
    mean = (member @ flat) / size[:, None].astype(np.float32)
    if steps == 1:
        return Merged(label, [len(mean)], None, mean, size)
    group = _members(_components(_unit(mean)[None]))
    base = (group @ mean) / np.diff(group.indptr)[:, None].astype(np.float32)
    match = np.argmax(unit @ _unit(base).T, axis=1)
    joined = _members(match, len(base))
    size = np.diff(joined.indptr) + 1
    return Merged(label, [len(mean), len(base)], match, (base + joined @ flat) / size[:, None].astype(np.float32), size)


def _unit(x: Array) -> Array:
    return x / np.sqrt(np.einsum("te,te->t", x, x))[:, None]


def _components(unit: Array) -> Array:
    """Components of each group of `[G, n, E]`, numbered over all groups by the index of their head, ``[G n]``."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    groups, tokens, _ = unit.shape
    near = np.matmul(unit, unit.transpose(0, 2, 1)) > TAU
    near.reshape(groups, -1)[:, :: tokens + 1] = False
    degree = np.count_nonzero(near, axis=2).ravel()
    edge = np.flatnonzero(near)
    column = edge // (tokens * tokens) * tokens + edge % tokens
    starts = np.concatenate([[0], np.cumsum(degree)])
    graph = csr_array((np.ones(len(edge), np.int8), column, starts), shape=(len(degree), len(degree)))
    _, found = connected_components(graph, directed=False)
    order = np.lexsort((np.arange(len(degree)), -degree, found))
    head = order[np.unique(found[order], return_index=True)[1]]
    number = np.empty(len(head), np.int64)
    number[np.argsort(head)] = np.arange(len(head))
    return number[found]


def _members(label: Array, rows: int = 0) -> Any:
    """A sparse matrix of ones `[segments, tokens]`: times tokens it sums each segment."""
    from scipy.sparse import csr_array

    counts = np.bincount(label, minlength=rows)
    starts = np.concatenate([[0], np.cumsum(counts)])
    order = np.argsort(label, kind="stable")
    return csr_array((np.ones(len(label), np.float32), order, starts), shape=(len(counts), len(label)))


def _discard(_: Merged) -> None:
    """A call returns nothing."""

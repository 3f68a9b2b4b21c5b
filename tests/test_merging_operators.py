"""Operators that merge tokens: against scipy and plain numpy, their invariants, and that their cases are decidable."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_op import Array, in_onnxruntime, in_torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from plugins import all_ops
from plugins.connected_components.cases import arcs
from trtpass.errors import InputError
from trtpass.op import Case

COMPONENTS, MEAN, MATCH, MERGE = (
    all_ops()[name] for name in ("ConnectedComponents", "SegmentMean", "BipartiteMatch", "MergeTokens")
)
SEEDS = range(4)  # more than the generic tests use


def cosines(a: Array, b: Array) -> Array:
    """Cosines float64 `[S, R]`; NaN wherever a vector has no direction."""
    with np.errstate(all="ignore"):
        units = []
        for x in (a, b):
            square = np.square(x.astype(np.float32)).sum(-1)
            directed = np.isfinite(square) & (square >= np.finfo(np.float32).tiny)
            wide = x.astype(np.float64)
            unit = wide / np.sqrt(np.square(wide).sum(-1, keepdims=True))
            units.append(np.where(directed[:, None], unit, np.nan))
        return units[0] @ units[1].T


def all_cases(op: Any) -> list[Any]:
    return [pytest.param(case, id=case.name) for case in op.case_list()]


@pytest.mark.parametrize("case", all_cases(COMPONENTS))
def test_no_cosine_of_a_case_is_near_tau(case: Case) -> None:
    tau = case.attrs.get("tau", 0.9)
    for seed in SEEDS:
        x, lengths = case.make(seed)
        for tokens, length in zip(x, lengths, strict=True):
            cosine = cosines(tokens[:length], tokens[:length])[np.triu_indices(length, 1)]
            away = np.abs(cosine - tau)
            assert np.nanmin(away, initial=np.inf) > 1e-3


def test_cases_have_components_of_many_sizes() -> None:
    """Neither all apart nor all together: most cases hold singletons, pairs and larger components at once."""
    mixed = 0
    for case in COMPONENTS.case_list():
        label, _ = in_torch(COMPONENTS, case.make(0), case.attrs)
        sizes = set(np.unique(label[0][label[0] < label.shape[1]], return_counts=True)[1].tolist())
        mixed += len(sizes) >= 3
    assert mixed >= 8


@pytest.mark.parametrize("case", all_cases(MATCH))
def test_best_matches_of_a_case_are_far_ahead_or_exact_ties(case: Case) -> None:
    for seed in SEEDS:
        a, b, lengths = case.make(seed)
        for left, right, length in zip(a, b, lengths, strict=True):
            if length == 0:
                continue
            cosine = np.nan_to_num(cosines(left, right[:length]), nan=-2.0)
            gap = cosine.max(1, keepdims=True) - cosine
            tied = gap < 1e-9
            assert gap[~tied].min(initial=np.inf) > 1e-4
            if (tied & (cosine > -2)).sum(1).max() > 1:  # ties: exact in float32, whatever the order of summing
                assert "ties" in case.name or case.name == "one-wide"
                norms = np.linalg.norm(right[:length].astype(np.float64), axis=-1)
                exponents = np.log2(norms[np.isfinite(norms) & (norms > 0)])
                np.testing.assert_array_equal(exponents, np.round(exponents))


@pytest.mark.parametrize("case", all_cases(COMPONENTS))
def test_components_are_those_of_scipy(case: Case) -> None:
    x, lengths = case.make(2)
    labels, components = in_torch(COMPONENTS, (x, lengths), case.attrs)
    for tokens, length, label, count in zip(x, lengths, labels, components, strict=True):
        near = cosines(tokens[:length], tokens[:length]) > case.attrs.get("tau", 0.9)
        expected_count, expected = connected_components(coo_array(near), directed=False) if length else (0, [])
        assert count == expected_count
        assert len(set(zip(label[:length].tolist(), list(expected), strict=True))) == expected_count  # one to one
        assert np.all(label[length:] == x.shape[1])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), tokens=st.integers(1, 60), width=st.sampled_from([1, 2, 7, 33]))
def test_a_permutation_permutes_the_components(seed: int, tokens: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    x = arcs(rng, tokens, width).astype(np.float32)
    order = rng.permutation(tokens)
    lengths = np.array([tokens, tokens], np.int32)
    (before, after), components = in_torch(COMPONENTS, (np.stack([x, x[order]]), lengths), {})
    assert components[0] == components[1]
    assert len(set(zip(before[order].tolist(), after.tolist(), strict=True))) == components[0]


def incidence(edges: list[tuple[int, int]], tokens: int) -> Array:
    """Tokens `[1, S, E]` with a cosine of 1 / 8 along the given edges and 0 elsewhere; at most 8 edges a token."""
    x = np.zeros((tokens, len(edges) + tokens), np.float32)
    for axis, (i, j) in enumerate(edges):
        x[[i, j], axis] = 1.0
    degree = x.sum(1)
    x[np.arange(tokens), len(edges) + np.arange(tokens)] = np.sqrt(8 - degree)
    return x[None]


@pytest.mark.parametrize("kind", ["reference", "static"])
def test_components_are_numbered_by_the_index_of_their_head(kind: str) -> None:
    """Heads: 5 of the star {0, 5, 6, 8}; 1 of {1, 7} (equal degrees: the lower); 3 of the path 2-3-4; 9 alone."""
    x = incidence([(5, 0), (5, 6), (5, 8), (1, 7), (2, 3), (3, 4)], 10)
    inputs = (x, np.array([10], np.int32))
    run = in_torch if kind == "reference" else lambda *rest: in_onnxruntime(rest[0], kind, *rest[1:])
    label, components = run(COMPONENTS, inputs, {"tau": 0.06})
    assert label.tolist() == [[2, 0, 1, 1, 1, 2, 2, 0, 2, 3]]
    assert components.tolist() == [4]


def test_no_direction_no_component_but_its_own() -> None:
    x = np.array([[[3, 4], [0, 0], [-3, -4], [np.nan, 1], [0, np.inf], [1e-22, 0], [6e30, 0], [8, 6]]], np.float32)
    label, components = in_torch(COMPONENTS, (x, np.array([8], np.int32)), {"tau": -2.0})
    assert label.tolist() == [[0, 1, 0, 2, 3, 4, 5, 0]]
    assert components.tolist() == [6]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        (COMPONENTS, [(2, 0, 4), (2,)]),
        (COMPONENTS, [(0, 3, 4), (0,)]),
        (MEAN, [(2, 0, 4), (2, 0)]),
        (MATCH, [(2, 3, 4), (2, 0, 4), (2,)]),
        (MATCH, [(2, 0, 4), (2, 3, 4), (2,)]),
        (MERGE, [(2, 0, 4), (2, 0), (2, 3, 4), (2, 3), (2, 3)]),
        (MERGE, [(2, 3, 4), (2, 3), (2, 0, 4), (2, 0), (2, 0)]),
    ],
)
def test_nothing_at_all(op: Any, shapes: list[tuple[int, ...]], kind: str) -> None:
    """Without tokens or without rows bodies give what the reference gives."""
    inputs = [
        np.ones(s, "i4" if port.dtypes == ("int32",) else "f4") for port, s in zip(op.inputs, shapes, strict=True)
    ]
    for mine, theirs in zip(in_onnxruntime(op, kind, inputs, {}), in_torch(op, inputs, {}), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("op", [COMPONENTS, MATCH], ids=lambda op: op.name)
def test_lengths_are_clipped(op: Any) -> None:
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((2, 9, 5)).astype(np.float32) for _ in op.inputs[1:]]
    wild, clipped = np.array([99, -5], np.int32), np.array([9, 0], np.int32)
    expected = in_torch(op, (*inputs, clipped), {})
    for made in (in_torch(op, (*inputs, wild), {}), in_onnxruntime(op, "static", (*inputs, wild), {})):
        np.testing.assert_array_equal(made[0], expected[0])


def test_wrong_attributes_are_refused() -> None:
    x, label = np.ones((1, 2, 3), np.float32), np.zeros((1, 2), np.int32)
    with pytest.raises(InputError, match="tau is NaN"):
        in_torch(COMPONENTS, (x, np.array([2], np.int32)), {"tau": float("nan")})
    for permille in (0, 1001):
        with pytest.raises(InputError, match="1 to 1000"):
            in_torch(MEAN, (x, label), {"max_segments_permille": permille})


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_sums_do_not_depend_on_threads(kind: str) -> None:
    """Enough work for ONNX Runtime to share it out; integers in float32, so that every order has the same sum."""
    rng = np.random.default_rng(0)
    x = rng.integers(-9, 10, (1, 3000, 65)).astype(np.float32)
    label = rng.integers(0, 3, (1, 3000)).astype(np.int32)
    attrs = {"max_segments_permille": 10}
    expected = in_torch(MEAN, (x, label), attrs)
    for _ in range(3):
        mean, size = in_onnxruntime(MEAN, kind, (x, label), attrs, threads=2)
        np.testing.assert_array_equal(size, expected[1])
        np.testing.assert_allclose(mean, expected[0], rtol=1e-6, atol=0)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), tokens=st.integers(1, 40), rows=st.integers(1, 12))
def test_merging_conserves_sizes_and_mass(seed: int, tokens: int, rows: int) -> None:
    """Whole sizes add up exactly, and sizes times vectors up to rounding."""
    rng = np.random.default_rng(seed)
    base, x = (rng.standard_normal((2, n, 5)).astype(np.float32) for n in (rows, tokens))
    base_size, size = (rng.integers(0, 5, (2, n)).astype(np.float32) for n in (rows, tokens))
    target = rng.integers(0, rows, (2, tokens)).astype(np.int32)
    merged, merged_size = in_torch(MERGE, (base, base_size, x, size, target), {})
    np.testing.assert_array_equal(merged_size.sum(1), base_size.sum(1) + size.sum(1))
    held = np.einsum("br,bre->be", base_size, base) + np.einsum("bs,bse->be", size, x)
    np.testing.assert_allclose(np.einsum("br,bre->be", merged_size, merged), held, rtol=1e-5, atol=1e-4)
    assert np.all(merged[merged_size == 0] == 0)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), tokens=st.integers(1, 40), permille=st.integers(1, 1000))
def test_segment_sizes_count_the_tokens_inside(seed: int, tokens: int, permille: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((1, tokens, 3)).astype(np.float32)
    label = rng.integers(-2, tokens + 2, (1, tokens)).astype(np.int32)
    mean, size = in_torch(MEAN, (x, label), {"max_segments_permille": permille})
    assert size.shape[1] == -(-tokens * permille // 1000)
    for c in range(size.shape[1]):
        members = x[label == c].astype(np.float64)
        assert size[0, c] == len(members)
        np.testing.assert_allclose(mean[0, c], members.mean(0) if len(members) else 0, rtol=1e-5, atol=1e-6)


def test_segment_means_are_merges_into_nothing() -> None:
    """A base of size 0 with tokens of size 1: the two operators agree."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((2, 50, 7)).astype(np.float32)
    label = rng.integers(-3, 53, (2, 50)).astype(np.int32)
    mean, size = in_torch(MEAN, (x, label), {})
    nothing = np.zeros_like(x), np.zeros((2, 50), np.float32)
    merged, merged_size = in_torch(MERGE, (*nothing, x, np.ones((2, 50), np.float32), label), {})
    np.testing.assert_allclose(merged, mean, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(merged_size, size)


def two_steps(x: Array, tau: float) -> tuple[Array, Array]:
    """Semantic connected components in two steps, by the operators: x `[F, n, E]` -> merged `[K, E]`, sizes `[K]`."""
    frames, tokens, width = x.shape
    label, components = in_torch(COMPONENTS, (x, np.full(frames, tokens, np.int32)), {"tau": tau})
    first = np.cumsum(components, dtype=np.int32) - components  # each frame's first number
    flat = x.reshape(1, frames * tokens, width)
    mean, _ = in_torch(MEAN, (flat, (label + first[:, None]).reshape(1, -1)), {})
    count = np.array([components.sum()], np.int32)
    label, components = in_torch(COMPONENTS, (mean, count), {"tau": tau})
    base, _ = in_torch(MEAN, (mean, label), {})  # padding has label C, which is no segment
    match, _ = in_torch(MATCH, (flat, base, components), {})
    ones = [np.ones(y.shape[:2], np.float32) for y in (base, flat)]
    merged, size = in_torch(MERGE, (base, ones[0], flat, ones[1], match), {})
    return merged[0, : components[0]], size[0, : components[0]]


def components_in_numpy(x: Array, tau: float) -> list[list[int]]:
    near = cosines(x, x) > tau
    np.fill_diagonal(near, False)
    degree = near.sum(1)
    _, label = connected_components(coo_array(near), directed=False)
    groups = [np.flatnonzero(label == c).tolist() for c in range(label.max() + 1)]
    return sorted(groups, key=lambda group: max(group, key=lambda i: (degree[i], -i)))


def two_steps_in_numpy(x: Array, tau: float) -> tuple[Array, Array]:
    """The same straight from the paper's description, float64, no padding anywhere."""
    representatives = np.array([f[group].mean(0) for f in x for group in components_in_numpy(f, tau)])
    groups = components_in_numpy(representatives, tau)
    base = np.array([representatives[group].mean(0) for group in groups])
    tokens = x.reshape(-1, x.shape[-1])
    match = cosines(tokens, base).argmax(1)
    size = np.bincount(match, minlength=len(base)) + 1
    merged = [(row + tokens[match == r].sum(0)) / size[r] for r, row in enumerate(base)]
    return np.array(merged), size


def scene(seed: int, frames: int, tokens: int, width: int) -> Array:
    """Tokens `[F, n, E]` around a few directions that the frames share: within 8 degrees of one, far from others."""
    rng = np.random.default_rng(seed)
    things = np.linalg.qr(rng.standard_normal((width, width)))[0]
    seen = things[rng.integers(width // 2, size=(frames, tokens))]
    noise = rng.standard_normal((frames, tokens, width)) * 0.1 / np.sqrt(width)
    return (seen + noise).astype(np.float32)


@pytest.mark.parametrize(("frames", "tokens", "width"), [(1, 20, 16), (4, 30, 32), (6, 49, 64)])
def test_two_step_components_are_those_of_numpy(frames: int, tokens: int, width: int) -> None:
    x = scene(frames, frames, tokens, width)
    merged, size = two_steps(x, 0.9)
    expected, expected_size = two_steps_in_numpy(x.astype(np.float64), 0.9)
    assert 1 < len(expected) < frames * tokens / 2
    np.testing.assert_array_equal(size, expected_size)
    np.testing.assert_allclose(merged, expected, rtol=1e-4, atol=1e-6)


def test_two_steps_above_one_keep_every_token() -> None:
    """Every token is its own representative, which it joins: the mean of two equal vectors."""
    x = scene(0, 3, 8, 32)
    merged, size = two_steps(x, 2.0)
    np.testing.assert_array_equal(merged, x.reshape(-1, 32))
    np.testing.assert_array_equal(size, np.full(24, 2.0))

"""``trtpass.scc`` against scipy and plain NumPy, and its invariants."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_op import Array, in_onnxruntime, in_torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

import trtpass
from plugins import all_ops
from plugins.connected_components.cases import arcs, chain
from trtpass import components

# Few tokens may be kept of the few that a test has; the warning has a test of its own.
pytestmark = pytest.mark.filterwarnings("ignore:.*tokens are kept")


def tokens_of(seed: int, count: int, width: int = 8, dtype: str = "float32") -> Array:
    """Tokens `[n, E]` with components of all sizes, no cosine near 0.9."""
    return arcs(np.random.default_rng(seed), count, width).astype(dtype)


def plain_components(x: Array, tau: float) -> list[list[int]]:
    """Members of each component, by the index of the head: straight from the definition, float64."""
    norm = np.linalg.norm(x, axis=1)
    near = (x @ x.T > tau * np.outer(norm, norm)) & np.outer(norm > 0, norm > 0)
    np.fill_diagonal(near, False)
    degree = near.sum(1)
    left, found = set(range(len(x))), []
    while left:
        group, todo = set(), [left.pop()]
        while todo:
            i = todo.pop()
            group.add(i)
            fresh = left & set(np.flatnonzero(near[i]).tolist())
            left -= fresh
            todo += fresh
        found.append(sorted(group))
    return sorted(found, key=lambda group: max(group, key=lambda i: (degree[i], -i)))


def plain_two_steps(x: Array, tau: float, groups: Array, positions: Array) -> dict[str, Array]:
    """The two steps token by token, float64."""
    parts = [np.flatnonzero(groups == g)[m] for g in sorted(set(groups.tolist())) for m in
             plain_components(x[groups == g], tau)]  # fmt: skip
    means = np.array([x[part].mean(0) for part in parts])
    merged = plain_components(means, tau)
    base = np.array([means[part].mean(0) for part in merged])
    label = np.empty(len(x), int)
    for r, part in enumerate(merged):
        label[np.concatenate([parts[p] for p in part])] = r
    source, unit = label.copy(), base / np.maximum(np.linalg.norm(base, axis=1, keepdims=True), 1e-30)
    for i, token in enumerate(x):
        if token.any() and unit.any():
            label[i] = int(np.argmax(unit @ token))
    rows, places = [], []
    for r, row in enumerate(base):
        own = label == r
        rows.append((row + x[own].sum(0)) / (1 + own.sum()))
        places.append(positions[own if own.any() else source == r])
    ranges = np.array([[p.min(), p.max()] for p in places])
    sizes = np.bincount(label, minlength=len(base))
    return {"tokens": np.array(rows), "label": label, "sizes": sizes, "ranges": ranges,
            "positions": np.array([p.mean() for p in places])}  # fmt: skip


def check(made: Any, positions: Array) -> None:
    """What holds for every result."""
    n, k = len(made.label), len(made.tokens)
    assert made.sizes.sum() == n and made.kept == k / n
    np.testing.assert_array_equal(made.sizes, np.bincount(made.label, minlength=k))
    low, high = made.ranges.T
    assert (low[made.label] <= positions).all() and (positions <= high[made.label]).all()
    assert (low <= made.positions).all() and (made.positions <= high).all()
    order = np.argsort(positions, kind="stable")
    spelled = []
    place = np.argsort(order)
    for first, last, label in made.runs.tolist():
        spelled += [label] * (place[last] - place[first] + 1)
    assert spelled == made.label[order].tolist()
    assert (np.diff(made.runs[:, 2]) != 0).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 50), width=st.sampled_from([1, 2, 7, 16]))
def test_components_are_those_of_scipy(seed: int, count: int, width: int) -> None:
    x = tokens_of(seed, count, width)
    wide = x.astype(np.float64)
    unit = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    expected, found = connected_components(coo_array(unit @ unit.T > 0.9), directed=False)
    made = trtpass.scc(x)
    assert len(made.tokens) == expected
    assert len(set(zip(made.label.tolist(), found.tolist(), strict=True))) == expected
    for r in range(expected):
        np.testing.assert_allclose(made.tokens[r], wide[made.label == r].mean(0), rtol=1e-5, atol=1e-6)
        assert made.positions[r] == pytest.approx(np.flatnonzero(made.label == r).mean())
    check(made, np.arange(count))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), count=st.integers(1, 50), groups=st.integers(1, 9), zeros=st.booleans()
)  # fmt: skip
def test_two_steps_are_those_of_plain_numpy(seed: int, count: int, groups: int, zeros: bool) -> None:
    """Groups of uneven sizes whose labels are in no order; positions too."""
    rng = np.random.default_rng(seed)
    things = rng.standard_normal((6, 24))
    x = (things[rng.integers(6, size=count)] + 0.1 * rng.standard_normal((count, 24))).astype(np.float32)
    x[rng.random(count) < 0.2 * zeros] = 0
    group = rng.integers(-3, groups, count) ** 3
    positions = rng.integers(0, 1000, count)
    made = trtpass.scc(x, 0.8, groups=group, positions=positions)
    check(made, positions)
    for name, right in plain_two_steps(x.astype(np.float64), 0.8, group, positions).items():
        if made.kept < 1 or name != "tokens":
            np.testing.assert_allclose(getattr(made, name), right, rtol=1e-4, atol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(made.tokens[made.label], x)


@pytest.mark.parametrize("groups", [None, 7])
def test_a_permutation_permutes_the_result(groups: int | None) -> None:
    rng = np.random.default_rng(3)
    x, order = tokens_of(3, 60, 16), rng.permutation(60)
    labels = None if groups is None else np.arange(60) // groups
    made = trtpass.scc(x, groups=labels)
    moved = trtpass.scc(x[order], groups=None if labels is None else labels[order], positions=order)
    pairs = set(zip(made.label[order].tolist(), moved.label.tolist(), strict=True))
    assert len(pairs) == len(made.tokens) == len(moved.tokens) > 5
    to = np.array([new for _, new in sorted(pairs)])
    np.testing.assert_allclose(moved.tokens[to], made.tokens, rtol=1e-5, atol=1e-6)
    for name in ("sizes", "positions", "ranges"):
        np.testing.assert_allclose(getattr(moved, name)[to], getattr(made, name))


@pytest.mark.parametrize("place", ["shuffled", "ascending"])
@pytest.mark.parametrize("groups", [None, 50])
def test_a_chain_of_200_is_one(place: str, groups: int | None) -> None:
    """Each token is similar to the next alone: a cosine of 0.5. Means of links of the chain are further apart."""
    order = {"shuffled": lambda rng, n: rng.permutation(n), "ascending": lambda rng, n: np.arange(n)}[place]
    x = chain(order)(np.random.default_rng(0), 200, 201).astype(np.float32)
    made = trtpass.scc(x, 0.4, groups=groups)
    if groups is None:
        assert made.label.tolist() == [0] * 200 and made.ranges.tolist() == [[0, 199]]
    elif place == "ascending":  # four chains of 50, whose means have a cosine of 1/199
        assert made.sizes.tolist() == [50] * 4
    check(made, np.arange(200))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("groups", [None, 4])
@pytest.mark.parametrize("tau", [1.5, float("inf")])
def test_above_one_every_token_comes_back(dtype: str, groups: int | None, tau: float) -> None:
    """Duplicates, multiples and zero vectors too."""
    x = tokens_of(0, 11, dtype=dtype)
    x[4], x[7], x[9] = x[2], 2 * x[2], 0
    with pytest.warns(UserWarning, match=r"outside \[-1, 1\]"):
        made = trtpass.scc(x, tau, groups=groups)
    np.testing.assert_array_equal(made.tokens, x)
    assert made.tokens.dtype == x.dtype and made.kept == 1.0
    assert made.sizes.tolist() == [1] * 11 and made.label.tolist() == list(range(11))


@pytest.mark.filterwarnings("ignore:scc")
def test_above_one_representatives_are_in_the_order_of_the_groups() -> None:
    x, groups = tokens_of(0, 6), np.array([5, -1, 5, 3, -1, 3])
    made = trtpass.scc(x, 1.5, groups=groups)
    np.testing.assert_array_equal(made.tokens, x[[1, 4, 3, 5, 0, 2]])
    np.testing.assert_array_equal(made.tokens[made.label], x)


@pytest.mark.parametrize("groups", [None, 4])
def test_below_minus_one_all_are_one(groups: int | None) -> None:
    with pytest.warns(UserWarning, match=r"tau=-1.5 is outside \[-1, 1\]: below -1 all tokens"):
        made = trtpass.scc(tokens_of(0, 11), -1.5, groups=groups)
    assert made.sizes.tolist() == [11] and made.ranges.tolist() == [[0, 10]] and made.runs.tolist() == [[0, 10, 0]]


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.filterwarnings("ignore:scc")
def test_what_has_no_direction_is_similar_to_nothing(groups: int | None) -> None:
    x = np.array([[3, 4], [0, 0], [-3, -4], [0, 0], [np.nan, 1], [8, 6], [np.inf, 0]], np.float32)
    made = trtpass.scc(x, -2.0, groups=groups)
    assert sorted(made.sizes.tolist()) == [1, 1, 1, 1, 3]
    assert len(set(made.label[[0, 2, 5]].tolist())) == 1
    np.testing.assert_array_equal(made.tokens[made.label[[1, 3, 4, 6]]], x[[1, 3, 4, 6]])


def test_a_representative_that_nobody_joins_keeps_its_place() -> None:
    """Members of a ring are on all sides of its mean; each finds another token closer."""
    steps = np.deg2rad(np.arange(0, 360, 20))
    ring = np.stack([np.cos(steps), np.sin(steps), np.full(18, 0.1)], 1)
    others = np.array([[np.cos(a), np.sin(a), -0.9] for a in np.deg2rad([0, 90, 180, 270])])
    x = np.concatenate([ring, others]).astype(np.float32)
    made = trtpass.scc(x, 0.9, groups=22)
    alone = np.flatnonzero(made.sizes == 0)
    assert alone.tolist() == [0] and made.sizes.sum() == 22
    assert made.positions[0] == 8.5 and made.ranges[0].tolist() == [0, 17]
    np.testing.assert_allclose(made.tokens[0], ring.mean(0), atol=1e-6)


@pytest.mark.parametrize("groups", [None, 5])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_kernels_bodies_and_references_agree(groups: int | None, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators that run are those of the graph: native kernels, where the library is, equal both definitions."""
    x = tokens_of(1, 40, 16, dtype)
    made = [trtpass.scc(x, groups=groups)]
    for run in (in_torch, lambda op, inputs, attrs: in_onnxruntime(op, "dynamic", inputs, attrs)):

        def other(name: str, inputs: Any, _run: Any = run, **attrs: float) -> list[Array]:
            return _run(all_ops()[name], [np.ascontiguousarray(y) for y in inputs], attrs)

        monkeypatch.setattr(components, "_run", other)
        made.append(trtpass.scc(x, groups=groups))
    assert 1 < len(made[0].tokens) < 40
    for each in made[1:]:
        for name in ("sizes", "label", "ranges", "positions", "runs"):
            np.testing.assert_array_equal(getattr(each, name), getattr(made[0], name), err_msg=name)
        tolerance = all_ops()["MergeTokens"].tolerance.of(dtype)
        np.testing.assert_allclose(each.tokens, made[0].tokens, **tolerance)


def test_groups_of_one_size_are_those_of_labels_in_any_order() -> None:
    """Frames are compared as they lie, uneven groups are packed: one result."""
    x, order = tokens_of(2, 60, 16), np.random.default_rng(2).permutation(60)
    made = trtpass.scc(x, groups=12)
    again = trtpass.scc(x, groups=np.arange(60) // 12 * 10 - 7)
    np.testing.assert_array_equal(made.tokens, again.tokens)
    shuffled = trtpass.scc(x[order], groups=(np.arange(60) // 12)[order])
    assert len(shuffled.tokens) == len(made.tokens)
    assert len(trtpass.scc(x, groups=7).tokens) >= 1  # the last group has 4

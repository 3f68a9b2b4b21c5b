"""Properties of selection and sparse attention, on drawn inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from one_op import Array, in_onnxruntime, in_torch

from plugins import all_ops
from plugins._cases import int32, mass, normal, selection
from trtpass.errors import InputError

MASS, BUDGET, SELECT, ATTEND = (
    all_ops()[name] for name in ("ColumnMass", "CoverageBudget", "SelectTokens", "TokenSparseAttention")
)
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}  # float32 attention over fewer than 100 values of a few units

scores = hnp.arrays(
    np.float32,
    st.tuples(st.just(1), st.integers(1, 3), st.integers(1, 40)),
    elements=st.one_of(
        st.floats(width=32, allow_nan=True, allow_infinity=True),  # any bit pattern
        st.sampled_from([0.0, 0.5, 1.0]),  # ties
    ),
)


def _sets(index: Array, count: Array, row: tuple[int, ...]) -> list[int]:
    return index[row][: count[row]].tolist()


@settings(max_examples=150, deadline=None)
@given(score=scores, data=st.data())
def test_selection_is_the_exact_set_of_a_stable_sort(score: Array, data: st.DataObject) -> None:
    """Against Python's own sort, and nothing of the reference's code."""
    tokens = score.shape[-1]
    length = data.draw(st.integers(1, tokens), label="length")
    keep = data.draw(st.integers(0, tokens + 2), label="keep")
    window = data.draw(st.integers(0, tokens + 2), label="window")
    permille = data.draw(st.sampled_from([1000, 500, 37]), label="permille")
    attrs = {"window": window, "max_keep_permille": permille}
    inputs = [score, int32([keep]), int32([length])]

    capacity = -(-tokens * permille // 1000)
    largest = float(np.finfo(np.float32).max) / 2
    bodies = [in_onnxruntime(SELECT, kind, inputs, attrs) for kind in ("dynamic", "static")]
    for index, count in (in_torch(SELECT, inputs, attrs), *bodies):
        assert index.shape[-1] == capacity
        for head in range(score.shape[1]):
            values = [-largest if np.isnan(x) else min(max(float(x), -largest), largest) for x in score[0, head]]
            order = sorted(range(length), key=lambda i, v=values: (i < length - window, -v[i], i))
            chosen = sorted(order[: min(keep, length, capacity)])
            assert index[0, head].tolist() == chosen + [tokens] * (capacity - len(chosen))
            assert count[0, head] == len(chosen)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    heads=st.integers(1, 4),
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=3),
    coverage=st.integers(1, 999_999),
    prefix=st.integers(0, 1),
)
def test_pruned_mass_is_the_first_to_reach_the_coverage(
    seed: int, heads: int, lengths: list[int], coverage: int, prefix: int
) -> None:
    """n lowest columns hold at least the coverage, n - 1 do not; n is read back from keep where keep is not clamped."""
    window, tokens = 8, max(lengths)
    values = mass(seed, heads, tokens, lengths, window)
    attrs = {"coverage_ppm": coverage, "window": window, "min_tokens": 0, "prefix": prefix}
    inputs = [values, int32(lengths)]
    (keep,) = in_torch(BUDGET, inputs, attrs)
    for kind in ("dynamic", "static"):
        np.testing.assert_array_equal(in_onnxruntime(BUDGET, kind, inputs, attrs)[0], keep)
    unit = np.float32(2**30) / np.float32(heads * window)
    fixed = np.rint(values * unit).astype(np.int64).sum(1)
    for row, length in enumerate(lengths):
        assert 1 <= keep[row] <= length
        if length <= window:
            assert keep[row] == length
            continue
        domain = np.sort(fixed[row, : length - window * prefix])
        pruned = length - int(keep[row])
        if (prefix and pruned == 0) or (not prefix and keep[row] == 1):
            continue  # one column at most in the first case, clamped in the second
        total = int(domain.sum())
        assert int(domain[:pruned].sum()) * 10**6 >= coverage * total
        assert int(domain[: pruned - 1].sum()) * 10**6 < coverage * total


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    tokens=st.integers(1, 40),
    grouped=st.booleans(),
    data=st.data(),
)
def test_rows_outside_the_selection_are_zero_and_kept_rows_attend_among_themselves(
    seed: int, tokens: int, grouped: bool, data: st.DataObject
) -> None:
    heads, key_heads = 4, 2
    sets = key_heads if grouped else heads
    counts = data.draw(st.lists(st.lists(st.integers(0, tokens), min_size=sets, max_size=sets), min_size=1, max_size=2))
    batch = len(counts)
    q = normal(seed, batch, heads, tokens, 8, scale=1.0)
    k = normal(seed + 1, batch, key_heads, tokens, 8, scale=1.0)
    v = normal(seed + 2, batch, key_heads, tokens, 8, scale=1.0)
    index, count = selection(seed + 3, tokens, tokens, counts)
    outs = [in_onnxruntime(ATTEND, kind, [q, k, v, index, count], {})[0] for kind in ("dynamic", "static")]
    for b, h in np.ndindex(batch, heads):
        kept = _sets(index, count, (b, h * sets // heads))
        expected = np.zeros((tokens, 8))
        for i in kept:
            seen = [j for j in kept if j <= i]
            weights = _softmax(q[b, h, i].astype("f8") @ k[b, h // 2, seen].astype("f8").T / np.sqrt(8))
            expected[i] = weights @ v[b, h // 2, seen]
        dropped = np.setdiff1d(np.arange(tokens), kept)
        for out in outs:
            assert not out[b, h, dropped].any()
            np.testing.assert_allclose(out[b, h], expected, **ROUNDING)


def _softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    return e / e.sum()


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    tokens=st.integers(2, 60),
    spread=st.sampled_from([0.3, 1.0, 4.0]),
    norm=st.sampled_from([2, np.inf]),
    data=st.data(),
)
def test_error_of_a_kept_row_is_within_twice_the_dropped_mass(
    seed: int, tokens: int, spread: float, norm: float, data: st.DataObject
) -> None:
    """``||o' - o|| <= 2 m max ||v_j||`` over all visible keys j, in any norm; docs/error_bound.md has the proof.

    With p the full softmax, K the kept keys and m the mass of the others, the softmax over K is p / (1 - m). Hence
    ``o' - o = sum_K (p_j m / (1 - m)) v_j - sum_D p_j v_j``: two sums whose weights are positive and add up to m each.
    """
    count = data.draw(st.integers(1, tokens), label="count")
    q, k = (normal(seed + i, 1, 1, tokens, 8, scale=spread) for i in (0, 1))
    v = normal(seed + 2, 1, 1, tokens, 8, scale=1.0)
    index, counts = selection(seed + 3, tokens, count, [[count]])
    (sparse,) = in_onnxruntime(ATTEND, "static", [q, k, v, index, counts], {})
    kept = set(index[0, 0].tolist())
    for i in kept:
        p = _softmax(q[0, 0, i].astype("f8") @ k[0, 0, : i + 1].astype("f8").T / np.sqrt(8))
        dropped = sum(p[j] for j in range(i + 1) if j not in kept)
        full = p @ v[0, 0, : i + 1].astype("f8")
        largest = max(np.linalg.norm(v[0, 0, j], norm) for j in range(i + 1))
        error = np.linalg.norm(sparse[0, 0, i] - full, norm)
        assert error <= 2 * dropped * largest + ROUNDING["atol"] * (1 + largest)


def test_error_bound_is_sharp() -> None:
    """Kept values x, dropped values -x: the output moves by exactly 2 m |x|, so no smaller factor would hold."""
    q, k = np.zeros((1, 1, 2, 4), np.float32), np.zeros((1, 1, 2, 4), np.float32)
    v = np.ones((1, 1, 2, 4), np.float32)
    v[0, 0, 0] = -1
    (full,) = in_torch(ATTEND, [q, k, v, *selection(0, 2, 2, [[2]])], {})
    (sparse,) = in_torch(ATTEND, [q, k, v, np.array([[[1]]], np.int32), np.array([[1]], np.int32)], {})
    dropped, largest = 0.5, 1.0  # equal scores; the infinity norm
    assert np.abs(sparse[0, 0, 1] - full[0, 0, 1]).max() == pytest.approx(2 * dropped * largest, abs=1e-6)


def _chain(
    q: Array, k: Array, v: Array, lengths: Array, coverage: int, prefix: int, kind: str, **run: Any
) -> list[Array]:
    """Mass, budget, selection and attention, each in ONNX Runtime: index, count, out."""
    (scores,) = in_onnxruntime(MASS, kind, [q, k, lengths], {"window": 16, "prefix": prefix}, **run)
    settings = {"coverage_ppm": coverage, "window": 16, "min_tokens": 16, "prefix": prefix}
    (keep,) = in_onnxruntime(BUDGET, kind, [scores, lengths], settings, **run)
    index, count = in_onnxruntime(SELECT, kind, [scores, keep, lengths], {"window": 16 * prefix}, **run)
    (out,) = in_onnxruntime(ATTEND, kind, [q, k, v, index, count], {}, **run)
    return [index, count, out]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_selection_does_not_depend_on_the_number_of_threads(kind: str, prefix: int, seed: int) -> None:
    tokens = 1500
    q, k, v = normal(seed, 2, 6, tokens, 64), normal(seed + 10, 2, 2, tokens, 64), normal(seed + 20, 2, 2, tokens, 64)
    lengths = int32([tokens, 1111])
    one = _chain(q, k, v, lengths, 100_000, prefix, kind, threads=1)
    two = _chain(q, k, v, lengths, 100_000, prefix, kind, threads=2)
    assert 0 < one[1].max() < tokens, "nothing was pruned"
    np.testing.assert_array_equal(one[0], two[0])
    np.testing.assert_array_equal(one[1], two[1])


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_zero_coverage_is_dense_attention(kind: str, prefix: int) -> None:
    """The identity setting of the method: everything is kept and the output is torch's own causal attention."""
    tokens = 100
    q, k, v = normal(0, 2, 6, tokens, 16), normal(1, 2, 2, tokens, 16), normal(2, 2, 2, tokens, 16)
    index, count, out = _chain(q, k, v, int32([tokens, tokens]), 0, prefix, kind)
    assert (count == tokens).all()
    assert (index == np.arange(tokens)).all()
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(x) for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    np.testing.assert_allclose(out, dense.numpy(), **ROUNDING)


@pytest.mark.parametrize(("window", "tokens"), [(16, n) for n in (1, 15, 16, 17, 32, 33)])
def test_rows_up_to_floor_and_window_stay_dense(window: int, tokens: int) -> None:
    """min_tokens + window tokens are dense, one more may prune."""
    values = mass(0, 2, tokens, [tokens], window)
    attrs = {"coverage_ppm": 999_999, "window": window, "min_tokens": 16, "prefix": 0}
    (keep,) = in_torch(BUDGET, [values, int32([tokens])], attrs)
    assert (keep[0] == tokens) == (tokens <= 32)


def test_mass_of_each_head_adds_up_to_the_window() -> None:
    """Without pooling every probability is counted once: the total is the number of query rows."""
    lengths = [50, 7, 1]
    q, k = normal(0, 3, 4, 50, 16), normal(1, 3, 2, 50, 16)
    (made,) = in_onnxruntime(MASS, "dynamic", [q, k, int32(lengths)], {"window": 16, "pool": 1})
    np.testing.assert_allclose(made.sum(-1), [[min(16, n)] * 4 for n in lengths], rtol=1e-5)


@pytest.mark.parametrize(
    ("op", "inputs", "attrs", "words"),
    [
        (MASS, [normal(0, 1, 1, 4, 8), normal(1, 1, 1, 4, 8), int32([4])], {"pool": 4}, "pool is 4"),
        (MASS, [normal(0, 1, 1, 4, 8), normal(1, 1, 1, 4, 8), int32([4])], {"window": 0}, "window is 0"),
        (BUDGET, [mass(0, 1, 4, [4]), int32([4])], {"coverage_ppm": 10**6}, "coverage_ppm is 1000000"),
        (BUDGET, [mass(0, 1, 4, [4]), int32([4])], {"window": 0}, "window=0"),
        (SELECT, [normal(0, 1, 1, 4), int32([2]), int32([4])], {"max_keep_permille": 0}, "max_keep_permille is 0"),
        (SELECT, [normal(0, 1, 1, 4), int32([2]), int32([4])], {"window": -1}, "window is -1"),
        (ATTEND, [*(normal(i, 1, h, 4, 8) for i, h in ((0, 4), (1, 2), (2, 2))), *selection(0, 4, 4, [[2] * 3])], {},
         "N = 3"),
    ],
)  # fmt: skip
def test_references_refuse_what_is_not_defined(op: Any, inputs: list[Array], attrs: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        in_torch(op, inputs, attrs)

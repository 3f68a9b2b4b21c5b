"""FicocoFilter, FicocoCorrelate, TrackTokens and RestoreTokens against their definitions written as loops."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_op import Array, in_onnxruntime, in_torch

from plugins import all_ops
from plugins._cases import int32, normal
from plugins.ficoco_correlate.cases import kept_tokens
from plugins.ficoco_filter.cases import attention, grid, ties
from plugins.track_tokens.cases import stream
from trtpass.errors import InputError
from trtpass.op import Op

FILTER, CORRELATE, TRACK, RESTORE = (
    all_ops()[name] for name in ("FicocoFilter", "FicocoCorrelate", "TrackTokens", "RestoreTokens")
)
ROUNDING: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}  # float32 means of fewer than 100 probabilities
drawn = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**20)
row_lengths = st.lists(st.integers(0, 40), min_size=1, max_size=3).filter(any)


def _everywhere(op: Op, inputs: Sequence[Array], attrs: Mapping[str, Any]) -> Iterator[list[Array]]:
    """The outputs of the reference and of each body."""
    yield in_torch(op, inputs, attrs)
    for kind in ("dynamic", "static"):
        yield in_onnxruntime(op, kind, inputs, attrs)


@drawn
@given(
    seed=seeds,
    lengths=row_lengths,
    width=st.integers(0, 9),
    window=st.integers(1, 4),
    weight=st.sampled_from([0, 350, 1000]),
    exact=st.booleans(),
)
def test_filter_ranks_by_redundancy_and_spreads_it(
    seed: int, lengths: list[int], width: int, window: int, weight: int, exact: bool
) -> None:
    rng = np.random.default_rng(seed)
    batch, tokens = len(lengths), max(lengths)
    prob, cue = (x.astype(np.float32) for x in (ties if exact else attention)(rng, batch, tokens))
    protected = rng.integers(0, 4, (batch, tokens)) == 0
    place = grid(rng, batch, tokens)
    attrs = {"width": width, "window": window, "weight_permille": weight, "coefficient_permille": 3000}
    expected = np.full((batch, tokens), np.inf)
    for b, length in enumerate(lengths):
        ranked = [i for i in range(length) if not protected[b, i]]
        s = {}
        for i in ranked:
            received = sum(float(prob[b, j, i]) for j in ranked) / len(ranked)
            s[i] = weight / 1000 * received - (1 - weight / 1000) * float(cue[b, i])
        windows: dict[tuple[int, int], list[int]] = {}
        for i in ranked:
            if width and place[b, i] >= 0:
                cell = place[b, i] // width // window, place[b, i] % width // window
                windows.setdefault(cell, []).append(i)
        for members in windows.values():
            best = -max((s[i], -i) for i in members)[1]
            s[best] = s[best] * 3 if s[best] > 0 else s[best] / 3
        expected[b, list(s)] = [-x for x in s.values()]
    inputs = [prob, cue, place, protected.astype(np.int32), int32(lengths)]
    for (score,) in _everywhere(FILTER, inputs, attrs):
        np.testing.assert_allclose(score, expected, **ROUNDING)


@drawn
@given(
    seed=seeds,
    lengths=row_lengths,
    eps=st.sampled_from([0, 500, 900, 970, 998, 999]),
    few=st.booleans(),
    data=st.data(),
)
def test_correlate_takes_the_columns_from_the_quantile_on(
    seed: int, lengths: list[int], eps: int, few: bool, data: st.DataObject
) -> None:
    """Values that differ: exactly the columns not below the linear quantile. Equal ones: the lowest slots."""
    rng = np.random.default_rng(seed)
    batch, tokens = len(lengths), max(lengths)
    capacity = data.draw(st.integers(1, tokens), label="capacity")
    slot, _, count = stream(rng, tokens, capacity, lengths)
    index = kept_tokens(slot, capacity)
    candidate = rng.integers(0, 4, (batch, tokens)) > 0
    shape = (batch, tokens - capacity, tokens)
    affinity = (rng.integers(0, 3, shape) / 4 if few else rng.random(shape)).astype(np.float32)
    inputs = [affinity, index, candidate.astype(np.int32), count]
    each = capacity - math.ceil(eps * (capacity - 1) / 1000)
    for target, weight in _everywhere(CORRELATE, inputs, {"eps_permille": eps}):
        target, weight = (x.reshape(*shape[:2], each) for x in (target, weight))
        for b, m in np.ndindex(shape[:2]):
            columns = [c for c in range(count[b]) if candidate[b, index[b, c]]]
            values = {c: float(affinity[b, m, index[b, c]]) for c in columns}
            order = [c for _, c in sorted((-v, c) for c, v in values.items())]
            joined = target[b, m][target[b, m] < capacity].tolist()
            assert joined == order[: len(joined)]
            assert (target[b, m, len(joined) :] == capacity).all() and not weight[b, m, len(joined) :].any()
            assert bool(joined) == bool(columns)
            if columns and not few:
                whole, rest = divmod(eps * (len(columns) - 1), 1000)
                low, high = ([*sorted(values.values()), 2.0][whole + i] for i in (0, 1))
                assert set(joined) == {c for c, v in values.items() if v >= low + (high - low) * rest / 1000}
            if columns:
                assert weight[b, m].sum() == pytest.approx(1, abs=1e-5)
                total = sum(values[c] for c in joined)
                shares = [values[c] / total if total > 0 else 1 / len(joined) for c in joined]
                np.testing.assert_allclose(weight[b, m, : len(joined)], shares, **ROUNDING)


@pytest.mark.parametrize(("columns", "number"), [(1, 1), (500, 1), (501, 2), (577, 2), (1001, 3)])
def test_number_of_targets(columns: int, number: int) -> None:
    """Of the published setting, eps = 0.998."""
    made = CORRELATE.output_shapes([(1, 3, 1100), (1, columns), (1, 1100), (1,)], {})
    assert made["target"] == made["weight"] == (1, 3 * number)


@drawn
@given(seed=seeds, lengths=row_lengths, each=st.integers(1, 3), data=st.data())
def test_tracked_tokens_are_where_they_went(seed: int, lengths: list[int], each: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    batch, tokens = len(lengths), max(lengths)
    capacity = data.draw(st.integers(1, tokens), label="capacity")
    slot, rest, count = stream(rng, tokens, capacity, lengths)
    target = rng.integers(-2, capacity + 2, (batch, (tokens - capacity) * each)).astype(np.int32)
    owner = rng.integers(-2, tokens + 2, (batch, 50)).astype(np.int32)
    expected = np.full_like(owner, -1)
    for b, n in np.ndindex(owner.shape):
        gone = rest[b].tolist()
        if 0 <= owner[b, n] < tokens and slot[b, owner[b, n]] >= 0:
            expected[b, n] = slot[b, owner[b, n]]
        elif 0 <= owner[b, n] < tokens and owner[b, n] in gone:
            joined = target[b, gone.index(owner[b, n]) * each]
            expected[b, n] = joined if 0 <= joined < count[b] else -1
    for (moved,) in _everywhere(TRACK, [owner, slot, rest, target, count], {}):
        np.testing.assert_array_equal(moved, expected)


@drawn
@given(
    seed=seeds,
    tokens=st.integers(1, 50),
    rows=st.integers(0, 9),
    pruned=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    fixed=st.integers(0, 3),
    width=st.integers(0, 9),
)
def test_restored_tokens_have_the_row_of_their_owner_or_of_the_nearest(
    seed: int, tokens: int, rows: int, pruned: float, fixed: int, width: int
) -> None:
    rng = np.random.default_rng(seed)
    x = normal(seed, 2, rows, 3)
    owner = np.where(rng.random((2, tokens)) < pruned, -1, rng.integers(-1, rows + 1, (2, tokens))).astype(np.int32)

    def distance(n: int, m: int) -> int:
        (a, b), (c, d) = (divmod(i - fixed, width) if width else (0, i - fixed) for i in (n, m))
        return (a - c) ** 2 + (b - d) ** 2

    expected = np.zeros((2, tokens, 3), np.float32)
    for b, n in np.ndindex(owner.shape):
        sources = [m for m in range(fixed, tokens) if 0 <= owner[b, m] < rows]
        if 0 <= owner[b, n] < rows:
            expected[b, n] = x[b, owner[b, n]]
        elif n >= fixed and sources:
            expected[b, n] = x[b, owner[b, min((distance(n, m), m) for m in sources)[1]]]
    for (made,) in _everywhere(RESTORE, [x, owner], {"fixed": fixed, "width": width}):
        np.testing.assert_array_equal(made, expected)


def test_a_stream_that_drops_nothing_stays_as_it_is() -> None:
    """The identity setting: no targets, every token at its own place, every row restored to the bit."""
    tokens = 65
    x, place = normal(0, 2, tokens, 5), np.tile(np.arange(tokens, dtype=np.int32), (2, 1))
    prob = np.full((2, 0, tokens), 0.5, np.float32)
    count, nothing = int32([tokens, tokens]), np.zeros((2, 0), np.int32)
    for target, weight in _everywhere(CORRELATE, [prob, place, np.ones_like(place), count], {}):
        assert target.shape == weight.shape == (2, 0)
    for (moved,) in _everywhere(TRACK, [place, place, nothing, nothing, count], {}):
        np.testing.assert_array_equal(moved, place)
    for (rows,) in _everywhere(RESTORE, [x, place], {"fixed": 1, "width": 8}):
        np.testing.assert_array_equal(rows, x)


PROB = [np.ones((1, 4, 4), np.float32), np.ones((1, 4), np.float32), *(np.zeros((1, 4), np.int32),) * 2, int32([4])]
AFFINITY = [np.ones((1, 1, 4), np.float32), int32([0, 1, 2])[None], np.ones((1, 4), np.int32), int32([3])]
MOVES = [int32([0, 1])[None], int32([0, -1, -1])[None], int32([1, 2])[None], int32([0, 0, 0])[None], int32([1])]


@pytest.mark.parametrize(
    ("op", "inputs", "attrs", "words"),
    [
        (FILTER, PROB, {"weight_permille": 1001}, "weight_permille=1001"),
        (FILTER, PROB, {"coefficient_permille": 0}, "coefficient_permille=0"),
        (FILTER, PROB, {"width": -1}, "width=-1"),
        (FILTER, PROB, {"window": 0}, "window=0"),
        (FILTER, PROB, {"width": 2**16, "window": 2**15}, "product < 2"),
        (CORRELATE, AFFINITY, {"eps_permille": -1}, "eps_permille is -1"),
        (CORRELATE, AFFINITY, {"eps_permille": 1000}, "eps_permille is 1000"),
        (TRACK, MOVES, {}, "T = 3 for M = 2"),
        (TRACK, [*MOVES[:3], np.zeros((1, 0), np.int32), MOVES[4]], {}, "T = 0 for M = 2"),
        (RESTORE, [PROB[0], PROB[2]], {"fixed": -1}, "fixed=-1"),
        (RESTORE, [PROB[0], PROB[2]], {"width": -2}, "width=-2"),
    ],
)
def test_references_refuse_what_is_not_defined(op: Op, inputs: list[Array], attrs: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        in_torch(op, inputs, attrs)

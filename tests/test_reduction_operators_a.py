"""Operators that score, keep, index and gather tokens: against plain numpy loops, their invariants and identities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_op import Array, in_onnxruntime, in_torch, model_of, named

from plugins import all_ops
from plugins._budget import kept
from plugins._cases import int32, normal
from trtpass import native
from trtpass.errors import InputError
from trtpass.op import Op

GATHER, ROWS, KEEP, INDEX, FILTER = (
    all_ops()[name] for name in ("GatherTokens", "AttentionRows", "KeepTokens", "IndexTokens", "BipartiteFilter")
)
ALL = [GATHER, ROWS, KEEP, INDEX, FILTER]
FEW = settings(max_examples=25, deadline=None)
BODY = settings(max_examples=40, deadline=None)


def in_all(op: Op, inputs: Sequence[Array], attrs: Mapping[str, Any]) -> list[list[Array]]:
    """The reference and the bodies, one where `dynamic` and `static` are the same."""
    kinds = ["dynamic"] if op.bodies["dynamic"] is op.bodies["static"] else ["dynamic", "static"]
    return [in_torch(op, inputs, attrs), *(in_onnxruntime(op, kind, inputs, attrs) for kind in kinds)]


def kept_in_words(length: int, fixed: int, permille: int, rounding: int, drop: int) -> int:
    """The budget counted out: one token after the other, in exact fractions of a thousandth."""
    whole = min(length, fixed)
    thousandths = rounding
    for _ in range(max(length - fixed, 0)):
        thousandths += permille
    while thousandths >= 1000:
        thousandths -= 1000
        whole += 1
    return max(0, min(length, whole - drop))


budgets = st.fixed_dictionaries(
    {
        "fixed": st.integers(0, 6),
        "permille": st.sampled_from([0, 1, 333, 500, 700, 999, 1000]),
        "rounding": st.sampled_from([0, 500, 999]),
        "drop": st.integers(0, 9),
    }
)


@settings(max_examples=100, deadline=None)
@given(length=st.integers(0, 60), attrs=budgets)
def test_the_budget_is_what_counting_says(length: int, attrs: dict[str, int]) -> None:
    assert kept(length, **attrs) == kept_in_words(length, **attrs)


@pytest.mark.parametrize(
    ("length", "attrs", "wanted"),
    [
        (197, {"drop": 16}, 181),  # ToMe: r fewer
        (197, {"fixed": 1, "permille": 700}, 139),  # EViT: the class token and ceil(0.7 * 196)
        (611, {"fixed": 35, "permille": 500, "rounding": 500}, 323),  # FastV: half of 576 and the text
        (8, {"fixed": 35, "permille": 0}, 8),
        (3, {"drop": 9}, 0),
    ],
)
def test_budgets_of_the_methods(length: int, attrs: dict[str, int], wanted: int) -> None:
    assert kept(length, **attrs) == wanted


@st.composite
def ragged(draw: st.DrawFn, most: int = 24) -> tuple[int, list[int]]:
    """Tokens and the lengths of one to three rows, some of which no row can have."""
    tokens = draw(st.integers(1, most))
    return tokens, draw(st.lists(st.integers(-1, tokens + 2), min_size=1, max_size=3))


@BODY
@given(shape=ragged(), attrs=budgets, seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["real", "few", "wild"]))
def test_kept_tokens_are_the_first_of_a_sort(
    shape: tuple[int, list[int]], attrs: dict[str, int], seed: int, kind: str
) -> None:
    tokens, lengths = shape
    rng = np.random.default_rng(seed)
    score = rng.standard_normal((len(lengths), tokens))
    if kind == "few":
        score = rng.choice([-1.0, 0.0, -0.0, np.inf], score.shape)
    elif kind == "wild":
        score = rng.choice([np.nan, np.inf, -np.inf, 3.4e38, 1e-45, -1e-45, 0.0], score.shape)
    inputs = [score.astype(np.float32), int32(lengths)]
    for (keep,) in in_all(KEEP, inputs, attrs):
        for row, mask, length in zip(inputs[0].tolist(), keep.tolist(), np.clip(lengths, 0, tokens), strict=True):
            values = [-np.inf if x != x else x for x in row[:length]]
            order = sorted(range(length), key=lambda i, v=values: (-v[i], i))
            chosen = set(order[: kept_in_words(int(length), **attrs)])
            assert mask == [int(i in chosen) for i in range(tokens)]


@BODY
@given(shape=ragged(), attrs=budgets, seed=st.integers(0, 2**32 - 1), share=st.sampled_from([0.0, 0.3, 0.8, 1.0]))
def test_lists_of_kept_and_other_tokens(
    shape: tuple[int, list[int]], attrs: dict[str, int], seed: int, share: float
) -> None:
    tokens, lengths = shape
    keep = (np.random.default_rng(seed).random((len(lengths), tokens)) < share).astype(np.int32) * 5
    capacity = kept_in_words(tokens, **attrs)
    for index, count, rest, slot in in_all(INDEX, [keep, int32(lengths)], attrs):
        assert index.shape[1] == capacity and rest.shape[1] == tokens - capacity
        for b, length in enumerate(np.clip(lengths, 0, tokens)):
            stays = [t for t in range(length) if keep[b, t]][:capacity]
            goes = [t for t in range(length) if t not in stays][: tokens - capacity]
            assert count[b] == len(stays)
            assert index[b].tolist() == stays + [tokens] * (capacity - len(stays))
            assert rest[b].tolist() == goes + [tokens] * (tokens - capacity - len(goes))
            assert slot[b].tolist() == [stays.index(t) if t in stays else -1 for t in range(tokens)]


@FEW
@given(attrs=budgets, seed=st.integers(0, 2**32 - 1), length=st.integers(1, 40))
def test_keeping_and_indexing_share_one_budget(attrs: dict[str, int], seed: int, length: int) -> None:
    """In a full row every place is used: each token is in one list, once. A shorter row fills its own budget."""
    score = np.random.default_rng(seed).standard_normal((2, 40)).astype(np.float32)
    lengths = int32([40, length])
    (keep,) = in_torch(KEEP, [score, lengths], attrs)
    index, count, rest, slot = in_torch(INDEX, [keep, lengths], attrs)
    assert sorted([*index[0], *rest[0]]) == list(range(40))
    assert count[1] == kept(length, **attrs) == keep[1].sum()
    assert np.array_equal(slot >= 0, keep == 1)


def test_nothing_dropped_is_the_identity() -> None:
    rng = np.random.default_rng(0)
    x, score, lengths = normal(0, 2, 30, 5), rng.standard_normal((2, 30)).astype(np.float32), int32([30, 12])
    for (keep,) in in_all(KEEP, [score, lengths], {}):
        assert keep.sum(1).tolist() == [30, 12]
    for index, count, rest, slot in in_all(INDEX, [np.ones((2, 30), np.int32), lengths], {}):
        assert count.tolist() == [30, 12] and rest.shape == (2, 0)
        assert index[0].tolist() == slot[0].tolist() == list(range(30))
        for (rows,) in in_all(GATHER, [x, index], {}):
            assert rows[0].tobytes() == x[0].tobytes()
            assert rows[1, :12].tobytes() == x[1, :12].tobytes() and not rows[1, 12:].any()


@FEW
@given(seed=st.integers(0, 2**32 - 1), tokens=st.integers(1, 9), taken=st.integers(0, 12))
def test_gathered_rows_are_those_of_a_loop(seed: int, tokens: int, taken: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.choice([np.nan, np.inf, 1.0, -2.0], (2, tokens, 3)).astype(np.float32)
    index = rng.choice([-(2**31), -1, 0, tokens - 1, tokens, 2**31 - 1, *range(tokens)], (2, taken)).astype(np.int32)
    for (rows,) in in_all(GATHER, [x, index], {}):
        for b in range(2):
            for c, i in enumerate(index[b]):
                wanted = x[b, i] if 0 <= i < tokens else np.zeros(3, np.float32)
                np.testing.assert_array_equal(rows[b, c], wanted)


def attention_in_numpy(q: Array, k: Array, bias: Array, i: int, length: int, causal: int, scale: float) -> Array:
    """One row, float64, a head and a key at a time: q `[H, S, D]`, k `[Hkv, S, D]` -> `[S]`."""
    mean = np.zeros(q.shape[1])
    if not 0 <= i < length:
        return mean
    end = i + 1 if causal else length
    for h in range(q.shape[0]):
        keys = k[h * k.shape[0] // q.shape[0]].astype(np.float64)
        weight = np.array([np.exp(scale * q[h, i].astype(np.float64) @ keys[j] + bias[j]) for j in range(end)])
        mean[:end] += weight / weight.sum() / q.shape[0]
    return mean


@FEW
@given(
    shape=ragged(12),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    rows=st.integers(1, 6),
    causal=st.integers(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_of_attention_are_those_of_a_loop(
    shape: tuple[int, list[int]], heads: tuple[int, int], rows: int, causal: int, seed: int
) -> None:
    (tokens, lengths), rng = shape, np.random.default_rng(seed)
    q, k = (rng.standard_normal((len(lengths), n, tokens, 5)).astype(np.float32) for n in heads)
    bias = rng.standard_normal((len(lengths), tokens)).astype(np.float32)
    row = rng.integers(-1, tokens + 1, (len(lengths), rows)).astype(np.int32)
    for (prob,) in in_all(ROWS, [q, k, bias, row, int32(lengths)], {"causal": causal, "scale": 0.7}):
        for b, length in enumerate(np.clip(lengths, 0, tokens)):
            for r, i in enumerate(row[b]):
                wanted = attention_in_numpy(q[b], k[b], bias[b], int(i), int(length), causal, 0.7)
                np.testing.assert_allclose(prob[b, r], wanted, rtol=1e-4, atol=1e-6)
                assert abs(prob[b, r].sum() - (0 <= i < length)) < 1e-5
                assert not prob[b, r, length:].any()


def test_a_token_of_size_three_counts_as_three() -> None:
    """What the bias is for: the log of a size gives the probabilities of three equal keys in one."""
    q, k = normal(0, 1, 2, 4, 8), normal(1, 1, 2, 4, 8)
    more = [np.concatenate([x[:, :, :1], x[:, :, :1], x], 2) for x in (q, k)]
    bias = np.log(np.array([[3, 1, 1, 1]], np.float32))
    (one,) = in_torch(ROWS, [q, k, bias, int32([[3]]), int32([4])], {})
    (three,) = in_torch(ROWS, [*more, np.zeros((1, 6), np.float32), int32([[5]]), int32([6])], {})
    np.testing.assert_allclose(one[0, 0], [three[0, 0, :3].sum(), *three[0, 0, 3:]], rtol=1e-5)


@FEW
@given(shape=ragged(14), share=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 2**32 - 1))
def test_scores_of_even_tokens_are_those_of_a_loop(shape: tuple[int, list[int]], share: float, seed: int) -> None:
    (tokens, lengths), rng = shape, np.random.default_rng(seed)
    metric = rng.standard_normal((len(lengths), tokens, 5)).astype(np.float32)
    metric[rng.random(metric.shape[:2]) < 0.2] = rng.choice([0.0, np.nan, 1e30])
    protected = (rng.random(metric.shape[:2]) < share).astype(np.int32) * 9
    for score, candidate in in_all(FILTER, [metric, protected, int32(lengths)], {}):
        for b, length in enumerate(np.clip(lengths, 0, tokens)):
            free = [t for t in range(length) if not protected[b, t]]
            assert candidate[b].tolist() == [int(t in free and t % 2 == 1) for t in range(tokens)]
            real = [t for t in free if 0 < np.abs(metric[b, t]).max() < 1e19]
            for t in range(tokens):
                cosines = [
                    metric[b, t] @ metric[b, j] / np.linalg.norm(metric[b, t]) / np.linalg.norm(metric[b, j])
                    for j in real
                    if j % 2 == 1 and t in real and t % 2 == 0
                ]
                wanted = -max(cosines) if cosines else np.inf
                np.testing.assert_allclose(score[b, t], wanted, atol=1e-6)


def test_the_most_similar_pairs_go_first() -> None:
    """Dropping r tokens by this score merges the r even tokens that have the best match; odd ones always stay."""
    metric = normal(3, 2, 33, 8)
    lengths = int32([33, 20])
    score, candidate = in_torch(FILTER, [metric, np.eye(1, 33, dtype=np.int32).repeat(2, 0), lengths], {})
    (keep,) = in_torch(KEEP, [score, lengths], {"drop": 6})
    assert (lengths - keep.sum(1)).tolist() == [6, 6] and np.all(keep[candidate == 1]) and keep[:, 0].all()
    for b, length in enumerate(lengths):
        gone = [t for t in range(length) if not keep[b, t]]
        stay = [t for t in range(2, length, 2) if keep[b, t]]
        assert score[b, gone].max() <= score[b, stay].min()


@pytest.mark.parametrize(
    "attrs", [{"fixed": -1}, {"permille": 1001}, {"permille": -1}, {"rounding": 1000}, {"drop": -1}]
)
@pytest.mark.parametrize("op", [KEEP, INDEX], ids=lambda op: op.name)
def test_a_budget_out_of_range_is_refused(op: Op, attrs: dict[str, int]) -> None:
    first = np.zeros((1, 4), np.float32 if op is KEEP else np.int32)
    (name,) = attrs
    with pytest.raises(InputError, match=rf"{op.name}\.{name} is {attrs[name]}") as caught:
        in_torch(op, [first, int32([4])], attrs)
    assert str(caught.value.expected).startswith("0 to ")


def test_causal_is_0_or_1() -> None:
    inputs = [*(normal(n, 1, 1, 3, 4) for n in range(2)), np.zeros((1, 3), np.float32), int32([[0]]), int32([3])]
    with pytest.raises(InputError, match=r"AttentionRows\.causal is 2"):
        in_torch(ROWS, inputs, {"causal": 2})


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("op", "attrs", "message"),
    [
        (KEEP, {"permille": 1001}, "KeepTokens.permille is 1001; expected 0 to 1000"),
        (INDEX, {"drop": 2**20 + 1}, "IndexTokens.drop is 1048577; expected 0 to 1048576"),
        (ROWS, {"causal": -1}, "AttentionRows.causal is -1; expected 0 or 1"),
    ],
)
def test_a_kernel_refuses_what_the_reference_refuses(op: Op, attrs: dict[str, int], message: str) -> None:
    inputs = op.case_list()[0].make(0)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    native.register(options)
    model = model_of(op, "dynamic", inputs, attrs).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    with pytest.raises(Exception, match=message):
        session.run(None, named(op, inputs))


@pytest.mark.parametrize("op", [KEEP, INDEX, FILTER, GATHER], ids=lambda op: op.name)
def test_no_tokens_and_no_rows(op: Op) -> None:
    """Bodies give what the reference gives for a batch of none and for rows of no tokens."""
    for batch, tokens in ((0, 3), (2, 0)):
        sizes = {"B": batch, "S": tokens, "C": 4, "E": 5}
        inputs = [
            np.zeros([sizes[axis] for axis in port.axes], "i4" if port.dtypes == ("int32",) else "f4")
            for port in op.inputs
        ]
        expected, *made = in_all(op, inputs, {})
        for body in made:
            for mine, theirs in zip(body, expected, strict=True):
                np.testing.assert_array_equal(mine, theirs)

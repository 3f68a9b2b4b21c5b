"""RaggedAttention against attention over keys that were laid out densely here, and what must not change its result."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_op import Array, in_onnxruntime, in_torch
from torch.nn.functional import scaled_dot_product_attention

from plugins import all_ops
from plugins._cases import int32, normal
from plugins.ragged_attention.cases import paged
from trtpass.errors import InputError

OP = all_ops()["RaggedAttention"]
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}  # float32 attention over fewer than 200 values of a few units

Inputs = list[Array]  # q, k_pages, v_pages, page_table, lengths, queries


def inputs(
    lengths: Sequence[Sequence[int]],
    queries: Sequence[int],
    tokens: int | None = None,
    page_size: int = 4,
    group: int = 2,
    width: tuple[int, int] = (8, 6),
    shared: bool = False,
    seed: int = 0,
) -> Inputs:
    """A paged cache with poison wherever nothing is held, and queries behind the valid ones poisoned too."""
    cache = paged(seed, lengths, page_size, width, shared=shared)
    q = normal(seed + 9, len(lengths), group * len(lengths[0]), tokens or max(queries), width[0], scale=1.0)
    for b, asked in enumerate(queries):
        q[b, :, asked:] = np.nan
    return [q, *cache, int32(queries)]


def dense(q: Array, k_pages: Array, v_pages: Array, table: Array, lengths: Array, queries: Array) -> Array:
    """Slot by slot into padded K and V `[B, H, T, D]`, and one call with the mask `[B, H, S, T]` written out."""
    (batch, heads, tokens, _), page_size = q.shape, k_pages.shape[1]
    longest = max(1, int(lengths.max()))
    key = np.zeros((batch, heads, longest, q.shape[3]), np.float32)
    value = np.zeros((batch, heads, longest, v_pages.shape[2]), np.float32)
    mask = np.zeros((batch, heads, tokens, longest), bool)
    for b, h in np.ndindex(batch, heads):
        g = h // (heads // lengths.shape[1])
        for s in range(lengths[b, g]):
            page, row = table[b, g, s // page_size], s % page_size
            key[b, h, s], value[b, h, s] = k_pages[page, row], v_pages[page, row]
            for t in range(queries[b]):  # the query's own slot is `lengths - queries + t`
                mask[b, h, t, s] = s <= lengths[b, g] - queries[b] + t
    sees = mask.any(-1, keepdims=True)
    mask |= ~sees  # a softmax over something; its row is replaced
    given = (torch.from_numpy(x) for x in (np.where(sees, q, 0).astype(np.float32), key, value, mask))
    return np.where(sees, scaled_dot_product_attention(*given).numpy(), 0)


@pytest.mark.parametrize("page_size", [1, 4, 7, 64])
@pytest.mark.parametrize("queries", [[1, 1, 1], [1, 0, 1], [6, 3, 0], [20, 5, 9]])
def test_it_is_attention_over_the_densified_cache(queries: list[int], page_size: int) -> None:
    given = inputs([[17, 8], [0, 5], [1, 33]], queries, page_size=page_size)
    np.testing.assert_allclose(in_torch(OP, given, {})[0], dense(*given), **ROUNDING)


def test_pages_that_hold_everything_in_order_are_dense_causal_attention() -> None:
    q, k, v = (normal(i, 2, 2, 24, 8, scale=1.0) for i in range(3))
    pools = [x.reshape(-1, 8, 8) for x in (k, v)]  # three pages an owner
    table = np.arange(12, dtype=np.int32).reshape(2, 2, 3)
    (out,) = in_torch(OP, [q, *pools, table, np.full((2, 2), 24, np.int32), int32([24, 24])], {})
    expected = scaled_dot_product_attention(*(torch.from_numpy(x) for x in (q, k, v)), is_causal=True)
    np.testing.assert_allclose(out, expected.numpy(), **ROUNDING)


@pytest.mark.parametrize("queries", [[1, 1], [9, 4]])
def test_a_prompt_in_steps_is_the_prompt_at_once(queries: list[int]) -> None:
    """The last rows of a prefill are what a later step over the same cache gives."""
    q, *cache, whole = inputs([[30, 30], [21, 21]], [30, 21])
    (prefill,) = in_torch(OP, [q, *cache, whole], {})
    step = np.full((2, q.shape[1], max(queries), q.shape[3]), np.nan, np.float32)
    for b, asked in enumerate(queries):
        step[b, :, :asked] = q[b, :, whole[b] - asked : whole[b]]
    (out,) = in_torch(OP, [step, *cache, int32(queries)], {})
    for b, asked in enumerate(queries):
        np.testing.assert_allclose(out[b, :, :asked], prefill[b, :, whole[b] - asked : whole[b]], **ROUNDING)


def test_where_pages_lie_changes_nothing() -> None:
    q, k_pages, v_pages, table, lengths, queries = inputs([[17, 8], [11, 5]], [3, 1])
    order = np.random.default_rng(1).permutation(len(k_pages))
    known = (table >= 0) & (table < len(k_pages))
    moved = np.where(known, np.argsort(order)[np.where(known, table, 0)], table).astype(np.int32)
    assert not np.array_equal(moved, table)
    before = in_torch(OP, [q, k_pages, v_pages, table, lengths, queries], {})[0]
    after = in_torch(OP, [q, k_pages[order], v_pages[order], moved, lengths, queries], {})[0]
    np.testing.assert_array_equal(after, before)


def test_the_order_of_the_past_is_rounding() -> None:
    """In decode every slot is visible: eviction may leave the past in any order."""
    held = 19
    q, k_pages, v_pages, table, lengths, queries = inputs([[held]], [1])
    slot = np.arange(held)
    rows = table[0, 0, slot // 4], slot % 4
    order = np.random.default_rng(1).permutation(held)
    pools = [pool.copy() for pool in (k_pages, v_pages)]
    for pool in pools:
        pool[rows] = pool[rows][order]
    assert not np.array_equal(pools[0], k_pages, equal_nan=True)
    before = in_torch(OP, [q, k_pages, v_pages, table, lengths, queries], {})[0]
    np.testing.assert_allclose(in_torch(OP, [q, *pools, table, lengths, queries], {})[0], before, **ROUNDING)


def test_shared_pages_are_as_good_as_copies() -> None:
    q, k_pages, v_pages, table, lengths, queries = inputs([[17, 9], [11, 14]], [3, 1], shared=True)
    used = np.arange(table.shape[2]) * 4 < lengths[..., None]
    assert len(np.unique(table[used])) < used.sum()
    own = np.where(used, np.arange(table.size).reshape(table.shape), -1).astype(np.int32)
    pools = [np.full((table.size, *pool.shape[1:]), np.nan, np.float32) for pool in (k_pages, v_pages)]
    for copy, pool in zip(pools, (k_pages, v_pages), strict=True):
        copy[own[used]] = pool[table[used]]
    shared = in_torch(OP, [q, k_pages, v_pages, table, lengths, queries], {})[0]
    np.testing.assert_array_equal(in_torch(OP, [q, *pools, own, lengths, queries], {})[0], shared)


@pytest.mark.parametrize("kind", ["reference", "dynamic", "static"])
def test_rows_that_see_nothing_are_exactly_zero(kind: str) -> None:
    given = inputs([[3, 12], [0, 7], [8, 9]], [8, 5, 0], tokens=9)
    (out,) = in_torch(OP, given, {}) if kind == "reference" else in_onnxruntime(OP, kind, given, {})
    assert (out[0, :2, :5] == 0).all()  # head 0 and 1 hold three slots: the last three queries see them
    assert (out[0, :2, 5:8] != 0).all()
    assert (out[0, 2:, :8] != 0).all()
    assert (out[0, :, 8:] == 0).all()
    assert (out[1, :2] == 0).all() and (out[1, 2:, :5] != 0).all() and (out[1, :, 5:] == 0).all()
    assert (out[2] == 0).all()


def change(position: int, where: tuple[int, ...], value: int) -> Inputs:
    given = inputs([[17, 8], [3, 5]], [3, 1])
    given[position][where] = value
    return given


PAGES = len(inputs([[17, 8], [3, 5]], [3, 1])[1])


@pytest.mark.parametrize(
    ("given", "found", "expected"),
    [
        (change(4, (1, 0), -1), r"lengths\[1, 0\] is -1", "0 to M Z = 24"),
        (change(4, (0, 1), 25), r"lengths\[0, 1\] is 25", "0 to M Z = 24"),
        (change(5, (1,), -1), r"queries\[1\] is -1", "0 to S = 3"),
        (change(5, (0,), 4), r"queries\[0\] is 4", "0 to S = 3"),
        (change(3, (0, 0, 4), -1), r"page_table\[0, 0, 4\] is -1", f"0 to P - 1 = {PAGES - 1}"),
        (change(3, (0, 1, 1), PAGES), rf"page_table\[0, 1, 1\] is {PAGES}", f"0 to P - 1 = {PAGES - 1}"),
        ([normal(0, 2, 3, 3, 8), *inputs([[17, 8], [3, 5]], [3, 1])[1:]], "H = 3 .* Hkv = 2", "multiple of Hkv"),
    ],
)
def test_a_bad_input_is_named(given: Inputs, found: str, expected: str) -> None:
    with pytest.raises(InputError, match=found) as caught:
        in_torch(OP, given, {})
    assert expected in caught.value.expected


def test_keys_without_a_pool_are_refused() -> None:
    q, k_pages, v_pages, *rest = inputs([[1, 0]], [1])
    with pytest.raises(InputError, match="page in use") as caught:
        in_torch(OP, [q, k_pages[:0], v_pages[:0], *rest], {})
    assert "the pool is empty" in caught.value.expected


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_geometry(data: st.DataObject) -> None:
    """The reference against the dense layout, and both bodies against the reference."""
    draw = data.draw
    batch, owners = draw(st.integers(1, 3), label="batch"), draw(st.integers(1, 3), label="owners")
    page_size = draw(st.integers(1, 9), label="page_size")
    row = st.lists(st.integers(0, 40), min_size=owners, max_size=owners)
    lengths = draw(st.lists(row, min_size=batch, max_size=batch), label="lengths")
    tokens = draw(st.integers(1, 12), label="tokens")
    queries = draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch), label="queries")
    given = inputs(
        lengths,
        queries,
        tokens,
        page_size,
        group=draw(st.integers(1, 3), label="group"),
        width=(draw(st.integers(1, 9), label="D"), draw(st.integers(1, 9), label="Dv")),
        shared=draw(st.booleans(), label="shared"),
        seed=draw(st.integers(0, 2**20), label="seed"),
    )
    expected = dense(*given)
    np.testing.assert_allclose(in_torch(OP, given, {})[0], expected, **ROUNDING)
    for kind in ("dynamic", "static"):
        np.testing.assert_allclose(in_onnxruntime(OP, kind, given, {})[0], expected, **ROUNDING, err_msg=kind)

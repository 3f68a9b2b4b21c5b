"""Bookkeeping of a paged cache, against a model of it in which every token lies where it was written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtpass.pages import EVICTED, CacheFull, Pages

LAYERS, HEADS = 2, 2


class Written:
    """A pool that holds, in place of keys, the positions of tokens; and what each token's decision was."""

    def __init__(self, batch: int, page: int, window: int, sinks: int, entries: int, pages: int | None = None) -> None:
        count = batch * HEADS * entries if pages is None else pages
        self.book = Pages(LAYERS, batch, HEADS, page, count, entries, window, sinks)
        self.pool = np.full((LAYERS, count, page), -1)
        self.keep: dict[tuple[int, int, int], list[int]] = {
            (i, b, g): [] for i in range(LAYERS) for b in range(batch) for g in range(HEADS)
        }

    def write(self, slot: np.ndarray, start: np.ndarray, counts: list[int]) -> None:
        for (i, b, g), _ in self.keep.items():
            for t in range(counts[b]):
                s = int(slot[i, b, g, t])
                if s >= 0:
                    page = int(self.book.table[i, b, g, s // self.book.page])
                    assert page >= 0, "a slot without a page"
                    self.pool[i, page, s % self.book.page] = start[b] + t

    def move(self, moves: Any) -> None:
        for move in moves:
            self.pool[move.layer][move.target] = self.pool[move.layer][move.source]

    def decide(self, counts: list[int], rng: np.random.Generator) -> np.ndarray:
        made = rng.integers(0, 2, (LAYERS, self.book.batch, HEADS, max(1, *counts))).astype(np.int32)
        for (i, b, g), known in self.keep.items():
            known += made[i, b, g, : counts[b]].tolist()
        return made

    def held(self, i: int, b: int, g: int) -> list[int]:
        book, count = self.book, int(self.book.held[i, b, g])
        slots = np.arange(count)
        return sorted(self.pool[i, book.table[i, b, g, slots // book.page], slots % book.page].tolist())

    def visible(self, i: int, b: int, g: int, start: int, tokens: int) -> list[int]:
        """What a forward from ``start`` on may see, of ``tokens``: by the rule."""
        w, sinks, keep = self.book.window, self.book.sinks, self.keep[i, b, g]
        return [t for t in range(tokens) if keep[t] != EVICTED or t < sinks or t > start - 1 - w]

    def check(self, start: np.ndarray, tokens: np.ndarray, rows: list[int]) -> None:
        for i, b, g in self.keep:
            if b in rows:
                assert self.held(i, b, g) == self.visible(i, b, g, int(start[b]), int(tokens[b])), (i, b, g)
        used = [set() for _ in range(LAYERS)]
        for i, b, g in self.keep:
            pages = self.book.table[i, b, g][self.book.table[i, b, g] >= 0].tolist()
            assert len(pages) == -(-int(self.book.held[i, b, g]) // self.book.page), "pages without a slot in use"
            assert not used[i] & set(pages), "two owners of a page"
            used[i] |= set(pages)
        for i, free in enumerate(self.book.free()):
            assert not used[i] & set(free[free >= 0].tolist()), "a page that is held and free"
            assert len(used[i]) + int((free >= 0).sum()) == self.book.pages, "a page was lost"

    def fill(self, lengths: list[int], rng: np.random.Generator) -> None:
        """A prefill as the graph does it: tokens that stay go to the first slots, pages come from the front."""
        book, rows = self.book, np.array(lengths, np.int32)
        keep = self.decide(lengths, rng)
        token = np.arange(keep.shape[-1])
        end = rows[None, :, None, None]
        stays = ((keep != EVICTED) | (token < book.sinks) | (token >= end - 1 - book.window)) & (token < end)
        slot = np.where(stays, stays.cumsum(-1) - 1, -1).astype(np.int32)
        need = -(-stays.sum(-1) // book.page)
        table = np.full((*need.shape, int(need.max())), -1, np.int32)
        for i, free in enumerate(book.free()):
            taken = iter(free.tolist())
            for b, g in np.ndindex(*need.shape[1:]):
                for m in range(need[i, b, g]):
                    table[i, b, g, m] = next(taken)
        book.fill(rows, table, slot, keep)
        self.write(slot, np.zeros(len(lengths), int), lengths)

    def step(self, active: list[bool], rng: np.random.Generator) -> None:
        start = self.book.lengths.copy()
        slot = self.book.place(np.array(active))
        counts = [int(a) for a in active]
        self.write(slot, start, counts)
        keep = self.decide(counts, rng)
        self.check(start, start + counts, [b for b, a in enumerate(active) if a])
        self.book.settle(slot, keep, np.array(active))

    def turn(self, counts: list[int], chunk: int, rng: np.random.Generator) -> None:
        book, start = self.book, self.book.lengths.copy()
        self.move(book.evict_due())
        slots, keeps = [], []
        for at in range(0, max(counts), chunk):
            part = [min(chunk, max(0, n - at)) for n in counts]
            slot = book.append(np.array(part, np.int32))
            self.write(slot, start + at, part)
            slots.append(slot)
            keeps.append(self.decide(part, rng))
        self.check(start, start + counts, [b for b, n in enumerate(counts) if n])
        self.move(book.judge(np.array(counts, np.int32), np.concatenate(slots, -1), np.concatenate(keeps, -1)))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_forward_sees_what_the_rule_says(data: st.DataObject) -> None:
    draw = data.draw
    batch = draw(st.integers(1, 3))
    page, window, sinks = draw(st.integers(1, 5)), draw(st.integers(0, 6)), draw(st.integers(0, 3))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    cache = Written(batch, page, window, sinks, entries=-(-90 // page))
    cache.fill([draw(st.integers(1, 20)) for _ in range(batch)], rng)
    alive = [True] * batch
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["steps", "turn", "release"]))
        if kind == "steps":
            for _ in range(draw(st.integers(1, 8))):
                cache.step(list(alive), rng)
        elif kind == "turn":
            counts = [draw(st.integers(0, 10)) if a else 0 for a in alive]
            if any(counts):
                cache.turn(counts, draw(st.integers(1, 10)), rng)
        elif sum(alive) > 1:
            row = alive.index(True)
            alive[row] = False
            cache.book.release(row)
            assert not cache.book.held[:, row].any()
    cache.check(cache.book.lengths, cache.book.lengths, [])


def test_decode_overwrites_and_takes_no_more_pages() -> None:
    """Where everything is evicted, the cache stays at sinks and window, whatever the length."""
    book = Pages(1, 1, 1, 4, 100, 100, 7, 2)
    active = np.array([True])
    for _ in range(200):
        slot = book.place(active)
        book.settle(slot, np.zeros((1, 1, 1, 1), np.int32), active)
    assert book.held.tolist() == [[[2 + 7 + 1]]]
    assert book.pages_held == 3


@pytest.mark.parametrize("call", ["place", "append", "fill"])
def test_full_changes_nothing(call: str) -> None:
    book = Pages(1, 2, 1, 4, 3, 8, 0, 0)
    book.append(np.array([4, 4], np.int32))
    before = [x.copy() for x in (book.table, book.held, book.ring, book.lengths, book.free())]
    with pytest.raises(CacheFull, match="the KV cache is full: layer 0 wants 2 pages, and 1 of 3 are free"):
        if call == "place":
            book.place(np.array([True, True]))
        elif call == "append":
            book.append(np.array([1, 1], np.int32))
        else:
            slot = np.tile(np.arange(4, dtype=np.int32), (1, 2, 1, 1))
            book.fill(np.array([4, 4], np.int32), np.full((1, 2, 1, 1), -1, np.int32), slot, np.ones_like(slot))
    for x, y in zip(before, (book.table, book.held, book.ring, book.lengths, book.free()), strict=True):
        assert np.array_equal(x, y)


def test_a_table_that_is_too_short_is_an_error() -> None:
    book = Pages(1, 1, 1, 4, 10, 2, 0, 0)
    with pytest.raises(CacheFull, match="an owner would hold 9 keys"):
        book.append(np.array([9], np.int32))
    assert book.pages_held == 0


def test_a_turn_that_does_not_fit_is_taken_back() -> None:
    book = Pages(1, 1, 1, 4, 2, 8, 0, 0)
    book.append(np.array([3], np.int32))
    held = book.held.copy()
    book.append(np.array([4], np.int32))
    book.cut(held)
    assert book.held.tolist() == [[[3]]] and book.pages_held == 1

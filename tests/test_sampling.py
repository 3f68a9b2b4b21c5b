"""Nuclei against their definition, values out of range, and stop texts against the text that they cut."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtpass.errors import InputError
from trtpass.sampling import RowSampler, Sampler, sample
from trtpass.text import StopText


def nucleus(logits: np.ndarray, temperature: float, top_p: float) -> set[int]:
    """By the definition: most likely first, lower ids first among equals, until the sum reaches ``top_p``."""
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    wanted, reached, inside = top_p * weights.sum(), 0.0, set[int]()
    for token in sorted(range(len(logits)), key=lambda i: (-weights[i], i)):
        if reached >= wanted:
            break
        inside.add(token)
        reached += weights[token]
    return inside


@pytest.mark.parametrize("size", [1, 5, 64, 65, 700])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 0.999])
def test_only_the_nucleus_is_drawn_from(size: int, top_p: float) -> None:
    rng = np.random.default_rng([size, round(top_p * 1000)])
    for logits in (rng.normal(size=size), rng.integers(0, 3, size), np.zeros(size)):  # ties: few values, one value
        inside = nucleus(logits.astype(np.float32), 0.7, top_p)
        stream = np.random.default_rng(1)
        drawn = {sample(logits.astype(np.float32), 0.7, stream, top_p) for _ in range(40 * min(size, 5))}
        assert drawn <= inside
        if len(inside) <= 2:
            assert drawn == inside


def test_a_nucleus_keeps_the_odds_of_its_tokens() -> None:
    logits = np.log(np.array([0.1, 0.5, 0.3, 0.1], np.float32))
    stream = np.random.default_rng(0)
    draws = np.bincount([sample(logits, 1.0, stream, 0.85) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(draws, np.array([0.1, 0.5, 0.3, 0]) / 0.9, atol=0.03, rtol=0)  # four deviations
    halves = np.log(np.array([0.25, 0.5, 0.25]))
    assert {sample(halves, 1.0, stream, 0.5) for _ in range(200)} == {1}, "0.5 reaches 0.5"


def test_everything_is_what_was_drawn_before_there_were_nuclei() -> None:
    logits = np.random.default_rng(3).normal(size=300).astype(np.float32)
    weights = np.exp((logits.astype(np.float64) - logits.max()) / 0.8)
    old, new = np.random.default_rng(5), np.random.default_rng(5)
    for _ in range(50):
        assert sample(logits, 0.8, new, 1.0) == int(old.choice(300, p=weights / weights.sum()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.01}, "top_p=1.01"),
        ({"top_p": math.nan}, "top_p=nan"),
        ({"top_p": -math.inf}, "top_p=-inf"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_values_out_of_range(options: dict[str, float], message: str) -> None:
    values = {"max_tokens": 4, "stop_ids": frozenset[int](), "temperature": 1.0, "seed": 0, **options}
    with pytest.raises(InputError, match=message):
        RowSampler(**values)
    with pytest.raises(InputError, match=message):
        Sampler(2, **values)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers(temperature: float, bad: float) -> None:
    with pytest.raises(InputError, match="finite logits"):
        sample(np.array([1.0, bad, 2.0], np.float32), temperature, np.random.default_rng(0), 0.5)


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e308])
def test_extreme_temperatures(temperature: float) -> None:
    logits = np.array([1.0, -math.inf, 2.0, 2.0], np.float32)
    drawn = {sample(logits, temperature, np.random.default_rng(i), 0.999) for i in range(60)}
    assert drawn == ({0, 2, 3} if temperature > 1 else {2, 3})


def test_a_row_stops_where_it_is_told_to() -> None:
    seen: list[tuple[int, int]] = []

    def ends(row: int, token: int) -> bool:
        seen.append((row, token))
        return row == 1

    sampler = Sampler(3, 2, [2], 0.0, 0, ends=ends)
    assert sampler.step(np.eye(3), np.zeros(3, bool)).stopped == (None, "stop", "stop")
    assert sampler.step(np.eye(3), np.zeros(3, bool)).stopped == ("length", None, None)
    assert seen == [(0, 0), (1, 1), (0, 0)], "a stop token is not asked about"


letters = st.text("ab", max_size=14)


@settings(max_examples=400, deadline=None)
@given(st.lists(letters, max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_texts_cut_at_the_earliest_place(pieces: list[str], stops: list[str]) -> None:
    text, cut = "".join(pieces), StopText(stops)
    shown, so_far = "", ""
    for piece in pieces:
        shown += cut.push(piece)
        so_far += piece
        if cut.found:
            break
        held = so_far[len(shown) :]
        assert so_far.startswith(shown)
        assert not held or any(stop != held and stop.startswith(held) for stop in stops), "withheld without need"
        assert all(at == -1 or len(shown) < at for at in map(so_far.find, stops)), "found, and not said at once"
    whole = shown + cut.finish()
    places = [at for at in map(text.find, stops) if at >= 0]
    assert whole == text[: min(places, default=len(text))]
    assert cut.found == bool(places)
    assert not places or cut.push("ab") == "", "what comes after a stop text is ignored"


def test_a_longer_stop_text_around_a_shorter_one() -> None:
    cut = StopText(["bc", "abcd"])
    assert [cut.push(c) for c in "xabc"] == ["x", "", "", ""] and not cut.found, "abcd may yet come, which is earlier"
    assert cut.push("d") == "" and cut.found and cut.finish() == ""
    cut = StopText(["bc", "abcd"])
    assert "".join(cut.push(c) for c in "xabce") == "xa" and cut.found and cut.finish() == ""


def test_stop_texts_have_limits() -> None:
    for stops, message in ((["x"] * 17, "17 stop texts"), (["x", ""], "0 characters"), (["x" * 1025], "1025")):
        with pytest.raises(InputError, match=message):
            StopText(stops)


def test_a_seed_is_a_stream_of_its_own() -> None:
    def drawn(seed: int, row: int = 0) -> list[int]:
        sampler = RowSampler(20, frozenset(), 1.0, seed, row)
        return [sampler.step(np.zeros(1000, np.float32), False)[0] for _ in range(20)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2) and drawn(1) != drawn(1, row=1)

"""Random inputs of the operators that rank and correlate tokens by attention, and that track and restore them."""

from __future__ import annotations

import numpy as np
from fuzz_values import FAR, Request, Rng, floating, normal, replaced, size, some, unreal_floats, width, with_attrs

from plugins._cases import int32
from plugins.ficoco_correlate.cases import kept_tokens
from plugins.ficoco_filter import cases as filtering
from plugins.track_tokens.cases import stream


def redundancy(rng: Rng) -> Request:
    """Sums that differ by more than rounding, or terms that are exact in any order; rows of padding are NaN."""
    batch, s = int(rng.choice([0, 1, 2, 3])), size(rng)
    exact = rng.random() < 0.4
    prob, cue = (filtering.ties if exact else filtering.attention)(rng, batch, s)
    lengths = rng.integers(-2, s + 3, batch)
    protected = np.where(rng.random((batch, s)) < rng.choice([0.0, 0.2, 0.9]), rng.choice([1, -7], (batch, s)), 0)
    for row, length in zip(prob, np.clip(lengths, 0, s), strict=True):
        row[length:] = np.nan
    place = filtering.grid(rng, batch, s, float(rng.uniform(0.3, 1.0))) if batch and s else np.zeros((batch, s), int)
    attrs = {
        "weight_permille": int(rng.choice([0, 350, 600, 1000])),
        "width": int(rng.choice([0, 1, 2, 7, 16, 1000])),
        "window": int(rng.choice([1, 2, 3, 9])),
        "coefficient_permille": int(rng.choice([500, 1000, 2000, 3000])),
    }
    inputs = [prob.astype(np.float32), cue.astype(np.float32), place.astype(np.int32)]
    return Request([*inputs, protected.astype(np.int32), int32(lengths.tolist())], attrs)


def wrong_redundancy(rng: Rng, given: Request) -> Request:
    kind = rng.integers(4)
    if kind == 0:
        wrong = {
            "weight_permille": (-1, 1001),
            "width": (-1, 2**31),
            "window": (0, -3, 2**62),
            "coefficient_permille": (0,),
        }
        name = str(rng.choice(sorted(wrong)))
        return with_attrs(given, f"{name} out of range", **{name: int(rng.choice(wrong[name]))})
    if kind == 1:
        return unreal_floats(rng, given, 0, 1)
    if kind == 2:
        return replaced(given, 2, some(rng, given.inputs[2], *FAR, share=0.4), "places far out")
    return replaced(given, 4, some(rng, given.inputs[4], *FAR, share=0.6), "lengths far out")


def correlate(rng: Rng) -> Request:
    """Values of any size and ties; what is no column is NaN."""
    batch, s = int(rng.choice([0, 1, 2, 3])), size(rng)
    capacity = int(rng.integers(s + 1)) if rng.random() < 0.8 else s
    slot, _, count = stream(rng, s, capacity, rng.integers(0, s + 1, batch).tolist())
    candidate = np.where(rng.random((batch, s)) < rng.choice([0.0, 0.2, 1.0]), 0, rng.choice([1, -7], (batch, s)))
    affinity = np.exp(rng.standard_normal((batch, s - capacity, s)) * 3)
    draw = rng.random()
    if draw < 0.3:
        affinity = np.round(affinity)
    elif draw < 0.5:
        affinity = some(rng, affinity, *((np.inf,) if draw < 0.4 else (np.nan, -np.inf)), share=0.3)
    affinity[np.broadcast_to(((slot < 0) | (candidate == 0))[:, None], affinity.shape)] = np.nan
    inputs = [affinity.astype(np.float32), kept_tokens(slot, capacity), candidate.astype(np.int32), count]
    return Request(inputs, {"eps_permille": int(rng.choice([0, 300, 900, 998, 999]))})


def wrong_correlate(rng: Rng, given: Request) -> Request:
    if rng.random() < 0.3:
        return with_attrs(given, "eps out of range", eps_permille=int(rng.choice([-1, 1000, 2**31])))
    at = int(rng.choice([1, 3]))
    return replaced(given, at, some(rng, given.inputs[at], *FAR, share=0.6), "index or count far out")


def track(rng: Rng) -> Request:
    batch, s, original = int(rng.choice([0, 1, 2, 3])), size(rng, 100), size(rng, 150)
    capacity = int(rng.integers(s + 1))
    slot, rest, count = stream(rng, s, capacity, rng.integers(0, s + 1, batch).tolist())
    target = rng.integers(-1, capacity + 2, (batch, (s - capacity) * int(rng.integers(1, 4))))
    owner = rng.integers(-2, s + 2, (batch, original))
    return Request([owner.astype(np.int32), slot, rest, target.astype(np.int32), count])


def wrong_track(rng: Rng, given: Request) -> Request:
    if rng.random() < 0.3:
        return replaced(given, 3, np.pad(given.inputs[3], [(0, 0), (0, 1)]), "T is perhaps no multiple of M")
    at = int(rng.choice([0, 1, 2, 3, 4]))
    return replaced(given, at, some(rng, given.inputs[at], *FAR, share=0.4), f"input {at} far out")


def restore(rng: Rng) -> Request:
    batch, s, rows, dtype = int(rng.choice([0, 1, 2, 3])), size(rng), size(rng), floating(rng)
    x = normal(rng, dtype, batch, rows, width(rng))
    if rng.random() < 0.3:
        x = some(rng, x, np.nan, np.inf, -np.inf)
    owner = rng.integers(-1, rows + 1, (batch, s))
    owner[rng.random((batch, s)) < rng.choice([0.0, 0.5, 0.9, 1.0])] = -1
    attrs = {"fixed": int(rng.choice([0, 0, 1, 5, 500])), "width": int(rng.choice([0, 1, 2, 7, 16, 10**9]))}
    return Request([x, owner.astype(np.int32)], attrs)


def wrong_restore(rng: Rng, given: Request) -> Request:
    if rng.random() < 0.4:
        name = str(rng.choice(["fixed", "width"]))
        return with_attrs(given, f"{name} is negative", **{name: int(rng.choice([-1, -(2**31)]))})
    return replaced(given, 1, some(rng, given.inputs[1], *FAR, share=0.5), "owners far out")

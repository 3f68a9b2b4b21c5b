"""A random call of an operator, and what random inputs are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from plugins._cases import Array

Rng = np.random.Generator


@dataclass
class Request:
    """One call. ``wrong`` says in words what is wrong with it; empty: nothing, it has to succeed.

    ``unreal``: there is NaN or infinity where the reference gives no promise, so that only finite results are compared.
    ``misshapen``: it has to be refused whatever its values are.
    """

    inputs: Sequence[Array]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    wrong: str = ""
    unreal: bool = False
    misshapen: bool = False


def size(rng: Rng, most: int = 40, least: int = 0) -> int:
    """Mostly small, with 0 and 1 often, now and then beyond the blocks that kernels work in."""
    draw = rng.random()
    if draw < 0.1:
        return max(least, int(rng.integers(2)))
    if draw < 0.9:
        return int(rng.integers(least, most + 1))
    return int(rng.integers(most, 8 * most + 1))


def width(rng: Rng) -> int:
    return int(rng.choice([1, 2, 3, 5, 7, 8, 15, 16, 17, 24, 31, 32, 33, 48, 64, 65, 80]))


def floating(rng: Rng) -> str:
    return "float16" if rng.random() < 0.4 else "float32"


def normal(rng: Rng, dtype: str, *shape: int) -> Array:
    return (rng.standard_normal(shape) * 1.2).astype(dtype)


def scale(rng: Rng) -> float:
    """Above 0: torch takes the root of a scale on one of its paths."""
    return 0.0 if rng.random() < 0.7 else float(rng.uniform(0.05, 0.5))


def groups(rng: Rng) -> tuple[int, int, int]:
    """B, H, Hkv."""
    keys = int(rng.integers(1, 4))
    return int(rng.choice([0, 1, 1, 1, 2, 3])), keys * int(rng.integers(1, 4)), keys


def some(rng: Rng, x: Array, *values: float, share: float = 0.1) -> Array:
    """A copy with some of its elements, at least one if there is one, replaced."""
    out = x.copy()
    if out.size:
        chosen = rng.random(out.shape) < share
        chosen.flat[rng.integers(out.size)] = True
        out[chosen] = rng.choice(np.array(values), out.shape).astype(x.dtype)[chosen]
    return out


FAR = (-(2**31), -1000, -1, 10**6, 2**31 - 1)


def replaced(given: Request, at: int, x: Array, wrong: str, unreal: bool = False) -> Request:
    inputs = list(given.inputs)
    inputs[at] = x
    return Request(inputs, given.attrs, wrong, unreal)


def with_attrs(given: Request, wrong: str, **attrs: Any) -> Request:
    return Request(given.inputs, {**given.attrs, **attrs}, wrong)


def unreal_floats(rng: Rng, given: Request, *ports: int) -> Request:
    at = int(rng.choice(ports))
    return replaced(given, at, some(rng, given.inputs[at], np.nan, np.inf, -np.inf), f"input {at} not finite", True)


def heads_not_a_multiple(given: Request, at: int = 0) -> Request:
    x = given.inputs[at]
    return replaced(given, at, np.concatenate([x, x, x[:, :1]], 1), "H is no multiple of Hkv")

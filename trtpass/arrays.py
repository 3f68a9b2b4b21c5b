"""What callers give to ``trtpass.scc``, checked, as NumPy arrays."""

from __future__ import annotations

import math
import sys
from numbers import Integral, Real
from typing import Any

import numpy as np

from trtpass.errors import InputError

Array = np.ndarray[Any, Any]

FLOATS = ("float16", "float32", "float64", "bfloat16")


def threshold_of(tau: Any) -> float:
    """tau, cut to [-2, 2]: cosines are within.

    Raises:
        InputError: it is no number, or NaN.
    """
    if isinstance(tau, bool) or not isinstance(tau, Real) or math.isnan(tau):
        raise InputError(f"scc: tau is {tau!r}", "a number; cosines are between -1 and 1")
    return min(max(float(tau), -2.0), 2.0)


def tokens_of(tokens: Any) -> Array:
    """Tokens as a NumPy array `[n, E]` or `[B, n, E]`, bfloat16 as float32.

    Raises:
        InputError: no NumPy or torch array, not floating, another rank, or empty.
    """
    x = _numpy(tokens)
    dtype = str(getattr(tokens, "dtype", type(tokens).__name__)).removeprefix("torch.")
    if x is None or dtype not in FLOATS:
        raise InputError(f"scc: tokens are {dtype}", f"a NumPy or torch array of {', '.join(FLOATS)}")
    if x.ndim not in (2, 3) or x.size == 0:
        raise InputError(f"scc: tokens have shape {list(x.shape)}", "[n, E] or [B, n, E], no size 0")
    return x


def groups_of(groups: Any, shape: tuple[int, ...]) -> Array | None:
    """Groups of each of B streams, numbered 0 to G - 1 by ascending label: `[B, n]`, or None without.

    Raises:
        InputError: a size below 1, or labels that are no integers or do not fit ``shape`` (B, n).
    """
    if groups is None:
        return None
    expected = "integer labels [n] (for [B, n, E] also [B, n]), or a group size of 1 or more"
    if isinstance(groups, Integral) and not isinstance(groups, bool):
        if groups < 1:
            raise InputError(f"scc: groups={groups}", expected)
        labels = np.arange(shape[1]) // int(groups)
    else:
        labels = _beside(groups, "groups", shape, "iu", expected)
    return np.stack([np.unique(row, return_inverse=True)[1] for row in np.broadcast_to(labels, shape)])


def positions_of(positions: Any, shape: tuple[int, ...]) -> Array:
    """Positions `[B, n]`, by default 0 to n - 1.

    Raises:
        InputError: not finite, no numbers, or numbers that do not fit ``shape`` (B, n).
    """
    if positions is None:
        return np.broadcast_to(np.arange(shape[1], dtype=np.int64), shape)
    expected = "finite numbers [n] (for [B, n, E] also [B, n])"
    array = _beside(positions, "positions", shape, "iuf", expected)
    if not np.isfinite(array).all():
        raise InputError("scc: positions hold NaN or infinity", expected)
    return np.broadcast_to(array, shape)


def _beside(given: Any, name: str, shape: tuple[int, ...], kinds: str, expected: str) -> Array:
    """Numbers that go with tokens of ``shape`` `[B, n]`: one for each of a stream, or of every stream."""
    array = _numpy(given)
    if array is None:
        try:
            array = np.asarray(given)
        except ValueError as error:  # lists of several lengths
            raise InputError(f"scc: {name} are no array ({error})", expected) from error
    if array.dtype.kind not in kinds or array.shape not in (shape, shape[1:]):
        tokens = f"{shape[1]} tokens" if shape[0] == 1 else f"{shape[0]} streams of {shape[1]} tokens"
        raise InputError(f"scc: {name} have shape {list(array.shape)} and dtype {array.dtype} for {tokens}", expected)
    return array


def _numpy(given: Any) -> Array | None:
    """A NumPy or torch array as a NumPy array, None for anything else. bfloat16 becomes float32."""
    torch = sys.modules.get("torch")  # who has a torch array has imported torch
    if torch is not None and isinstance(given, torch.Tensor):
        given = given.detach().cpu()
        array: Array = (given.float() if given.dtype == torch.bfloat16 else given).numpy()
        return array
    return given if isinstance(given, np.ndarray) else None

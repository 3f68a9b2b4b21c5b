"""Which layers a method applies to: a list, ranges, ``all``, or the calibrated ``drift:QUANTILE``."""

from __future__ import annotations

import json
from collections.abc import Sequence

import onnx_ir as ir

from trtpass.errors import InputError

DRIFT_KEY = "trtpass.drift"  # model metadata: JSON list, R_l of each layer


def carry_drift(model: ir.Model, drift: Sequence[float]) -> None:
    """Store calibrated inter-layer drift in the model's metadata, where passes find it."""
    model.metadata_props[DRIFT_KEY] = json.dumps([round(float(r), 6) for r in drift])


def carried_drift(model: ir.Model) -> list[float] | None:
    """The drift that the model carries, or None.

    Raises:
        InputError: the metadata is not a list of numbers.
    """
    text = model.metadata_props.get(DRIFT_KEY)
    if text is None:
        return None
    try:
        values = [float(x) for x in json.loads(text)]
    except (ValueError, TypeError) as error:
        raise InputError(f"model metadata '{DRIFT_KEY}' is {text[:60]!r}", "a JSON list of numbers") from error
    return values


def resolve(text: str, count: int, drift: Sequence[float] | None) -> tuple[int, ...]:
    """Layer indices (0-based, ascending) from ``all``, ``auto``, ``drift:0.5``, or ``3+5+10-20``.

    ``drift:q`` takes the layers whose drift ``R_l = mean_t |h_{l+1,t} - h_{l,t}| / |h_{l,t}|`` is at or below the
    q-quantile (Token Sparse Attention, arXiv 2602.03216). ``auto`` is ``drift:0.5`` where the model carries a
    calibration, else ``all``.

    Raises:
        InputError: an index out of range, no calibration for ``drift``, or text that is none of the forms.
    """
    if text == "auto":
        text = "all" if drift is None else "drift:0.5"
    if text == "all":
        return tuple(range(count))
    if text.startswith("drift:"):
        return _by_drift(text, count, drift)
    chosen: set[int] = set()
    for part in text.split("+"):
        first, dash, last = part.partition("-")
        if not (first + last).isdecimal() or not first or (dash and not last):
            raise InputError(f"layers={text}", "all, auto, drift:0.5, or indices and ranges joined by '+' (3+5+10-20)")
        low, high = int(first), int(last if dash else first)
        if high < low:
            raise InputError(f"layers={text} has the empty range {part}", "ranges that go up, such as 10-20")
        if high >= count:
            raise InputError(
                f"layers={text} names layer {max(low, count) if dash else low}", f"indices from 0 to {count - 1}"
            )
        chosen.update(range(low, high + 1))
    return tuple(sorted(chosen))


def _by_drift(text: str, count: int, drift: Sequence[float] | None) -> tuple[int, ...]:
    if drift is None:
        raise InputError(
            f"layers={text}, but the model carries no drift calibration",
            "calibrated inter-layer drift",
            "run `trtpass calibrate drift MODEL` first, or name the layers (layers=all, layers=3+5+10-20)",
        )
    if len(drift) != count:
        raise InputError(
            f"the drift calibration has {len(drift)} layers", f"{count}, as many as attention blocks", "calibrate again"
        )
    try:
        quantile = float(text.removeprefix("drift:"))
    except ValueError:
        quantile = -1.0
    if not 0.0 < quantile <= 1.0:
        raise InputError(f"layers={text}", "drift:Q with 0 < Q <= 1")
    ordered = sorted(drift)
    position = quantile * (count - 1)  # linear interpolation between order statistics
    low = int(position)
    cut = ordered[low] + (position - low) * (ordered[min(low + 1, count - 1)] - ordered[low])
    return tuple(i for i, r in enumerate(drift) if r <= cut)

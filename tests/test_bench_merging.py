"""Baselines of ``scc.components``: both are measured, the faster one counts, and they must agree."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from trtpass.bench import measure, merging
from trtpass.bench import merging_baselines as baselines
from trtpass.errors import CheckFailed

SHAPE = merging.Shape(3, 30, 32, 2, 5)
MACHINE = measure.Machine("a processor", 2, 1, "1.31", 0.01, 0.0)  # so slow that the floor in ms has many digits


def test_the_faster_baseline_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each side takes a time that is made up: ours 1 s, NumPy 3 s, PyTorch 2 s."""
    monkeypatch.setattr(merging, "sets_for", lambda _size: 2)

    def made_up(sides: Any, repeats: int, *_: Any, **__: Any) -> Any:
        for calls in sides:
            assert [call() for call in calls] == [None, None]
        return np.repeat([[1.0], [3.0], [2.0]], repeats, 1)

    monkeypatch.setattr(merging, "interleave", made_up)
    (record,) = merging.run(MACHINE, 2, [SHAPE])
    assert record.baseline == baselines.BASELINES["torch"] and record.ratio == 2.0
    assert (record.params["numpy_ms"], record.params["torch_ms"]) == (3000.0, 2000.0)
    assert record.limit == pytest.approx(2.0 / (record.params["floor_ms"] * 1e-3), rel=0.01)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_both_baselines_have_one_result(seed: int, steps: int) -> None:
    x = merging.scene(seed, SHAPE)
    baselines.require_same(baselines.in_torch(x, steps), baselines.in_numpy(x, steps))


@pytest.mark.parametrize("name", ["label", "counts", "match", "size", "merged"])
def test_baselines_that_differ_are_red(name: str) -> None:
    x = merging.scene(0, SHAPE)
    right = baselines.in_numpy(x, 2)
    wrong = dataclasses.replace(right, **{name: np.array(getattr(right, name)) + 1})
    with pytest.raises(CheckFailed):
        baselines.require_same(wrong, right)

"""The real SmolLM2 with the KVzap weights that come with it: engine = boolean-mask oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import Exported
from paged_proofs import proof

from trtpass import io
from trtpass.kvzap.surrogate import Surrogate

pytestmark = [pytest.mark.model, pytest.mark.slow]


def text_rows(tokenizer: Any, lengths: list[int], steps: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of these lengths and the ``steps`` tokens after each, of one text."""
    words = "The page of a cache holds keys; a key that nobody looks at is one too many. Rule %d: measure, then say. "
    ids = tokenizer("".join(words % i for i in range(max(lengths) // 20 + steps)), add_special_tokens=False)[
        "input_ids"
    ]
    rows = [ids[i : i + n] for i, n in enumerate(lengths)]
    return rows, [ids[i + n : i + n + steps] for i, n in enumerate(lengths)]


def gaps(smollm2: Any, onnx: Path, lengths: list[int], steps: int, threshold: float) -> tuple[float, float, float]:
    """Largest differences of logits under the engine's decisions and under the oracle's own, and the share kept."""
    weights = Surrogate.shipped("smollm2-135m")
    assert weights is not None, "the weights that come with the model"
    exported = Exported(smollm2, io.load(onnx), onnx)
    one = proof(exported, f"kvzap:threshold={threshold},weights={weights}", page=64)
    state, got, forced, free = one.run(*text_rows(smollm2.tokenizer, lengths, steps))
    return float(np.abs(got - forced.logits).max()), float(np.abs(got - free.logits).max()), float(state.kept().mean())


def test_engine_is_the_oracle(smollm2: Any, smollm2_onnx: Path) -> None:
    """Two prompts and 16 steps, at a threshold that evicts most of what has left the window."""
    forced, free, kept = gaps(smollm2, smollm2_onnx, [320, 200], 16, -2.5)
    assert forced < 2e-4, "logits reach 40: 2e-4 is 5e-6 of that"
    assert free < 2e-4 and 0.4 < kept < 0.9

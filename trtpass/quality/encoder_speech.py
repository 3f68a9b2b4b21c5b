"""Whisper with fewer tokens from its encoder: how many words of the transcript change.

The encoder is the rewritten graph; the decoder is the PyTorch one, unchanged, decoding greedily. Without restoring, its
cross attention sees fewer keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from trtpass import passes
from trtpass.progress import Report, silent
from trtpass.quality.encoder_metrics import word_difference
from trtpass.quality.encoder_plan import Setting
from trtpass.quality.encoder_sides import Seen, Side

INPUT, OUTPUT = "input_features", "last_hidden_state"
RECIPE = "whisper-tiny-en"
Say = Callable[[np.ndarray], str]


def voice(decoder: Any) -> Say:
    """Encoder states `[1, tokens, 384]` to text, by greedy decoding with a WhisperForConditionalGeneration."""
    from graphs.whisper_tiny_en import text, transcribe

    return lambda states: text(transcribe(decoder, states))


class Listener:
    """Sound in windows, and what turns an encoder's output into text.

    Args:
        say: encoder states `[1, tokens, E]` to text; see ``voice``.
        windows: log-mel features `[windows, bands, frames]`.
    """

    def __init__(self, say: Say, windows: np.ndarray) -> None:
        self.say, self.windows = say, windows

    def hear(self, side: Side) -> tuple[str, list[Seen]]:
        """The transcript of all windows, and what the encoder did in each."""
        seen = [side.run({INPUT: window[None]}) for window in self.windows]
        return " ".join(self.say(one.outputs[OUTPUT]) for one in seen), seen


def canonical(decoder: Any) -> ir.Model:
    """The encoder of a WhisperForConditionalGeneration as a canonical graph."""
    from graphs.whisper_tiny_en import export
    from trtpass.weights import Loaded

    encoder = decoder.get_encoder()
    return export(Loaded(encoder, encoder.config, None, None))


def sweep(
    dense: ir.Model,
    listener: Listener,
    settings: Sequence[Setting],
    report: Report = silent,
    threads: int | None = None,
) -> tuple[str, list[dict[str, Any]]]:
    """The unmerged transcript, and one row for each setting: means over windows and seeds, ``spread`` over seeds."""
    reference, _ = listener.hear(Side(dense, [], threads))
    rows = []
    for number, setting in enumerate(settings):
        runs = []
        for text in setting.passes:
            report(text, number / len(settings))
            said, seen = listener.hear(Side(dense, [passes.parse(text)], threads))
            runs.append((said, seen))
        rows.append(_row(setting, reference, runs))
    return reference, rows


def _row(setting: Setting, reference: str, runs: Sequence[tuple[str, Sequence[Seen]]]) -> dict[str, Any]:
    changed = [word_difference(reference, said) for said, _ in runs]
    every: list[Seen] = [one for _, seen in runs for one in seen]
    return {
        "group": setting.group,
        "method": setting.method,
        "passes": list(setting.passes),
        "kept": round(float(np.mean([one.kept for one in every])), 4),
        "last": round(float(np.mean([one.last for one in every])), 1),
        "keys": round(float(np.mean([one.outputs[OUTPUT].shape[1] for one in every])), 1),
        "difference": round(float(np.mean(changed)), 5),
        "spread": round(float(np.std(changed)), 5) if len(runs) > 1 else None,
        "said": runs[0][0],
    }

"""What the sweeps of encoders measure: settings by group, at kept fractions of about 0.9, 0.75, 0.6, 0.5, 0.4 and 0.25.

The values were solved for these fractions: 257 tokens in 12 blocks (DINOv2), 1500 in 4 (Whisper). What was really
carried is measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

SEEDS = (0, 1, 2)
MIX = "reduce:filter=evit,correlate=ficoco-v,compress=mean"


@dataclass(frozen=True)
class Setting:
    """One row of a table.

    Args:
        group: which table.
        method: which line of it; one without a number of its own.
        passes: in textual form; several where they differ by the seed alone, and their mean counts.
    """

    group: str
    method: str
    passes: tuple[str, ...]


def _each(group: str, method: str, template: str, values: Iterable[object]) -> list[Setting]:
    return [Setting(group, method, (template.format(value),)) for value in values]


def _random(group: str, method: str, template: str, values: Iterable[object]) -> list[Setting]:
    every = [template.format(value) for value in values]
    return [Setting(group, method, tuple(f"random-tokens:{text},seed={seed}" for seed in SEEDS)) for text in every]


_EVERY = (0.982, 0.953, 0.915, 0.884, 0.843, 0.751)
_R, _THREE, _HALF = (4, 10, 16, 19), (0.928, 0.807, 0.661, 0.537, 0.379), (0.934, 0.801, 0.543)
_FUSED = (0.924, 0.802, 0.653, 0.532, 0.372)  # EViT's extra token counts
EVERY, OWN, SCC, PARTS = "every block", "published schedule", "scc", "parts"

PHOTOS: tuple[Setting, ...] = (
    *_each(EVERY, "tome", "tome:r=,keep={}", _EVERY),
    *_each(EVERY, "evit", "evit:layers=all,keep={}", _EVERY),
    *_each(EVERY, "ficoco-v", "ficoco-v:layers=all,keep={}", _EVERY),
    *_each(EVERY, "evit + ficoco-v", MIX + ",layers=all,keep={}", _EVERY),
    *_random(EVERY, "random", "r=,keep={}", _EVERY),
    *_each(OWN, "tome (every block)", "tome:r={}", _R),
    *_random(OWN, "random (every block)", "r={}", _R),
    *_each(OWN, "evit (blocks 3, 6, 9)", "evit:keep={}", _FUSED),
    *_each(OWN, "evit + ficoco-v (blocks 3, 6, 9)", MIX + ",keep={}", _THREE),
    *_each(OWN, "evit + tome (blocks 3, 6, 9)", "reduce:filter=evit,keep={}", _THREE),
    *_each(OWN, "tome (blocks 3, 6, 9)", "tome:r=,layers=3+6+9,keep={}", _THREE[:4]),
    *_random(OWN, "random (blocks 3, 6, 9)", "r=,layers=3+6+9,keep={}", _THREE),
    *_each(OWN, "ficoco-v (blocks 6 to 11)", "ficoco-v:keep={}", _HALF),
    *_random(OWN, "random (blocks 6 to 11)", "r=,layers=6-11,keep={}", _HALF),
    *_each(SCC, "scc (block 6)", "scc:tau={}", (0.95, 0.9, 0.8, 0.7)),
    *_random(SCC, "random (block 6)", "r=,layers=6,keep={}", (0.8, 0.6, 0.4, 0.2)),
    *_each(SCC, "scc (block 1)", "scc:layer=1,tau={}", (0.95, 0.9, 0.8, 0.7, 0.6)),
    *_random(SCC, "random (block 1)", "r=,layers=1,keep={}", (0.9, 0.75, 0.6, 0.4)),
    *(
        Setting(PARTS, f"filter={name}, {what}", (f"reduce:filter={name},{how},layers=all,r=16",))
        for name in ("tome", "evit", "ficoco-v", "random")
        for what, how in (
            ("joins the most similar, mean by size", "correlate=tome,compress=size"),
            ("joins the most similar, plain mean", "correlate=tome,compress=mean"),
            ("joins the most attended, weighted mean", "correlate=ficoco-v,compress=mean"),
            ("dropped, filled from the nearest", "correlate=none,compress=drop"),
        )
    ),
)

_LINE, _KEEP = (60, 150, 240, 300), (0.665, 0.518)
_KEPT = (0.958, 0.888, 0.805, 0.741)
ALONG, ONE = "every block", "one block"

SPEECH: tuple[Setting, ...] = (
    *_each(ALONG, "tome", "tome:r={},restore=none", _LINE),
    *_each(ALONG, "tome", "tome:r=,keep={},restore=none", _KEEP),
    *_each(ALONG, "tome, restored", "tome:r={},restore=grid", _LINE),
    *_each(ALONG, "tome, restored", "tome:r=,keep={},restore=grid", _KEEP),
    *_random(ALONG, "random", "r={},restore=none", _LINE),
    *_random(ALONG, "random, restored", "r={},restore=grid", (150, 300)),
    *_each(ONE, "scc (block 2)", "scc:tau={},restore=none", (0.98, 0.95, 0.93, 0.9)),
    *_each(ONE, "scc (block 2), restored", "scc:tau={},restore=grid", (0.95, 0.93, 0.9)),
    *_each(ONE, "scc (block 0)", "scc:layer=0,tau={},restore=none", (0.98, 0.97, 0.95)),
    *_each(ONE, "scc-two-step, 1 s (block 2)", "scc-two-step:group=50,tau={},restore=none", (0.98, 0.95, 0.93, 0.9)),
    *_each(ONE, "scc-two-step, 0.2 s (block 2)", "scc-two-step:group=10,tau={},restore=none", (0.95, 0.93)),
    *_random(ONE, "random (block 2)", "r=,layers=2,keep={},restore=none", (0.8, 0.6, 0.4)),
    *_random(ONE, "random (block 0)", "r=,layers=0,keep={},restore=none", (0.62, 0.45)),
)

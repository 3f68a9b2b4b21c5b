"""A span of tokens that a decoder carries only in part: where it lies in each row, and what stays of it.

Everything here is arithmetic on lengths: the graph, its twin and the runtime count with it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from plugins._budget import MOST, kept
from trtpass.errors import InputError

SPAN_KEY = "trtpass.span"  # model property: what a span method did to the graph, as JSON; see ``Shortened``
DROPPED = "dropped"  # int32 [layers, batch]: tokens of each row that the cache of a layer does not hold
FORMS = "START:STOP, a Python slice over a row's tokens, such as 4:600, or 4:-32 for all but the last 32"


@dataclass(frozen=True)
class Span:
    """Tokens ``start`` to ``stop`` (exclusive) of a row; a negative ``stop`` counts from the row's end."""

    start: int
    stop: int

    @staticmethod
    def parse(text: str, name: str) -> Span:
        """``4:600`` or ``4:-32``.

        Raises:
            InputError: another form, a negative start, an empty span, or one that ends with the row.
        """
        first, colon, last = text.partition(":")
        digits = last.removeprefix("-")
        if first.startswith("-") and first[1:].isdecimal():
            raise InputError(f"{name}: span={text} starts at {first}", "a start of 0 or more")
        if not colon or not (first or "0").isdecimal() or not digits.isdecimal():
            raise InputError(f"{name}: span={text}", FORMS)
        span = Span(int(first or 0), int(last))
        if last.startswith("-") and span.stop == 0:
            raise InputError(f"{name}: span={text} ends with the row", "a token behind the span: its query chooses")
        if span.stop >= 0 and span.stop <= span.start:
            raise InputError(f"{name}: span={text} is empty", "a stop above the start")
        if max(span.start, abs(span.stop)) > MOST:
            raise InputError(f"{name}: span={text}", f"a start and a stop up to {MOST}")
        return span

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"

    @property
    def relative(self) -> bool:
        """Whether its end, and so its length, depends on the row."""
        return self.stop < 0

    @property
    def least(self) -> int:
        """Tokens that a row needs at least: up to the stop and one behind it. A relative span may be empty."""
        return 1 if self.relative else self.stop + 1

    def of(self, length: int) -> tuple[int, int]:
        """Start and stop in a row of ``length`` tokens; equal where the row has nothing of it."""
        stop = max(length + self.stop, 0) if self.relative else min(self.stop, length)
        return min(self.start, stop), stop

    def cut(self, layer: int, permille: int) -> tuple[Cut, Span]:
        """What keeps ``permille`` / 1000 of the span, rounded to the nearest, and the span after it."""
        if self.relative:
            return Cut(layer, self.start - self.stop, permille, 500, 0), self
        size = self.stop - self.start
        stays = (size * permille + 500) // 1000
        return Cut(layer, 0, 1000, 999, size - stays), Span(self.start, self.start + stays)


@dataclass(frozen=True)
class ImageSpan(Span):
    """The ``stop`` tokens of each row that stand for an image, wherever they are; ``start`` is 0."""

    def __str__(self) -> str:
        return "auto"

    def cut(self, layer: int, permille: int) -> tuple[Cut, Span]:
        cut, after = super().cut(layer, permille)
        return cut, ImageSpan(after.start, after.stop)


@dataclass(frozen=True)
class Cut:
    """A site's budget, as the attributes of KeepTokens say it; ``layer``: the first one with fewer keys."""

    layer: int
    fixed: int
    permille: int
    rounding: int
    drop: int

    def attributes(self) -> dict[str, int]:
        """Attributes of KeepTokens and IndexTokens."""
        return {"fixed": self.fixed, "permille": self.permille, "rounding": self.rounding, "drop": self.drop}

    def kept(self, length: Any) -> Any:
        """Tokens that stay of ``length``, those outside the span included."""
        return kept(length, **self.attributes())


@dataclass(frozen=True)
class Shortened:
    """What a span method did to a graph: the property ``trtpass.span`` of all graphs of its engine.

    Args:
        method: its name.
        span: as given to it.
        least: tokens that a row needs at least.
        layers: of the model.
        cuts: in order.
    """

    method: str
    span: str
    least: int
    layers: int
    cuts: tuple[Cut, ...]

    @staticmethod
    def by_data(method: str) -> str:
        """The property of a graph from which ``method`` drops as many tokens as the data says."""
        return json.dumps({"method": method, "data": True})

    def text(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def read(text: str | None) -> Shortened | None:
        """The property of a graph; None where it has none.

        Raises:
            InputError: it is not what ``text`` writes.
        """
        if text is None:
            return None
        try:
            given = json.loads(text)
            if set(given) == {"method", "data"}:
                raise InputError(
                    f"how many tokens '{given['method']}' drops depends on the data: there are no caches for it yet",
                    "a graph without caches", "use `trtpass rewrite`",
                )  # fmt: skip
            cuts = tuple(Cut(**{key: int(value) for key, value in cut.items()}) for cut in given.pop("cuts"))
            made = Shortened(cuts=cuts, **given)
            good = isinstance(made.method, str) and isinstance(made.span, str)
            good &= isinstance(made.least, int) and isinstance(made.layers, int)
            good &= all(0 <= cut.layer <= made.layers for cut in cuts)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"the property '{SPAN_KEY}' of the graph is {text[:60]!r}", fix="build again") from error
        if not good:
            raise InputError(f"the property '{SPAN_KEY}' of the graph is {text[:60]!r}", fix="build again")
        return made

    def lengths(self, prompt: int) -> list[int]:
        """Tokens of a prompt that each layer's cache holds."""
        held, left, cuts = [], prompt, list(self.cuts)
        for layer in range(self.layers):
            while cuts and cuts[0].layer == layer:
                left = cuts.pop(0).kept(left)
            held.append(left)
        return held

    def spared(self, prompts: Sequence[int] | np.ndarray) -> list[int]:
        """Slots by layer that no row of these prompts needs: what every one of them drops."""
        gone = [[int(prompt) - held for held in self.lengths(int(prompt))] for prompt in prompts]
        return [min(row[layer] for row in gone) for layer in range(self.layers)]

    def check(self, lengths: np.ndarray) -> None:
        """Raise unless every row is long enough for the span.

        Raises:
            InputError: the first row that is too short.
        """
        short = np.flatnonzero(lengths < self.least)
        if short.size:
            row = int(short[0])
            raise InputError(
                f"span {self.span} of method '{self.method}' needs at least {self.least} tokens, row {row} has "
                f"{int(lengths[row])}",
                "prompts that reach beyond the span", "give a longer prompt, or a span such as 4:-32 that ends before "
                "a row does",
            )  # fmt: skip

"""A control: tokens go at random, from the layers and in the numbers of another method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trtpass.passes.reduce import Reduce
from trtpass.reduction.options import ReductionOptions


@dataclass(frozen=True)
class RandomTokensOptions(ReductionOptions):
    """Options of ``random-tokens``: those of ``reduce``, with r=16 in every layer and no merging."""

    filter: str = "random"
    correlate: str = "none"
    compress: str = "drop"
    r: str = "16"

    @property
    def pass_name(self) -> str:
        return "random-tokens"


class RandomTokens(Reduce):
    """Random tokens are dropped: what every method has to beat."""

    name: ClassVar[str] = "random-tokens"
    summary: ClassVar[str] = "a control: an encoder drops tokens at random"
    source: ClassVar[str] = "control"
    Options: ClassVar[type] = RandomTokensOptions

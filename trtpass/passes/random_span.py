"""A control: random tokens of a span go, where and as many as with FastV."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from trtpass.reduction.decoder_options import FastvOptions
from trtpass.reduction.decoder_pass import SpanMethod
from trtpass.reduction.decoder_sites import SpanSite, random
from trtpass.reduction.options import need


@dataclass(frozen=True)
class RandomSpanOptions(FastvOptions):
    """Options of ``random-span``: those of ``fastv``.

    Args:
        seed: of the choice; it is the same in every row.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self.pass_name, 0 <= self.seed < 2**20, f"seed={self.seed}", "0 to 1048575")

    @property
    def pass_name(self) -> str:
        return "random-span"


class RandomSpan(SpanMethod):
    """Random tokens are dropped: what every method has to beat."""

    name: ClassVar[str] = "random-span"
    summary: ClassVar[str] = "a control: a decoder drops random tokens of a span"
    source: ClassVar[str] = "control"
    before: ClassVar[bool] = True
    Options: ClassVar[type] = RandomSpanOptions
    options: RandomSpanOptions

    def score(self, site: SpanSite) -> ir.Value:
        return random(site, self.options.seed)

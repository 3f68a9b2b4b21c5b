"""EViT (arXiv 2202.07800): at three depths, the tokens that CLS attends to least are fused into one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trtpass.passes.reduce import Reduce
from trtpass.reduction.options import ReductionOptions


@dataclass(frozen=True)
class EvitOptions(ReductionOptions):
    """Options of ``evit``: those of ``reduce``, with keep=0.7 at a quarter, half and three quarters of the depth."""

    filter: str = "evit"
    correlate: str = "none"
    compress: str = "fuse"
    keep: float = 0.7

    @property
    def pass_name(self) -> str:
        return "evit"


class Evit(Reduce):
    """Tokens by attention of CLS; the others become one, the sum weighted by their attention."""

    name: ClassVar[str] = "evit"
    summary: ClassVar[str] = "an encoder keeps the tokens that CLS attends to, and fuses the others into one"
    source: ClassVar[str] = "EViT, arXiv 2202.07800"
    Options: ClassVar[type] = EvitOptions

"""FiCoCo-V (arXiv 2411.17686): from half depth on, redundant tokens are spread over the kept ones they attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trtpass.passes.reduce import Reduce
from trtpass.reduction.options import ReductionOptions


@dataclass(frozen=True)
class FicocoVOptions(ReductionOptions):
    """Options of ``ficoco-v``: those of ``reduce``, with keep=0.9 in each layer of the second half."""

    filter: str = "ficoco-v"
    correlate: str = "ficoco-v"
    compress: str = "mean"
    keep: float = 0.9

    @property
    def pass_name(self) -> str:
        return "ficoco-v"


class FicocoV(Reduce):
    """Filter by redundancy and attention of CLS, correlate by attention, compress by a weighted mean."""

    name: ClassVar[str] = "ficoco-v"
    summary: ClassVar[str] = "an encoder spreads its redundant tokens over those they attend to"
    source: ClassVar[str] = "FiCoCo, arXiv 2411.17686 v4, the variant in the vision encoder"
    Options: ClassVar[type] = FicocoVOptions

"""ToMe (arXiv 2210.09461): in every layer the r tokens with the most similar keys merge into their partners."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trtpass.passes.reduce import Reduce
from trtpass.reduction.options import ReductionOptions


@dataclass(frozen=True)
class TomeOptions(ReductionOptions):
    """Options of ``tome``: those of ``reduce``, with r=16 in every layer."""

    r: str = "16"

    @property
    def pass_name(self) -> str:
        return "tome"


class Tome(Reduce):
    """Token merging: bipartite matching of keys, means weighted by size, attention proportional to size."""

    name: ClassVar[str] = "tome"
    summary: ClassVar[str] = "an encoder merges its most similar tokens, r in every layer"
    source: ClassVar[str] = "ToMe, arXiv 2210.09461"
    Options: ClassVar[type] = TomeOptions

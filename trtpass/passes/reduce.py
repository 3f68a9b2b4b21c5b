"""``reduce``: an encoder carries fewer tokens from chosen layers on; filter, correlation and compression are options.

Between attention and MLP of each chosen block (``docs/reduction.md``)::

    score           = filter(keys, attention)                          [B, S]    +inf for protected tokens
    keep            = KeepTokens(score)                                [B, S]    one budget for all rows
    index, rest, .. = IndexTokens(keep)                                [B, C], [B, M]
    target, weight  = correlation(rest, index)                         [B, T]    which of them each dropped one joins
    tokens, size    = compression(...)                                 [B, C, E], [B, C]

Kept tokens stay in spatial order. ToMe, EViT and FiCoCo-V are presets of this pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import onnx_ir as ir

from trtpass import layers
from trtpass.anchors import Anchors, AttentionBlock
from trtpass.errors import InputError
from trtpass.ir import dims
from trtpass.passes.stream_pass import Plan, StreamPass
from trtpass.reduction.emit import Emitter
from trtpass.reduction.filters import FILTERS, Site
from trtpass.reduction.joins import JOINS, Split, compress
from trtpass.reduction.options import Budget, ReductionOptions
from trtpass.reduction.stream import Stream

if TYPE_CHECKING:
    from trtpass.encoders import Encoder


class Reduce(StreamPass):
    """Shorten the token stream of an encoder by a filter, a correlation and a compression."""

    name: ClassVar[str] = "reduce"
    summary: ClassVar[str] = "an encoder carries fewer tokens: any filter, correlation and compression"
    source: ClassVar[str] = (
        "FiCoCo, arXiv 2411.17686 (the three choices); ToMe, arXiv 2210.09461; EViT, arXiv 2202.07800"
    )
    Options: ClassVar[type] = ReductionOptions
    options: ReductionOptions
    idle: ClassVar[str] = "nothing is dropped: r=0, keep=1"

    @property
    def placed(self) -> bool:
        return self.options.compress != "fuse"

    def sites(self, anchors: Anchors, cls: int) -> list[tuple[int, Budget]]:
        options, count = self.options, len(anchors.blocks)
        chosen = layers.resolve(options.chosen(count), count, None)
        every = zip(chosen, options.budgets(len(chosen), cls), strict=True)
        active = [(i, b) for i, b in every if b.drop or b.permille < 1000]
        self._check_budget(anchors.blocks[chosen[0]], [b for _, b in active], cls)
        return active

    def columns(self, encoder: Encoder, cls: int, restore: bool, notes: list[str]) -> int:
        given = self.options.shape()
        tokens = encoder.tokens if isinstance(encoder.tokens, int) else None
        if given is not None:
            if tokens is not None and given[0] * given[1] != tokens - cls:
                raise InputError(
                    f"{self.name}: grid={self.options.grid} has {given[0] * given[1]} places",
                    f"{tokens - cls}, the tokens of the graph without {cls} in front",
                )
            return given[1]
        if encoder.grid is not None:
            return encoder.grid[1]
        if self.options.filter == "ficoco-v":
            raise InputError(
                f"{self.name}: the grid of the tokens is not known: {encoder.why_no_grid}",
                "rows and columns of the tokens",
                "say grid=ROWSxCOLUMNS",
            )
        if restore and self.options.compress in ("fuse", "drop"):
            notes.append(f"no grid: dropped tokens are filled from the nearest in order ({encoder.why_no_grid})")
        return 0

    def _check_budget(self, block: AttentionBlock, budgets: list[Budget], cls: int) -> None:
        """Each site has the tokens that its budget takes; ToMe's filter has at most every second one to give."""
        length = (dims(block.residual_out) or [None, None])[1]
        if not isinstance(length, int):
            return
        for number, budget in enumerate(budgets):
            dropped = length - budget.kept(length)
            if self.options.filter == "tome" and dropped > (length - cls) // 2:
                raise InputError(
                    f"{self.name}: site {number} drops {dropped} of {length} tokens ({cls} protected)",
                    f"at most half of the unprotected ones, {(length - cls) // 2}",
                    "lower r, or use fewer layers",
                )
            if dropped > length - cls - 1:
                raise InputError(
                    f"{self.name}: site {number} drops {dropped} of {length} tokens ({cls} protected)",
                    f"at most {max(length - cls - 1, 0)}: one stays",
                    "lower r, or use fewer layers",
                )
            length = length - dropped + (self.options.compress == "fuse")

    def reduced(
        self, emit: Emitter, block: AttentionBlock, stream: Stream, budget: Budget, plan: Plan
    ) -> tuple[Stream, dict[str, ir.Value]]:
        site = Site(emit, self.options, block, stream, plan.cls, plan.columns)
        score = FILTERS[self.options.filter](site)
        known = isinstance(stream.length, int)
        kept = budget.kept(stream.length) if known else ir.SymbolicDim(f"kept_{block.layer}")
        dropped = stream.length - kept if known else ir.SymbolicDim(f"dropped_{block.layer}")
        sizes = {**site.sizes(), "C": kept, "M": dropped}
        (keep,) = emit.op("KeepTokens", [score, stream.lengths], ["keep"], sizes, **budget.attributes())
        index, count, rest, slot = emit.op(
            "IndexTokens", [keep, stream.lengths], ["index", "count", "rest", "slot"], sizes, **budget.attributes()
        )
        split = Split(index, count, rest, slot, kept, dropped)
        join = JOINS[self.options.correlate](site, split) if self.options.correlate in JOINS else None
        after = compress(site, split, join)
        roles = {"score": score, "keep": keep, "index": index, "rest": rest}
        if join is not None:
            roles["target"] = join.target
        return after, roles

    def step(self, row: Any, q: Any, k: Any, scale: float, budget: Budget, plan: Plan, forced: Any) -> Any:
        from trtpass.reduction.definition import reduce_row

        return reduce_row(row, q, k, scale, self.options, budget, plan.cls, plan.columns, forced)

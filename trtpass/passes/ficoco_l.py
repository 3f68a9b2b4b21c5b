"""FiCoCo-L (arXiv 2411.17686 v4): a decoder merges redundant tokens of a span, led by the text behind it.

Between attention and MLP of each chosen layer, in prefill; A is the head mean of the layer's causal attention, N the
tokens of the span, M those of the text::

    filter     s_i  = beta mean_{j in span} A_ji - (1 - beta) mean_{k in text} A_ki     the highest go
    correlate  C_ij = gam A_ij + (1 - gam) mean_{k in text} A_ki A_kj                   i dropped, j kept, in the span
    compress   x_j <- (x_j + sum_i alpha_ij x_i) / (1 + sum_i alpha_ij)                 alpha: shares of the largest C

Text before the span sees nothing of it, so its rows are left out of the sums; M counts it.
"""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from trtpass.reduction.decoder_options import FicocoLOptions
from trtpass.reduction.decoder_pass import SpanMethod
from trtpass.reduction.decoder_sites import SpanSite, correlate, ficoco_l, merged


class FicocoL(SpanMethod):
    """Tokens of a span that others repeat and the text passes over, merged into what they attend to."""

    name: ClassVar[str] = "ficoco-l"
    summary: ClassVar[str] = "a decoder merges redundant tokens of a span, led by what its text attends to"
    source: ClassVar[str] = "FiCoCo, arXiv 2411.17686 (FiCoCo-L)"
    before: ClassVar[bool] = False
    Options: ClassVar[type] = FicocoLOptions
    options: FicocoLOptions

    def score(self, site: SpanSite) -> ir.Value:
        return ficoco_l(site, self.options)

    def join(
        self, site: SpanSite, index: ir.Value, rest: ir.Value, count: ir.Value, kept: ir.Value
    ) -> tuple[ir.Value, ir.Value | None]:
        target, weight, source = correlate(site, self.options, index, rest, count)
        return merged(site, kept, target, weight, source), target

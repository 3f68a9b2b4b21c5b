"""FastV (arXiv 2403.06764): a decoder drops the tokens of a span that its last token hardly looks at.

Before layer K, in prefill::

    prob  = AttentionRows(q, k of layer K - 1, last valid row, causal)     [B, 1, S]
    score = prob in the span, +inf elsewhere                               [B, S]
    keep  = KeepTokens(score)            round((1 - R) N) of the N tokens of each row's span, and all others
    x     = GatherTokens(x, index)                                         [B, C, E]

Kept tokens stay in order and keep their positions. Later layers cache what they see: fewer keys.
"""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from trtpass.reduction.decoder_options import FastvOptions
from trtpass.reduction.decoder_pass import SpanMethod
from trtpass.reduction.decoder_sites import SpanSite, last_query


class Fastv(SpanMethod):
    """Tokens of a span by the attention of the last query, once."""

    name: ClassVar[str] = "fastv"
    summary: ClassVar[str] = "a decoder drops the tokens of a span that its last token hardly attends to"
    source: ClassVar[str] = "FastV, arXiv 2403.06764"
    before: ClassVar[bool] = True
    Options: ClassVar[type] = FastvOptions
    options: FastvOptions

    def score(self, site: SpanSite) -> ir.Value:
        return last_query(site)

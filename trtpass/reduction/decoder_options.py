"""Options of the methods that drop tokens of a span in a decoder."""

from __future__ import annotations

from dataclasses import dataclass

from trtpass import layers
from trtpass.reduction.decoder import Span
from trtpass.reduction.options import LOW_KEEP, need

AUTO_START, AUTO_SITES = 4, 3  # of ``layers=auto``


@dataclass(frozen=True)
class SpanOptions:
    """What all of them have.

    Args:
        span: the tokens that may go: ``4:600`` or ``4:-32``, a slice over each row's own tokens; ``auto`` finds those
            of an image in a multimodal graph.
    """

    span: str = "auto"

    def __post_init__(self) -> None:
        if self.span != "auto":
            Span.parse(self.span, self.pass_name)

    @property
    def pass_name(self) -> str:
        return "fastv"

    @property
    def permille(self) -> int:
        """Share of the span that each site keeps, in thousandths."""
        return 1000

    @property
    def low(self) -> bool:
        """Whether a site keeps less than the papers' methods survive."""
        return self.permille < LOW_KEEP * 1000

    def chosen(self, blocks: int) -> tuple[int, ...]:
        """The layers of the sites."""
        return ()


@dataclass(frozen=True)
class FastvOptions(SpanOptions):
    """Options of ``fastv``.

    Args:
        layer: K, 1 or more: tokens go before this layer (counted from 0), chosen by the attention of the one before.
        ratio: R, the share of the span that goes, in [0, 1].
    """

    layer: int = 2
    ratio: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self.pass_name, self.layer >= 1, f"layer={self.layer}", "1 or more: the layer before it chooses")
        need(self.pass_name, 0.0 <= self.ratio <= 1.0, f"ratio={self.ratio}", "a share in [0, 1]")

    @property
    def permille(self) -> int:
        return round((1.0 - self.ratio) * 1000)

    def chosen(self, blocks: int) -> tuple[int, ...]:
        need(self.pass_name, self.layer < blocks, f"layer={self.layer} of {blocks} layers", f"1 to {blocks - 1}")
        return (self.layer,)


@dataclass(frozen=True)
class FicocoLOptions(SpanOptions):
    """Options of ``ficoco-l``.

    Args:
        layers: between attention and MLP of these layers tokens go: ``3+5+10-20``, ``all``, or ``auto``: three layers
            from layer 4 on (from a quarter of the depth in a model of fewer than 16). The paper goes on to the last
            layer; here a site costs the whole attention map of its layer, which few repay.
        keep: share of the span's tokens that each of these layers keeps, in (0, 1]. 0.8 three times leaves a half.
        beta: weight of redundancy against what the text attends to.
        gam: weight of direct correlation against that by way of the text.
        eps: quantile of the correlations above which a token joins, 0.001 to 0.999.
    """

    layers: str = "auto"
    keep: float = 0.8
    beta: float = 0.6
    gam: float = 0.6
    eps: float = 0.998

    def __post_init__(self) -> None:
        super().__post_init__()
        name = self.pass_name
        need(name, 0.0 < self.keep <= 1.0, f"keep={self.keep}", "a share in (0, 1]")
        need(name, 0.0 <= self.beta <= 1.0, f"beta={self.beta}", "0 to 1")
        need(name, 0.0 <= self.gam <= 1.0, f"gam={self.gam}", "0 to 1")
        need(name, 1 <= round(self.eps * 1000) <= 999, f"eps={self.eps}", "a quantile from 0.001 to 0.999")

    @property
    def pass_name(self) -> str:
        return "ficoco-l"

    @property
    def permille(self) -> int:
        return max(1, round(self.keep * 1000))

    def chosen(self, blocks: int) -> tuple[int, ...]:
        if self.layers != "auto":
            return layers.resolve(self.layers, blocks, None)
        start = min(AUTO_START, blocks // 4)
        return tuple(range(start, min(start + AUTO_SITES, max(blocks - 1, 1))))

"""Options of the encoder methods, checked, and the budget that they give each layer."""

from __future__ import annotations

from dataclasses import dataclass, fields

from trtpass.errors import InputError

FILTERS = ("tome", "evit", "ficoco-v", "random")
CORRELATIONS = ("tome", "ficoco-v", "none")
COMPRESSIONS = ("size", "mean", "fuse", "drop")
RESTORES = ("auto", "grid", "none")
LOW_KEEP = 0.05  # below this share of tokens the papers' quality is gone


def need(name: str, ok: bool, what: str, expected: str) -> None:
    """Raise InputError about an option of pass ``name`` unless ``ok``."""
    if not ok:
        raise InputError(f"{name}: {what}", expected)


@dataclass(frozen=True)
class Budget:
    """Tokens kept of a stream of S: ``fixed + ceil((S - fixed) * permille / 1000) - drop``, not below 0."""

    fixed: int
    permille: int
    drop: int

    def attributes(self) -> dict[str, int]:
        """Attributes of KeepTokens and IndexTokens."""
        return {"fixed": self.fixed, "permille": self.permille, "rounding": 999, "drop": self.drop}

    def kept(self, tokens: int) -> int:
        """Tokens kept of ``tokens``, protected ones included."""
        free = max(tokens - self.fixed, 0)
        return min(max(min(tokens, self.fixed) + (free * self.permille + 999) // 1000 - self.drop, 0), tokens)


@dataclass(frozen=True)
class ReductionOptions:
    """Options of ``reduce``, and of the methods that are presets of it.

    Args:
        filter: ``tome`` (key similarity), ``evit`` (attention of the CLS token), ``ficoco-v`` (redundancy), ``random``.
        correlate: ``tome`` (the most similar kept token), ``ficoco-v`` (the most attended kept tokens), ``none``.
        compress: ``size`` (mean weighted by size), ``mean`` (weighted by correlation), ``fuse`` (one extra token),
            ``drop``.
        layers: blocks after whose attention tokens go: ``auto``, ``all`` or ``3+6+9-11``, counted from 0.
        r: tokens that go in each of these layers: ``16``, or one figure a layer, ``16+16+8``. Empty: by ``keep``.
        inflect: with one figure r, how it changes over the layers: 1 starts at 0 and ends at 2r, -1 the reverse.
        keep: share of the tokens (protected ones apart) that each of these layers keeps, in (0, 1].
        proportional: keys count as often as their token's size in attention; ``auto``: where ``compress`` is ``size``.
        restore: ``grid`` gives the head the rows of all original tokens back, ``none`` does not, ``auto`` looks at it.
        cls: leading tokens that are never touched; ``auto`` finds them.
        grid: rows x columns of the tokens, such as ``16x16``; ``auto`` finds it.
        lam: weight of redundancy against attention of CLS in ``filter=ficoco-v``.
        eps: quantile of the correlations above which a token joins, 0.001 to 0.999, in ``correlate=ficoco-v``.
        seed: of ``filter=random``.
    """

    filter: str = "tome"
    correlate: str = "tome"
    compress: str = "size"
    layers: str = "auto"
    r: str = ""
    inflect: float = 0.0
    keep: float = 1.0
    proportional: str = "auto"
    restore: str = "auto"
    cls: str = "auto"
    grid: str = "auto"
    lam: float = 0.35
    eps: float = 0.998
    seed: int = 0

    def __post_init__(self) -> None:
        name = self.pass_name

        def of(key: str, value: str, choices: tuple[str, ...]) -> None:
            need(name, value in choices, f"{key}={value}", f"one of {', '.join(choices)}")

        of("filter", self.filter, FILTERS)
        of("correlate", self.correlate, CORRELATIONS)
        of("compress", self.compress, COMPRESSIONS)
        of("restore", self.restore, RESTORES)
        of("proportional", self.proportional, ("auto", "true", "false"))
        alone = self.compress in ("fuse", "drop")
        need(
            name,
            (self.correlate == "none") == alone,
            f"correlate={self.correlate} with compress={self.compress}",
            "correlate=none with compress=fuse or drop, a correlation with compress=size or mean",
        )
        need(name, 0.0 < self.keep <= 1.0, f"keep={self.keep}", "a share in (0, 1]")
        both = self._given("r") and self._given("keep")
        need(name, not (both and self.r and self.keep < 1.0), f"r={self.r} and keep={self.keep}", "one of the two")
        need(name, -1.0 <= self.inflect <= 1.0, f"inflect={self.inflect}", "-1 to 1")
        need(name, 0.0 <= self.lam <= 1.0, f"lam={self.lam}", "0 to 1")
        need(name, 1 <= round(self.eps * 1000) <= 999, f"eps={self.eps}", "a quantile from 0.001 to 0.999")
        need(name, self.cls == "auto" or self.cls.isdecimal(), f"cls={self.cls}", "auto or a number of tokens")
        need(name, 0 <= self.seed < 2**20, f"seed={self.seed}", "0 to 1048575")
        self.figures()
        self.shape()

    @property
    def pass_name(self) -> str:
        return "reduce"

    @property
    def weighs_keys(self) -> bool:
        """Whether attention is proportional to sizes."""
        return self.compress == "size" if self.proportional == "auto" else self.proportional == "true"

    @property
    def pads(self) -> bool:
        """Whether rows of a batch keep different numbers of tokens: never, the budget is one for all."""
        return False

    def warnings(self) -> tuple[str, ...]:
        """What is legal and probably not meant, in words."""
        low = self.keep < LOW_KEEP
        return (f"keep={self.keep} is below 5%: quality is gone in the papers",) if low else ()

    def _given(self, option: str) -> bool:
        """Whether an option differs from the default of its pass."""
        return bool(getattr(self, option) != next(f.default for f in fields(self) if f.name == option))

    def figures(self) -> tuple[int, ...]:
        """The figures of ``r``; empty where there are none, or where ``keep`` was given in place of a pass's own r."""
        parts = self.r.split("+") if self.r and not (self._given("keep") and not self._given("r")) else []
        need(
            self.pass_name,
            all(part.isdecimal() for part in parts),
            f"r={self.r}",
            "a number of tokens, or one for each layer joined by '+' (16+16+8)",
        )
        return tuple(int(part) for part in parts)

    def shape(self) -> tuple[int, int] | None:
        """Rows and columns of ``grid``; None to find it."""
        if self.grid == "auto":
            return None
        rows, times, columns = self.grid.partition("x")
        need(
            self.pass_name,
            bool(times) and rows.isdecimal() and columns.isdecimal() and int(rows) * int(columns) > 0,
            f"grid={self.grid}",
            "rows x columns, such as 16x16",
        )
        return int(rows), int(columns)

    def chosen(self, blocks: int) -> str:
        """``layers`` in the terms of ``trtpass.layers``, of a model of so many blocks."""
        if self.layers != "auto":
            return self.layers
        if self.filter == "evit":  # EViT: blocks 3, 6 and 9 of 12
            return "+".join(str(i) for i in sorted({blocks * part // 4 for part in (1, 2, 3)} - {0}) or [0])
        if self.filter == "ficoco-v":  # FiCoCo-V: from block 12 of 24
            return f"{blocks // 2}-{blocks - 1}"
        return "all"

    def budgets(self, sites: int, fixed: int) -> tuple[Budget, ...]:
        """The budget of each of ``sites`` layers, with ``fixed`` protected tokens.

        Raises:
            InputError: ``r`` has a figure for another number of layers.
        """
        figures = self.figures()
        if len(figures) == 1:
            low = int(figures[0] * (1.0 - self.inflect))
            step = (2 * figures[0] - 2 * low) / (sites - 1) if sites > 1 else 0.0
            figures = tuple(int(low + step * i) for i in range(sites)) if self.inflect else figures * sites
        if figures and len(figures) != sites:
            raise InputError(
                f"{self.pass_name}: r={self.r} has {len(figures)} figures for {sites} layers", "one, or one a layer"
            )
        permille = 1000 if figures else max(1, round(self.keep * 1000))
        return tuple(Budget(fixed, permille, drop) for drop in figures or (0,) * sites)

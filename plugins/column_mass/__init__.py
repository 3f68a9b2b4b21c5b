"""ColumnMass: the softmax mass that each key receives from the last W query rows, per head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from trtpass.errors import InputError
from trtpass.op import FLOAT32, FLOATS, INT32, Case, Port, Step, Tolerance, op

if TYPE_CHECKING:
    from torch import Tensor


@op(
    name="ColumnMass",
    source="Token Sparse Attention, arXiv 2602.03216, section 3 (per-head token scores); SnapKV, arXiv 2404.14469, "
    "section 4 (observation window, pooling)",
    shape=lambda d, a: {"mass": (d.B, d.H, d.S)},
    tolerance=Tolerance(
        atol={"float32": 1e-6, "float16": 1e-6},
        rtol={"float32": 1e-4, "float16": 1e-4},
        reason="float32 throughout, whatever the input: a score of size 20 is known to about 1e-5, its exponential to "
        "1e-5 of itself, and the sums have at most window + pool positive terms",
    ),
)
def column_mass(
    q: Annotated[Tensor, Port("B H S D", FLOATS)],
    k: Annotated[Tensor, Port("B Hkv S D", FLOATS)],
    lengths: Annotated[Tensor, Port("B", INT32)],
    *,
    window: int = 128,
    pool: int = 7,
    prefix: int = 0,
    scale: float = 0.0,
) -> Annotated[Tensor, Port("B H S", FLOAT32, name="mass")]:
    """Column sums of the causal softmax over the last ``min(window, L)`` query rows of each batch row of length L.

    Args:
        q: queries after RoPE `[B, H, S, D]`, right-padded.
        k: keys after RoPE `[B, Hkv, S, D]`; head h reads key head ``h // (H // Hkv)``. Padding must be finite.
        lengths: valid tokens of each row `[B]`, 1 to S.
        window: query rows that vote, W.
        pool: width of the average pooling over columns, odd; zero padded, always divided by ``pool``.
        prefix: 1 drops the columns of the window itself, before pooling; 0 keeps all columns of the row.
        scale: factor of the scores; 0 means 1 / sqrt(D).

    Returns:
        mass `[B, H, S]` float32; exactly zero outside the domain (`[0, L)`, or `[0, L - min(W, L))` with ``prefix``).

    Raises:
        InputError: ``window`` below 1, or ``pool`` even or below 1.
    """
    import torch

    if window < 1:
        raise InputError(f"ColumnMass.window is {window}", "at least 1")
    if pool < 1 or pool % 2 == 0:
        raise InputError(f"ColumnMass.pool is {pool}", "an odd number, at least 1")
    batch, heads, tokens, width = q.shape
    group = heads // k.shape[1]
    factor = scale or width**-0.5
    mass = torch.zeros(batch, heads, tokens, dtype=torch.float32, device=q.device)
    for b in range(batch):
        length = int(lengths[b])
        rows = torch.arange(max(length - window, 0), length, device=q.device)  # [w]
        future = torch.arange(length, device=q.device)[None, :] > rows[:, None]  # [w, L]
        end = length - len(rows) if prefix else length
        if end == 0:
            continue
        for h in range(heads):
            scores = q[b, h, rows].float() @ k[b, h // group, :length].float().T * factor  # [w, L]
            columns = scores.masked_fill(future, -torch.inf).softmax(-1).sum(0)[:end]
            mass[b, h, :end] = torch.nn.functional.avg_pool1d(columns[None, None], pool, 1, pool // 2)[0, 0]
    return mass


OP = column_mass


@OP.body("dynamic")
@OP.body("static")
def _body() -> Any:
    from plugins.column_mass.body import ColumnMass

    return ColumnMass


@OP.cases
def _cases() -> Sequence[Case]:
    from plugins.column_mass.cases import CASES

    return CASES


@OP.steps
def _steps() -> Sequence[Step]:
    from plugins.column_mass.steps import WINDOW_MASS, WINDOW_STATISTICS

    given = ("q", "k", "lengths")
    return [Step(WINDOW_STATISTICS, given, ("log_sum",)), Step(WINDOW_MASS, (*given, "log_sum"), ("mass",))]

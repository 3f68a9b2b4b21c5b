"""ColumnMass in two launches: the denominators of the window rows' softmax, then the columns.

A row's denominator runs over all its keys, a column's sum over all rows: the first must be whole before the second
starts, and a launch is the only barrier that all programs have. The denominators are made in ``PARTS`` parts of a row's
keys, so that there is work for a whole GPU where heads and window rows alone are too few.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from trtpass.kernel import Kernel
from trtpass.op import FLOAT32, FLOATS, INT32, Port, Tolerance, op

if TYPE_CHECKING:
    from torch import Tensor

PARTS = 16  # 32 heads in tiles of 128 rows make 512 programs, about two for each place that an H100 has
GRAIN = 128  # keys; the tiles of keys that the kernels take divide it, so that a tile lies in one part
LOG2E = 1.4426950408889634


def part_size(length: int) -> int:
    """Keys in each part of a row of ``length`` keys: as even as multiples of ``GRAIN`` can be."""
    return -(-length // (PARTS * GRAIN)) * GRAIN


def _scores(q: Tensor, k: Tensor, b: int, h: int, rows: Tensor, keys: int, scale: float) -> Tensor:
    """Causal scores `[w, keys]` in powers of two: softmax is in powers of two from here on."""
    import torch

    factor = (scale or q.shape[-1] ** -0.5) * LOG2E
    scores = q[b, h, rows].float() @ k[b, h * k.shape[1] // q.shape[1], :keys].float().T * factor
    return scores.masked_fill(torch.arange(keys, device=q.device)[None, :] > rows[:, None], -torch.inf)


@op(
    name="WindowStatistics",
    source="FlashAttention, arXiv 2205.14135, section 3.1 (softmax in parts); SnapKV, arXiv 2404.14469, section 4",
    shape=lambda d, a: {"log_sum": (d.B, d.H, PARTS, a.window)},
    tolerance=Tolerance(
        atol={"float32": 3e-5, "float16": 3e-5},
        rtol={"float32": 1e-4, "float16": 1e-4},
        reason="float32 throughout, whatever the input: a score of size 20 is known to about 1e-5 however small the "
        "logarithm is that it ends in",
    ),
)
def window_statistics(
    q: Annotated[Tensor, Port("B H S D", FLOATS)],
    k: Annotated[Tensor, Port("B Hkv S D", FLOATS)],
    lengths: Annotated[Tensor, Port("B", INT32)],
    *,
    window: int = 128,
    scale: float = 0.0,
) -> Annotated[Tensor, Port("B H P W", FLOAT32, name="log_sum")]:
    """``log_sum[b, h, p, r]``: log2 of the sum of exp(score) over the keys in part p that window row r sees.

    Row r of a batch row of length L is query ``L - min(W, L) + r``; part p is keys ``[p n, (p + 1) n)`` below L, with
    n the smallest multiple of ``GRAIN`` of which ``PARTS`` cover L.

    Args:
        q: queries after RoPE `[B, H, S, D]`.
        k: keys after RoPE `[B, Hkv, S, D]`; head h reads key head ``h // (H // Hkv)``.
        lengths: valid tokens of each row `[B]`.
        window: query rows that vote, W.
        scale: factor of the scores; 0 means 1 / sqrt(D).

    Returns:
        log_sum float32 `[B, H, P, W]`; 0 in parts in which a row sees no key, and in rows from ``min(W, L)`` on.
    """
    import torch

    batch, heads = q.shape[:2]
    log_sum = torch.zeros(batch, heads, PARTS, window, device=q.device)
    for b, length in enumerate(lengths.tolist()):
        rows = torch.arange(max(length - window, 0), length, device=q.device)
        size = part_size(length)
        for h in range(heads):
            scores = _scores(q, k, b, h, rows, length, scale) / LOG2E
            for part in range(-(-length // size) if size else 0):
                found = scores[:, part * size : (part + 1) * size].logsumexp(-1)
                log_sum[b, h, part, : len(rows)] = (found * LOG2E).where(rows >= part * size, 0.0)
    return log_sum


@op(
    name="WindowMass",
    source="Token Sparse Attention, arXiv 2602.03216, section 3 (per-head token scores); SnapKV, arXiv 2404.14469, "
    "section 4 (observation window, pooling)",
    shape=lambda d, a: {"mass": (d.B, d.H, d.S)},
    tolerance=Tolerance(
        atol={"float32": 1e-6, "float16": 1e-6},
        rtol={"float32": 1e-4, "float16": 1e-4},
        reason="that of ColumnMass: float32 throughout, and sums of at most window + pool positive terms",
    ),
)
def window_mass(
    q: Annotated[Tensor, Port("B H S D", FLOATS)],
    k: Annotated[Tensor, Port("B Hkv S D", FLOATS)],
    lengths: Annotated[Tensor, Port("B", INT32)],
    log_sum: Annotated[Tensor, Port("B H P W", FLOAT32)],
    *,
    window: int = 128,
    pool: int = 7,
    prefix: int = 0,
    scale: float = 0.0,
) -> Annotated[Tensor, Port("B H S", FLOAT32, name="mass")]:
    """The column mass of ColumnMass, from the denominators that ``log_sum`` holds in parts.

    Args:
        q: queries after RoPE `[B, H, S, D]`.
        k: keys after RoPE `[B, Hkv, S, D]`; head h reads key head ``h // (H // Hkv)``.
        lengths: valid tokens of each row `[B]`.
        log_sum: what WindowStatistics makes, `[B, H, P, W]`.
        window: query rows that vote, W.
        pool: width of the average pooling over columns, odd; zero padded, always divided by ``pool``.
        prefix: 1 drops the columns of the window itself, before pooling; 0 keeps all columns of the row.
        scale: factor of the scores; 0 means 1 / sqrt(D).

    Returns:
        mass float32 `[B, H, S]`; exactly zero outside the domain (`[0, L)`, or `[0, L - min(W, L))` with ``prefix``).
    """
    import torch

    batch, heads, tokens = q.shape[:3]
    mass = torch.zeros(batch, heads, tokens, dtype=torch.float32, device=q.device)
    for b, length in enumerate(lengths.tolist()):
        rows = torch.arange(max(length - window, 0), length, device=q.device)
        end = length - len(rows) if prefix else length
        if end == 0:
            continue
        for h in range(heads):
            starts = torch.arange(PARTS, device=q.device)[:, None] * part_size(length)
            parts = log_sum[b, h, :, : len(rows)].where(starts <= rows, -torch.inf) / LOG2E  # [P, w]
            denominator = parts.logsumexp(0)[:, None] * LOG2E
            weights = torch.exp2(_scores(q, k, b, h, rows, end, scale) - denominator)  # [w, end]
            columns = weights.sum(0)[None, None]
            mass[b, h, :end] = torch.nn.functional.avg_pool1d(columns, pool, 1, pool // 2)[0, 0]
    return mass


WINDOW_STATISTICS = window_statistics
WINDOW_MASS = window_mass


@WINDOW_STATISTICS.kernels
def _statistics_kernels() -> Sequence[Kernel]:
    from plugins.column_mass.kernel import STATISTICS

    return [STATISTICS]


@WINDOW_MASS.kernels
def _mass_kernels() -> Sequence[Kernel]:
    from plugins.column_mass.kernel import MASS

    return [MASS]

"""ColumnMass's two Triton launches: scores of the window rows against all keys, once for each, never stored.

``window_statistics``: a program holds up to 128 window rows of one head and streams the keys of one part past them,
with the running maximum of FlashAttention (arXiv 2205.14135, section 3.1). All heads of a part start next to each
other, so that a group's heads and row tiles read their keys from memory once and then from L2.

``window_mass``: a program holds a block of keys and goes through the rows of every head of their group, adding up
columns; rows, not keys, are re-read, which are few and stay in L2. The product is keys x rows, so that a column is
summed within four lanes. Blocks overlap by ``pool - 1`` keys: each makes the sums that its pooling needs.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from plugins.column_mass.programs import window_mass, window_statistics
from plugins.column_mass.steps import GRAIN, LOG2E, PARTS
from trtpass.kernel import Example, Kernel, Launch

WINDOW = 128  # of the examples: the default of the operator
MAX_WIDTH = 128  # of heads: wider tiles outgrow the 99 KiB of shared memory of SM86, 89 and 120


def _common(d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace) -> dict[str, Any]:
    wide = dtypes.q == "float32"
    return {
        "D": d.D,
        "WINDOW": a.window,
        "SCALE": (a.scale or d.D**-0.5) * LOG2E,
        "PRECISION": "ieee" if wide else "tf32",
        "PARTS": PARTS,
        "GRAIN": GRAIN,
        "BLOCK_D": 32 if wide else max(32, 1 << (d.D - 1).bit_length()),
    }


def _rows(window: int, least: int, most: int) -> int:
    """Rows of a tile of the window: no more than there are."""
    return min(most, max(least, 1 << (window - 1).bit_length()))


def _statistics(d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace) -> Launch:
    wide = dtypes.q == "float32"
    rows = _rows(a.window, 16, 64) if wide else _rows(a.window, 64, tactic.rows)  # wgmma takes 64 and more
    tiles = (a.window + rows - 1) // rows
    constexprs = {**_common(d, a, dtypes), "ROWS": rows, "KEYS": 64 if wide else tactic.keys}
    warps = 8 if wide or rows > 64 else 4
    return Launch((d.H * (tiles * PARTS), d.B, 1), (d.S, d.H, d.Hkv), constexprs, warps)


def _columns(dtypes: SimpleNamespace, tactic: SimpleNamespace) -> int:
    return 64 if dtypes.q == "float32" else int(tactic.columns)


def _mass(d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace) -> Launch:
    wide, columns = dtypes.q == "float32", _columns(dtypes, tactic)
    own = columns - a.pool + 1
    constexprs = {
        **_common(d, a, dtypes),
        "POOL": a.pool,
        "PREFIX": a.prefix,
        "ROWS": _rows(a.window, 16, 32 if wide else 64),
        "COLUMNS": columns,
    }
    grid = ((d.S + (own - 1)) // own * d.Hkv, d.B, 1)
    return Launch(grid, (d.S, d.H, d.Hkv), constexprs, warps=8 if wide or columns > 64 else 4)


def _supports(
    d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace, cc: int
) -> bool | str:
    if d.D > MAX_WIDTH:
        return f"head width {d.D} is above {MAX_WIDTH}"
    return True


def _pools(
    d: SimpleNamespace, a: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace, cc: int
) -> bool | str:
    columns = _columns(dtypes, tactic)
    if a.pool > columns // 2:
        return f"a pool of {a.pool} columns is above half of a block of {columns}"
    if columns > 128 and not 90 <= cc < 120:  # elsewhere products take both operands from registers
        return f"blocks of {columns} columns spill registers on SM{cc}"
    return _supports(d, a, dtypes, tactic, cc)


def _sizes(tokens: int) -> dict[str, int]:
    return {"B": 1, "H": 32, "Hkv": 8, "S": tokens, "D": 128}


def _statistics_example(tokens: int) -> Example:
    heads, key_heads, width = 32, 8, 128
    return Example(
        sizes=_sizes(tokens),
        flops=heads * WINDOW * tokens * (2 * width + 4),  # a product; scale, maximum, exponential, sum
        bytes=2 * width * (key_heads * tokens + heads * WINDOW) + 4 * heads * PARTS * WINDOW,
        tensor=True,
        attrs={"window": WINDOW},
    )


def _mass_example(tokens: int) -> Example:
    heads, key_heads, width, pool = 32, 8, 128, 7
    return Example(
        sizes={**_sizes(tokens), "P": PARTS, "W": WINDOW},
        flops=heads * tokens * (WINDOW * (2 * width + 3) + pool),  # a product; scale, exponential, sum; the pool
        bytes=2 * width * (key_heads * tokens + heads * WINDOW) + 4 * heads * (PARTS * WINDOW + tokens),
        tensor=True,
        attrs={"window": WINDOW, "pool": pool, "prefix": 1},
    )


EXTRAS = ("tokens", "heads", "key_heads")
STATISTICS = Kernel(
    function=window_statistics,
    fixed=("D",),
    extras=EXTRAS,
    geometry=_statistics,
    supports=_supports,
    example=_statistics_example,
    tactics=({"rows": 128, "keys": 128}, {"rows": 64, "keys": 128}, {"rows": 128, "keys": 64}),
)
MASS = Kernel(
    function=window_mass,
    fixed=("D",),
    extras=EXTRAS,
    geometry=_mass,
    supports=_pools,
    example=_mass_example,
    tactics=({"columns": 128}, {"columns": 256}, {"columns": 64}),
)

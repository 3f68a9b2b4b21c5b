"""Random inputs for every native kernel: valid ones, and ones that are wrong in a way that only the values show.

``request(op, number)`` is fixed by its number. A new operator needs a pair of functions in ``GENERATORS``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import fuzz_attention
import fuzz_merging
import fuzz_pages
import fuzz_reduction_a
import fuzz_reduction_b
import fuzz_selection
import numpy as np
from fuzz_values import Request, Rng

from trtpass.op import Op

Valid = Callable[[Rng], Request]
Invalid = Callable[[Rng, Request], Request]

GENERATORS: dict[str, tuple[Valid, Invalid]] = {
    "CausalAttention": (fuzz_attention.causal, fuzz_attention.wrong_causal),
    "EncoderAttention": (fuzz_attention.encoder, fuzz_attention.wrong_causal),
    "TokenSparseAttention": (fuzz_attention.sparse, fuzz_attention.wrong_sparse),
    "RaggedAttention": (fuzz_attention.ragged, fuzz_attention.wrong_ragged),
    "ColumnMass": (fuzz_selection.column_mass, fuzz_selection.wrong_column_mass),
    "CoverageBudget": (fuzz_selection.budget, fuzz_selection.wrong_budget),
    "SelectTokens": (fuzz_selection.select, fuzz_selection.wrong_select),
    "CompactSlots": (fuzz_pages.compact, fuzz_pages.wrong_compact),
    "WritePages": (fuzz_pages.write, fuzz_pages.wrong_write),
    "ConnectedComponents": (fuzz_merging.components, fuzz_merging.wrong_components),
    "BipartiteMatch": (fuzz_merging.match, fuzz_merging.wrong_match),
    "SegmentMean": (fuzz_merging.mean, fuzz_merging.wrong_mean),
    "MergeTokens": (fuzz_merging.merge, fuzz_merging.wrong_merge),
    "GatherTokens": (fuzz_reduction_a.gather, fuzz_reduction_a.wrong_gather),
    "AttentionRows": (fuzz_reduction_a.rows, fuzz_reduction_a.wrong_rows),
    "KeepTokens": (fuzz_reduction_a.keep, fuzz_reduction_a.wrong_keep),
    "IndexTokens": (fuzz_reduction_a.index, fuzz_reduction_a.wrong_keep),
    "BipartiteFilter": (fuzz_reduction_a.even_odd, fuzz_reduction_a.wrong_even_odd),
    "FicocoFilter": (fuzz_reduction_b.redundancy, fuzz_reduction_b.wrong_redundancy),
    "FicocoCorrelate": (fuzz_reduction_b.correlate, fuzz_reduction_b.wrong_correlate),
    "TrackTokens": (fuzz_reduction_b.track, fuzz_reduction_b.wrong_track),
    "RestoreTokens": (fuzz_reduction_b.restore, fuzz_reduction_b.wrong_restore),
}


def request(op: Op, number: int) -> Request:
    """Of ten requests seven are valid, two are wrong in their values, and one in types, axes or sizes."""
    rng = np.random.default_rng([zlib.crc32(op.name.encode()), number])
    valid, invalid = GENERATORS[op.name]
    if number % 10 < 7:
        return valid(rng)
    if number % 10 < 9:
        return invalid(rng, valid(rng))
    return misshapen(rng, op, valid(rng))


def misshapen(rng: Rng, op: Op, given: Request) -> Request:
    """A type, a number of axes or a size that the declaration rules out."""
    inputs = [x if x.dtype.kind == "i" else np.clip(np.nan_to_num(x), -1e4, 1e4) for x in given.inputs]
    shared = [name for name in {a for p in op.inputs for a in p.axes} if sum(name in p.axes for p in op.inputs) > 1]
    kind = rng.choice(["type", "axes", "size"] if shared else ["type", "axes"])
    if kind == "size":
        name = rng.choice(sorted(shared))
        at = rng.choice([i for i, port in enumerate(op.inputs) if name in port.axes])
        axis = op.inputs[at].axes.index(name)
        more = [(0, 0)] * inputs[at].ndim
        more[axis] = (0, 1)
        inputs[at] = np.pad(inputs[at], more)
        return Request(inputs, given.attrs, f"{op.inputs[at].name} has another {name}", misshapen=True)
    at = int(rng.integers(len(inputs)))
    if kind == "axes":
        x = inputs[at]
        inputs[at] = x[..., None] if x.ndim < 4 and rng.random() < 0.5 else x.reshape(-1) if x.ndim > 1 else x[()][None]
        if inputs[at].ndim == x.ndim:
            inputs[at] = x[None]
    else:
        inputs[at] = inputs[at].astype(np.float32 if inputs[at].dtype == np.int32 else np.int32)
    return Request(inputs, given.attrs, f"{op.inputs[at].name} has wrong {kind}", misshapen=True)

"""``trtpass.scc``: semantic connected components of any stream of tokens, for NumPy and torch arrays.

Tokens may be paragraphs, audio frames, samples of a log: nothing here knows what they are. The operators are those of
the graph (ConnectedComponents, SegmentMean, BipartiteMatch, MergeTokens), run by ONNX Runtime: native kernels where
their library is there, else the ONNX bodies. torch is not used: its references are no faster than the bodies.

The function's module cannot be called ``scc``: importing it would put the module in the function's place.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np

from trtpass.arrays import groups_of, positions_of, threshold_of, tokens_of
from trtpass.errors import InputError

Array = np.ndarray[Any, Any]

FEW = 0.05  # kept share below which a caller is warned: quality drops there (arXiv 2506.21862)


@dataclass(frozen=True, eq=False)
class Components:
    """A stream of n tokens made shorter; arrays are of the kind (NumPy, torch) of the tokens that were given.

    Attributes:
        tokens: representatives `[k, E]`, in the dtype of the tokens, by ascending index of their heads.
        sizes: int64 `[k]`, original tokens that each stands for; they sum to n. With groups it may be 0: a
            representative that no token found the most similar one.
        label: int64 `[n]`, the representative of each original token, 0 to k - 1.
        positions: float64 `[k]`, mean position of the tokens of each (of size 0: of those that it was made from).
        ranges: `[k, 2]`, lowest and highest of these positions, in the dtype of the positions (int64 without).
        runs: int64 `[r, 3]`, the stream in the order of positions, equal labels in a row once: first token, last token
            (indices), representative. Change points are where one run ends and the next begins, also where an earlier
            state returns; ``tokens[runs[:, 2]]`` is the shortened stream in its order.
        kept: k / n.
    """

    tokens: Any
    sizes: Any
    label: Any
    positions: Any
    ranges: Any
    runs: Any
    kept: float


def scc(tokens: Any, tau: float = 0.9, groups: Any = None, positions: Any = None) -> Any:
    """Merge tokens that are linked by ``cos > tau``, in chains of any length: LLaVA-Scissor, arXiv 2506.21862.

    Without groups, a representative is the mean of its component. With groups there are two steps: components of each
    group, then components of all their means; each original token then joins the most similar of these,
    ``r <- (r + sum of its tokens) / (1 + their number)``. A token that is similar to nothing (a zero vector, or one
    with NaN or infinity in it) is a component of its own and stays in it.

    Cosines and sums are float32, whatever the dtype of the tokens. The same input gives the same result.

    Args:
        tokens: `[n, E]`, NumPy or torch, float16, float32, float64 or bfloat16; or `[B, n, E]`, B independent streams.
        tau: threshold, exclusive. Above 1 every token comes back unchanged; below -1 all that have a direction are one.
        groups: integer labels `[n]` (groups in ascending order of label), or a size: consecutive tokens, the last group
            may be shorter. For streams also `[B, n]`.
        positions: finite numbers `[n]`, such as time stamps; by default 0 to n - 1. For streams also `[B, n]`.

    Returns:
        ``Components``; for `[B, n, E]` a tuple of B of them, each with a k of its own.

    Warns:
        UserWarning: ``tau`` is outside [-1, 1], or fewer than 5% of a stream's tokens are kept. Both are legal.

    Raises:
        InputError: ``tau`` is no number or NaN; tokens of another kind, dtype or rank, or none at all; groups or
            positions that do not fit them.
    """
    threshold = threshold_of(tau)
    x = tokens_of(tokens)
    streams = x if x.ndim == 3 else x[None]
    group, place = groups_of(groups, streams.shape[:2]), positions_of(positions, streams.shape[:2])
    if abs(threshold) > 1:
        meaning = "above 1 no tokens are alike" if threshold > 1 else "below -1 all tokens are alike"
        warnings.warn(f"scc: tau={tau} is outside [-1, 1]: {meaning}", UserWarning, stacklevel=2)
    made = [_one(streams[b], threshold, None if group is None else group[b], place[b]) for b in range(streams.shape[0])]
    least = min(made, key=lambda c: c.kept)
    if least.kept < FEW:
        text = f"scc: {len(least.sizes)} of {len(least.label)} tokens are kept ({least.kept:.1%}, less than {FEW:.0%})"
        warnings.warn(f"{text}: much is lost; a higher tau keeps more", UserWarning, stacklevel=2)
    done = tuple(_like(tokens, c) for c in made)
    return done if x.ndim == 3 else done[0]


def _one(x: Array, tau: float, group: Array | None, positions: Array) -> Components:
    """One stream: x `[n, E]`, group `[n]` of 0 to G - 1 or None, positions `[n]`."""
    wide = x if x.dtype == np.float16 else _narrow(x)
    if group is None:
        label, count = _components(wide[None], np.array([len(x)], np.int32), tau)
        own, k = label[0], int(count[0])
        rows, _ = _run("SegmentMean", (wide[None], own[None]))
        made, label = rows[0, :k], own
    else:
        made, label, own = _two_steps(wide, tau, group)
        k = len(made)
    if k == len(x):  # nothing is alike: exactly the tokens, in float64 too
        order = np.argsort(own)
        made = x[order]
    centre, ranges = _spread(positions, label, own, k)
    sizes = np.bincount(label, minlength=k)
    return Components(
        made.astype(x.dtype), sizes, label.astype(np.int64), centre, ranges,
        _runs(label, positions), k / len(x),
    )  # fmt: skip


def _two_steps(x: Array, tau: float, group: Array) -> tuple[Array, Array, Array]:
    """Rows `[k, E]`, the row that each token joins `[n]`, and the row that its component became `[n]`."""
    number, total = _grouped(x, tau, group)
    means, _ = _run("SegmentMean", (x[None], number[None]))
    means = means[:, :total]
    merged, count = _components(means, np.array([total], np.int32), tau)
    own, k = merged[0][number], int(count[0])
    if k == len(x):  # each token is its own representative: joining could only move duplicates
        return x, own, own
    base = _run("SegmentMean", (means, merged))[0][:, :k]
    match, _ = _run("BipartiteMatch", (x[None], base, np.array([k], np.int32)))
    label = np.where(match[0] < k, match[0], own)
    ones = [np.ones((1, rows), np.float32) for rows in (k, len(x))]
    joined, _ = _run("MergeTokens", (base, ones[0], x[None], ones[1], label[None]))
    return joined[0], label, own


def _grouped(x: Array, tau: float, group: Array) -> tuple[Array, int]:
    """Components of each group, numbered over all groups in order `[n]`, and how many there are.

    Groups of about one size are one call, padded to the longest: at most half of it is padding.
    """
    sizes = np.bincount(group)
    if sizes.min() == sizes.max() and (np.diff(group) >= 0).all():  # frames: no copy
        found, counts = _components(x.reshape(len(sizes), sizes[0], -1), sizes.astype(np.int32), tau)
        return _numbered(found.reshape(-1), counts, group)
    order = np.argsort(group, kind="stable")
    place = np.empty(len(x), np.int64)  # of each token in its group
    place[order] = np.arange(len(x)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    label = np.empty(len(x), np.int32)
    counts = np.empty(len(sizes), np.int32)
    class_of = np.frexp(sizes - 0.5)[1]  # ceil(log2(size))
    for each in np.unique(class_of):
        chosen = np.flatnonzero(class_of == each)
        row = np.full(len(sizes), -1)
        row[chosen] = np.arange(len(chosen))
        members = np.flatnonzero(row[group] >= 0)
        packed = np.zeros((len(chosen), sizes[chosen].max(), x.shape[1]), x.dtype)
        at = row[group[members]], place[members]
        packed[at] = x[members]
        found, counts[chosen] = _components(packed, sizes[chosen].astype(np.int32), tau)
        label[members] = found[at]
    return _numbered(label, counts, group)


def _numbered(label: Array, counts: Array, group: Array) -> tuple[Array, int]:
    """Labels in each group `[n]` as labels over all groups, which have ``counts`` components `[G]`; and their sum."""
    first = np.cumsum(counts, dtype=np.int32) - counts
    return label + first[group], int(counts.sum())


def _components(x: Array, lengths: Array, tau: float) -> Sequence[Array]:
    """label int32 `[B, S]` and components int32 `[B]`."""
    return _run("ConnectedComponents", (x, lengths), tau=tau)


def _spread(positions: Array, label: Array, own: Array, k: int) -> tuple[Array, Array]:
    """Mean `[k]` and range `[k, 2]` of the positions of each label; where none has it, of ``own``."""
    joined = np.bincount(label, minlength=k) > 0
    left = np.flatnonzero(~joined[own])  # tokens of components that no token joined
    which = np.concatenate([label, own[left]])
    value = np.concatenate([positions, positions[left]])
    order = np.argsort(which, kind="stable")
    count = np.bincount(which, minlength=k)
    starts = np.cumsum(count) - count
    value = value[order]
    lowest, highest = np.minimum.reduceat(value, starts), np.maximum.reduceat(value, starts)
    mean = np.add.reduceat(value.astype(np.float64), starts) / count
    return np.clip(mean, lowest, highest), np.stack([lowest, highest], 1)


def _runs(label: Array, positions: Array) -> Array:
    """First token, last token and label `[r, 3]` of each stretch of equal labels in the order of positions."""
    order = np.argsort(positions, kind="stable")
    cut = np.flatnonzero(np.diff(label[order])) + 1
    first, last = np.concatenate([[0], cut]), np.concatenate([cut, [len(label)]]) - 1
    return np.stack([order[first], order[last], label[order[first]]], 1).astype(np.int64)


def _run(name: str, inputs: Sequence[Array], **attrs: float) -> Sequence[Array]:
    """The outputs of one operator."""
    from plugins import all_ops

    op = all_ops()[name]
    session = _session(name, inputs[0].dtype.name, tuple(attrs.items()))
    feeds = {port.name: np.ascontiguousarray(x) for port, x in zip(op.inputs, inputs, strict=True)}
    try:
        made: Sequence[Array] = session.run(None, feeds)
    except Exception as error:  # onnxruntime raises a type of its own for every status
        raise InputError(
            f"{name} of {' and '.join(str(list(x.shape)) for x in inputs)} failed: {str(error)[:200]}",
            "tokens whose comparison fits into memory",
            "build the native kernels (make native), which need the least, or merge in groups",
        ) from error
    return made


@lru_cache(maxsize=32)
def _session(name: str, dtype: str, attrs: tuple[tuple[str, float], ...]) -> Any:
    """A graph of one operator node, lowered to the CPU, in a session."""
    import onnx_ir as ir

    from plugins import all_ops
    from trtpass.ir import IR_VERSION, OPSET, make_node
    from trtpass.op import DOMAIN, VERSION, Port
    from trtpass.passes.lower import lower
    from trtpass.sessions import open_session, provider_name

    op = all_ops()[name]

    def type_of(port: Port) -> ir.DataType:
        return ir.DataType.from_numpy(np.dtype(dtype if port.floating else port.dtypes[0]))

    given = [ir.Value(name=p.name, type=ir.TensorType(type_of(p)), shape=ir.Shape(p.axes)) for p in op.inputs]
    made = [(p.name, type_of(p), p.axes) for p in op.outputs]
    node = make_node(name, given, made, op.complete(dict(attrs)), domain=DOMAIN)
    graph = ir.Graph(given, node.outputs, nodes=[node], opset_imports={"": OPSET, DOMAIN: VERSION}, name=name)
    return open_session(lower(ir.Model(graph, ir_version=IR_VERSION), "cpu").model, provider_name("cpu"))


def _narrow(x: Array) -> Array:
    with np.errstate(over="ignore"):  # beyond float32 is infinity: a token without a direction
        return x.astype(np.float32, copy=False)


def _like(tokens: Any, made: Components) -> Components:
    """The same as torch arrays on the device of ``tokens``, if these are."""
    if isinstance(tokens, np.ndarray):
        return made
    torch = sys.modules["torch"]
    arrays = {f.name: getattr(made, f.name) for f in fields(made)}
    moved = {n: torch.from_numpy(a).to(tokens.device) for n, a in arrays.items() if isinstance(a, np.ndarray)}
    moved["tokens"] = moved["tokens"].to(tokens.dtype)
    return Components(**{**arrays, **moved})

"""The two sides of the comparison: prefill graphs of different options over one dense decode graph, one row at a time.

Graphs are made in memory from the engine's ``dense.onnx``; weights stay in its ``weights.bin``; nothing is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from trtpass import passes
from trtpass.anchors import find
from trtpass.passes import Pass, Site
from trtpass.passes.cache import insert_cache
from trtpass.passes.logits import LastLogits
from trtpass.passes.lower import lower
from trtpass.quality.local_error import Heads
from trtpass.sessions import dtype_of, open_session, provider_name
from trtpass.variants import expose, sites_of

CPU = provider_name("cpu")


@dataclass
class Prefilled:
    """A prompt that was read.

    Attributes:
        length: tokens of the prompt.
        logits: ``[V]`` after its last token.
        cache: an OrtValue ``[1, Hkv, capacity, D]`` for every ``past.{i}.key`` and ``past.{i}.value``.
        kept: layer -> kept fraction of each selection, ``[N]``; layers without a selection are absent.
    """

    length: int
    logits: np.ndarray
    cache: dict[str, Any]
    kept: dict[int, np.ndarray] = field(default_factory=dict)


class Prefill:
    """One prefill graph: the dense one (an empty pipeline) or one with token selection."""

    def __init__(self, dense: ir.Model, pipeline: Sequence[Pass], target: str, threads: int | None = None) -> None:
        rewritten = dense.clone()
        self.sites: tuple[Site, ...] = sites_of(passes.run(rewritten, pipeline))
        counts = tuple(site.values["count"] for site in self.sites)
        lowered = lower(insert_cache(rewritten, "prefill"), target).model
        self._session = open_session(lowered, CPU, threads, counts)
        self._zeros: dict[str, Any] = {}

    def run(self, ids: np.ndarray, room: int) -> Prefilled:
        """Read ``ids [S]`` int64 into a cache that has ``room`` slots more."""
        length = len(ids)
        feeds = {"input_ids": _value(ids[None]), "lengths": _value(np.array([length], np.int32))}
        feeds.update(self._empty(length + room))
        caches = [name.replace("past.", "present.", 1) for name in self._zeros]
        names = ["logits", *(site.values["count"] for site in self.sites), *caches]
        made = dict(zip(names, self._session.run_with_ort_values(names, feeds), strict=True))
        return Prefilled(
            length,
            made["logits"].numpy()[0, -1],
            {past: made[present] for past, present in zip(self._zeros, caches, strict=True)},
            {site.layer: made[site.values["count"]].numpy()[0] / length for site in self.sites},
        )

    def _empty(self, capacity: int) -> dict[str, Any]:
        """Zeros for every past input, kept for the next call of the same capacity: a prefill does not write them."""
        if next((v.shape()[2] for v in self._zeros.values()), None) != capacity:
            self._zeros = {
                item.name: _value(np.zeros((1, item.shape[1], capacity, item.shape[3]), dtype_of(item.type)))
                for item in self._session.get_inputs()
                if item.name.startswith("past.")
            }
        return self._zeros


class Decode:
    """The dense decode graph with the logits of every token."""

    def __init__(self, dense: ir.Model, target: str, threads: int | None = None) -> None:
        self._session = open_session(lower(insert_cache(dense, "decode", logits="all"), target).model, CPU, threads)

    def log_probabilities(self, read: Prefilled, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Teacher-forced: ``log p [T]`` of each token of ``target [T]`` given all before it, and whether it is the
        greedy choice ``[T]`` bool. Greedy decoding gives exactly ``target`` iff all are."""
        logits = read.logits[None]
        if len(target) > 1:
            feeds = {
                "input_ids": _value(target[None, :-1]),
                "lengths": _value(np.array([len(target) - 1], np.int32)),
                "past_lengths": _value(np.array([read.length], np.int32)),
                **read.cache,
            }
            (more,) = self._session.run_with_ort_values(["logits"], feeds)
            logits = np.concatenate([logits, more.numpy()[0]])
        return log_softmax_at(logits, target), logits.argmax(-1) == target


def log_softmax_at(logits: np.ndarray, target: np.ndarray) -> np.ndarray:
    """``log softmax(logits [T, V])`` at ``target [T]``, in float64."""
    top = logits.max(-1, keepdims=True)
    total = np.exp(logits.astype(np.float64) - top).sum(-1)
    return logits[np.arange(len(target)), target].astype(np.float64) - top[:, 0] - np.log(total)


def activations(dense: ir.Model, pipeline: Sequence[Pass], ids: np.ndarray) -> dict[int, Heads]:
    """q, k, v and the selection of each sparse layer for one prompt ``ids [S]``, as the rewritten model computes them:
    what a layer sees has passed through the sparse layers below it."""
    blocks = {b.layer: b for b in find(dense).blocks}
    rewritten = dense.clone()
    sites = sites_of(passes.run(rewritten, pipeline))
    names: dict[int, tuple[str, ...]] = {}
    for site in sites:
        block = blocks[site.layer]
        qkv = (str(v.name) for v in (block.q, block.k, block.v))
        names[site.layer] = (*qkv, site.values["index"], site.values["count"])
    flat = list(dict.fromkeys(name for group in names.values() for name in group))
    LastLogits()(rewritten)
    expose(rewritten, flat)
    session = open_session(rewritten, CPU)
    feeds = {"input_ids": ids[None], "lengths": np.array([len(ids)], np.int32)}
    made = dict(zip(flat, session.run(flat, feeds), strict=True))
    found = {}
    for layer, (q, k, v, index, count) in names.items():
        sets = [np.asarray(row[:n]) for row, n in zip(made[index][0], made[count][0], strict=True)]
        found[layer] = Heads(made[q][0], made[k][0], made[v][0], sets, float(blocks[layer].scale))
    return found


def _value(array: np.ndarray) -> Any:
    import onnxruntime as ort

    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))

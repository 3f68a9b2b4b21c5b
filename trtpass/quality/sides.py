"""The two sides of the comparison: prefill graphs of different options over one dense decode graph, one row at a time.

Graphs are made in memory from the engine's ``dense.onnx``; weights stay in its ``weights.bin``; nothing is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

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
    """A prompt that was read; the next prompt of the same `Prefill` may overwrite its cache.

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
        self._counts = tuple(site.values["count"] for site in self.sites)
        lowered = lower(insert_cache(rewritten, "prefill"), target).model
        self._session = open_session(lowered, CPU, threads, self._counts)
        self._cache: dict[str, Any] = {}

    def run(self, ids: np.ndarray, room: int) -> Prefilled:
        """Read ``ids [S]`` int64 into a cache that has ``room`` slots more."""
        length, cache = len(ids), self._slots(len(ids) + room)
        feeds = {"input_ids": ids[None], "lengths": np.array([length], np.int32)}
        logits, *counts = _run(self._session, feeds, cache, ("logits", *self._counts))
        kept = {site.layer: count[0] / length for site, count in zip(self.sites, counts, strict=True)}
        return Prefilled(length, logits[0, -1], cache, kept)

    def _slots(self, capacity: int) -> dict[str, Any]:
        """A cache of ``capacity`` slots; one of that size is used again: what it holds beyond a prompt is masked."""
        if next((v.shape()[2] for v in self._cache.values()), None) != capacity:
            self._cache.clear()  # before the new one is allocated: it may be hundreds of megabytes
            for item in self._session.get_inputs():
                if item.name.startswith("past."):
                    slots = np.zeros((1, item.shape[1], capacity, item.shape[3]), dtype_of(item.type))
                    self._cache[item.name] = ort.OrtValue.ortvalue_from_numpy(slots)
        return dict(self._cache)


class Decode:
    """The dense decode graph with the logits of every token."""

    def __init__(self, dense: ir.Model, target: str, threads: int | None = None) -> None:
        self._session = open_session(lower(insert_cache(dense, "decode", logits="all"), target).model, CPU, threads)

    def log_probabilities(self, read: Prefilled, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Teacher-forced: ``log p [T]`` of each token of ``target [T]`` given all before it, and whether it is the
        greedy choice ``[T]`` bool. Greedy decoding gives exactly ``target`` iff all are. Writes into the cache."""
        logits = read.logits[None]
        if len(target) > 1:
            lengths = {"lengths": len(target) - 1, "past_lengths": read.length}
            feeds = {"input_ids": target[None, :-1], **{k: np.array([n], np.int32) for k, n in lengths.items()}}
            (more,) = _run(self._session, feeds, read.cache, ("logits",))
            logits = np.concatenate([logits, more[0]])
        return log_softmax_at(logits, target), logits.argmax(-1) == target


def _run(
    session: Any, feeds: Mapping[str, np.ndarray], cache: Mapping[str, Any], names: tuple[str, ...]
) -> list[np.ndarray]:
    """The named outputs of one call, with every cache bound as past and present: it is written in place."""
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_cpu_input(name, np.ascontiguousarray(array))
    for name, value in cache.items():
        binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(name.replace("past.", "present.", 1), value)
    for name in names:
        binding.bind_output(name, "cpu")
    session.run_with_iobinding(binding)
    return [np.array(value.numpy()) for value in binding.get_outputs()[-len(names) :]]  # in the order of binding


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

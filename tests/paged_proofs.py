"""Engines with a paged cache over tiny models, and the oracle that they are held against; shared by several tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from families import VOCAB, Exported
from proofs import raised

from trtpass import passes
from trtpass.kvzap.surrogate import Surrogate
from trtpass.masked import PROMPT, Masked, MaskedModel
from trtpass.paged import PagedEngine, PagedState
from trtpass.paged_checks import decisions_of
from trtpass.passes import PassResult
from trtpass.passes.cache_policy import CachePolicy
from trtpass.passes.lower import lower
from trtpass.passes.paged_cache import PagedCacheOptions, insert_paged_cache
from trtpass.plans import Source
from trtpass.runtime import Engine

LAYERS, KV_HEADS, WIDTH = 2, 2, 96  # of families.save_tiny


def save_surrogate(path: Path, kind: str = "linear", scale: float = 0.2, seed: int = 0) -> Path:
    """A seeded checkpoint for the tiny models: about half of its scores are negative."""
    rng = np.random.default_rng(seed)

    def noise(*shape: int) -> np.ndarray:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    if kind == "linear":
        layers = tuple({"weight": noise(KV_HEADS, WIDTH), "bias": noise(KV_HEADS)} for _ in range(LAYERS))
    else:
        inner = WIDTH // 8
        layers = tuple(
            {"0.weight": noise(inner, WIDTH), "0.bias": noise(inner),
             "2.weight": noise(KV_HEADS, inner), "2.bias": noise(KV_HEADS)}
            for _ in range(LAYERS)
        )  # fmt: skip
    Surrogate("linear" if kind == "linear" else "mlp", layers).save(path)
    return path


@dataclass
class Proof:
    """An engine, and the torch model under the same policy."""

    engine: PagedEngine
    oracle: MaskedModel
    layers: list[int]

    def run(self, rows: list[list[int]], later: list[list[int]]) -> tuple[PagedState, np.ndarray, Masked, Masked]:
        """Prefill ``rows``, then feed the tokens of ``later`` one by one.

        Returns the state, the engine's logits ``[B, N + 1, V]``, and what the oracle says under the engine's decisions
        and under its own.
        """
        self.engine.decisions = []
        state = self.engine.prefill(rows)
        logits = [state.logits]
        for tokens in zip(*later, strict=True):
            logits.append(self.engine.decode(state, list(tokens)))
        ids, starts, asked, prompt = self.text(rows, later)
        keep = decisions_of(self.engine.decisions, prompt, ids.shape[1], self.layers)
        forced = self.oracle.run(ids, starts, asked, keep, prompt)
        free = self.oracle.run(ids, starts, asked, None, prompt)
        return state, np.stack(logits, 1), forced, free

    @staticmethod
    def text(rows: list[list[int]], later: list[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Right-padded ids, the start of each token's forward, positions whose logits are asked for, prompt lengths."""
        prompt = np.array([len(row) for row in rows], np.int32)
        count = len(later[0])
        ids = np.zeros((len(rows), int(prompt.max()) + count), np.int64)
        for b, row in enumerate(rows):
            ids[b, : len(row) + count] = [*row, *later[b]]
        token = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        starts = np.where(token < prompt[:, None], PROMPT, token)
        return ids, starts, prompt[:, None] - 1 + np.arange(count + 1), prompt


def paged_engine(dense: ir.Model, policy: CachePolicy | None, target: str = "cpu", page: int = 16) -> PagedEngine:
    """An engine from a canonical graph; without a policy, a paged cache that keeps everything."""
    rewritten = dense.clone()
    if policy is None:
        options = {"page": page, "window": 128, "sinks": 4}
        graphs = {
            phase: insert_paged_cache(dense, PagedCacheOptions(phase, **options)) for phase in ("prefill", "decode")
        }
    else:
        policy(rewritten)
        graphs = Source(dense, rewritten, 8192, "last", policy=policy, page=page).phases()
    engine = Engine.open({phase: lower(graph, target).model for phase, graph in graphs.items()})
    assert isinstance(engine, PagedEngine)
    return engine


def proof(exported: Exported, text: str, target: str = "cpu", page: int = 16) -> Proof:
    """The engine of an export under the policy in ``text``, and its oracle."""
    dense = raised(exported)
    policy = passes.parse(text)
    assert isinstance(policy, CachePolicy)
    engine = paged_engine(dense, policy, target, page)
    result: PassResult = policy(dense.clone())
    layers = [site.layer for site in result.sites]
    options = policy.options
    return Proof(engine, MaskedModel(exported.loaded.module, policy, layers, options.window, options.sinks), layers)


def tokens(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, count).tolist()

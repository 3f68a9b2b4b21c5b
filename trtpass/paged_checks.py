"""The ladder of an engine with a cache policy: its decisions = the twin's, and its engine = the boolean-mask oracle.

A policy leaves the logits of a prompt alone, so what is compared is what it decides, and what is decoded after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from trtpass import io
from trtpass.anchors import find
from trtpass.compare import Disagreement, run_onnx, session
from trtpass.errors import InputError
from trtpass.ir import add_input
from trtpass.manifest import Check
from trtpass.masked import PROMPT, Masked, MaskedModel
from trtpass.pages import EVICTED
from trtpass.passes import PassResult
from trtpass.passes.cache_policy import KEPT, CachePolicy, Keys
from trtpass.passes.logits import LastLogits
from trtpass.passes.lower import lower
from trtpass.passes.paged_cache import PagedCacheOptions, insert_paged_cache
from trtpass.runtime import Engine
from trtpass.variants import expose, expose_hidden

if TYPE_CHECKING:
    from trtpass.compare import Ladder
    from trtpass.paged import PagedEngine

STEPS = 16  # decode steps of the engine's check
MARGIN = (
    1e-2  # of a score from its cut, where two sides may decide differently; in the units of ``CachePolicy.distance``
)


def flips(
    policy: CachePolicy, mine: dict[int, np.ndarray], other: dict[int, np.ndarray],
    scores: dict[int, np.ndarray], valid: np.ndarray,
) -> Disagreement:  # fmt: skip
    """Compare decisions int32 ``[B, Hkv, S]`` by layer, where ``valid [B, S]``; ``scores`` are those of ``mine``."""
    found = Disagreement()
    for layer, keep in mine.items():
        differs = (keep != other[layer]) & valid[:, None]
        found.decisions += int(valid.sum()) * keep.shape[1]
        found.flipped += int(differs.sum())
        if differs.any():
            score = scores.get(layer)
            far = np.inf if score is None else float(policy.distance(score, keep)[differs].max())
            found.worst = max(found.worst, far)
    return found


def rewrite_check(ladder: Ladder, policy: CachePolicy, result: PassResult) -> Check:
    """D = C: logits, scores and decisions of the rewritten graph, against the policy's reference in torch."""
    graph = ladder.rewritten.clone()
    hidden = expose_hidden(graph)
    LastLogits()(graph)
    layers = [site.layer for site in result.sites]
    scored = [site for site in result.sites if "score" in site.values]
    expose(graph, [site.values["score"] for site in scored])
    if ladder.module is None:
        return _sites_alone(ladder, policy, result)
    outputs = ladder.run(graph, hidden)
    lengths, ids = ladder.probe.lengths, ladder.probe.input_ids
    own = MaskedModel(ladder.module, policy, layers, policy.options.window, policy.options.sinks).run(
        ids, np.full_like(ids, PROMPT), (lengths - 1)[:, None], prompt=lengths
    )
    valid = np.arange(ids.shape[1]) < lengths[:, None]
    keep = {site.layer: outputs[site.values[KEPT]] for site in result.sites}
    free = flips(policy, own.keep, keep, own.scores, valid)
    left = {"logits": outputs["logits"], "hidden": ladder.last(outputs["hidden"])}
    right = {"logits": own.logits, "hidden": own.hidden}
    for site in scored:
        mask = valid[:, None]
        left[f"score {site.layer}"] = np.where(mask, outputs[site.values["score"]], 0.0).astype(np.float32)
        right[f"score {site.layer}"] = np.where(mask, own.scores[site.layer], 0.0).astype(np.float32)
    ladder.kept = kept_shares(policy, keep, lengths)
    return ladder.judge(left, right, free, 1 - float(np.mean(list(ladder.kept.values()))), margin=MARGIN)


def _sites_alone(ladder: Ladder, policy: CachePolicy, result: PassResult) -> Check:
    """Without a torch model: what each site decides, against the reference on the graph's own values."""
    import torch

    graph = ladder.rewritten.clone()
    blocks = {block.layer: block for block in find(graph).blocks}
    names: dict[int, dict[str, str]] = {}
    for site in result.sites:
        block = blocks[site.layer]
        values = {"q": block.q, "k": block.k, "hidden": block.qkv_input or block.q}
        names[site.layer] = {role: str(value.name) for role, value in values.items()}
    expose(graph, [name for roles in names.values() for name in roles.values()])
    expose(graph, [site.values["score"] for site in result.sites if "score" in site.values])
    outputs = ladder.outputs(graph)
    lengths, ids = ladder.probe.lengths, ladder.probe.input_ids
    valid = np.arange(ids.shape[1]) < lengths[:, None]
    positions = torch.arange(ids.shape[1])[None].expand(len(ids), -1)
    left, right, keep, own, scores = {}, {}, {}, {}, {}
    for site in result.sites:
        q, k, hidden = (torch.from_numpy(outputs[names[site.layer][role]]) for role in ("q", "k", "hidden"))
        rows, scale = torch.from_numpy(lengths), float(blocks[site.layer].scale)
        made = policy.decide(Keys(site.layer, hidden, q, k, positions, rows, scale))
        own[site.layer], keep[site.layer] = made.keep.numpy(), outputs[site.values[KEPT]]
        if made.score is not None:
            scores[site.layer] = made.score.numpy()
            name = f"score {site.layer}"
            left[name] = np.where(valid[:, None], outputs[site.values["score"]], 0.0).astype(np.float32)
            right[name] = np.where(valid[:, None], scores[site.layer], 0.0).astype(np.float32)
    free = flips(policy, own, keep, scores, valid)
    ladder.kept = kept_shares(policy, keep, lengths)
    pruned = 1 - float(np.mean(list(ladder.kept.values())))
    note = "decisions of each layer against their reference (there is no torch model)"
    return ladder.judge(left, right, free, pruned, note, MARGIN)


def kept_shares(policy: CachePolicy, keep: dict[int, np.ndarray], lengths: np.ndarray) -> dict[int, float]:
    """By layer: the mean share of a prompt's keys that the cache holds after it."""
    shares = {}
    for layer, decided in keep.items():
        token = np.arange(decided.shape[-1])
        end = lengths[:, None, None]
        guarded = (token < policy.options.sinks) | (token >= end - 1 - policy.options.window)
        held = ((decided != EVICTED) | guarded) & (token < end)
        shares[layer] = float((held.sum(-1) / lengths[:, None]).mean())
    return shares


def paged_graphs(
    rewritten: ir.Model, dense: ir.Model, policy: CachePolicy, page: int, logits: str, context: int | None = None,
    **fixed: int,
) -> dict[str, ir.Model]:  # fmt: skip
    """Prefill and decode graphs with a paged cache, not lowered yet; ``fixed``: ``pages`` and ``entries`` of a plan."""
    decode = dense.clone()
    later = policy.decode()
    if later is not None:
        later(decode)
    return {
        phase: insert_paged_cache(
            source,
            PagedCacheOptions(phase, page, policy.options.window, policy.options.sinks, logits, **fixed),
            context,
        )
        for phase, source in (("prefill", rewritten), ("decode", decode))
    }


def engine_check(ladder: Ladder, policy: CachePolicy, result: PassResult, target: str, kernels: bool) -> Check:
    """C = E: prompts, then decode steps, through the engine's own cache, against the oracle under the same decisions;
    and the oracle's own decisions against the engine's."""
    graphs = paged_graphs(ladder.rewritten, ladder.dense, policy, ladder.page, "last")
    engine: PagedEngine = Engine.open(  # type: ignore[assignment]
        {phase: lower(graph, target, kernels).model for phase, graph in graphs.items()}
    )
    lengths, ids = ladder.probe.lengths, ladder.probe.input_ids
    prompt = lengths - STEPS
    if int(prompt.min()) < 1:
        raise InputError(f"a probe of {int(lengths.min())} tokens", f"more than {STEPS}")
    engine.decisions = []
    state = engine.prefill([row[:n].tolist() for row, n in zip(ids, prompt, strict=True)])
    logits = [state.logits]
    rows = np.arange(len(ids))
    for step in range(STEPS):
        logits.append(engine.decode(state, ids[rows, prompt + step].tolist()))
    layers = [site.layer for site in result.sites]
    keep = decisions_of(engine.decisions, prompt, ids.shape[1], layers)
    token = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    starts = np.where(token < prompt[:, None], PROMPT, token)
    asked = prompt[:, None] - 1 + np.arange(STEPS + 1)
    note = f"engine = boolean-mask oracle, {STEPS} steps after {'/'.join(map(str, prompt))} tokens"
    pruned, left = 1.0 - float(state.kept().mean()), {"logits": np.stack(logits, 1)}
    if ladder.module is None:
        expected = masked_logits(ladder, policy, keep, starts, asked)
        return ladder.judge(left, {"logits": expected}, None, pruned, f"{note}, in ONNX (there is no torch model)")
    oracle = MaskedModel(ladder.module, policy, layers, policy.options.window, policy.options.sinks)
    forced: Masked = oracle.run(ids, starts, asked, keep, prompt)
    free = flips(policy, forced.keep, keep, forced.scores, token < lengths[:, None])
    return ladder.judge(left, {"logits": forced.logits}, free, pruned, note, MARGIN)


def masked_logits(
    ladder: Ladder, policy: CachePolicy, keep: dict[int, np.ndarray], starts: np.ndarray, asked: np.ndarray
) -> np.ndarray:
    """The oracle without torch: the dense graph, whose attentions read a mask `[B, H, S, S]` under these decisions.

    Args:
        keep: decisions by layer, int32 `[B, Hkv, S]`. starts: as for ``MaskedModel.run`` `[B, S]`.
        asked: positions whose logits are wanted `[B, N]`.

    Returns:
        float32 `[B, N, V]`.
    """
    graph, options = ladder.dense.clone(), policy.options
    ids = ladder.probe.input_ids
    token = np.arange(ids.shape[1])
    old = (token >= options.sinks) & (token <= starts[..., None] - 1 - options.window)  # [B, S, S]
    feed: dict[str, np.ndarray] = {}
    for block in find(graph).blocks:
        causal = np.broadcast_to(token <= token[:, None], (len(ids), block.kv_heads, len(token), len(token)))
        evicted = keep[block.layer][:, :, None] == EVICTED if block.layer in keep else np.zeros(1, bool)
        feed[f"mask.{block.layer}"] = np.repeat(causal & ~(evicted & old[:, None]), block.group, 1)
        shape = ["batch", block.heads, "queries", "keys"]
        given = add_input(graph.graph, f"mask.{block.layer}", ir.DataType.BOOL, shape)
        block.node.attributes["is_causal"] = ir.AttrInt64("is_causal", 0)
        block.node.resize_inputs(4)
        block.node.replace_input_with(3, given)
    name = str(find(ladder.dense).logits.name)  # type: ignore[union-attr]
    logits = run_onnx(graph, ladder.folder, {**ladder.probe.feed(graph), **feed})[name]
    return logits[np.arange(len(ids))[:, None], asked]


def half_flips(ladder: Ladder, policy: CachePolicy, result: PassResult) -> str:
    """In words: how many decisions of a plan's prefill graph, in half precision, differ from those in float32.

    The graph that the plan is built from, run by ONNX Runtime on the CPU: a number that is reported, never a check.
    """
    model = io.load(ladder.folder / "prefill.onnx")
    lengths, ids = ladder.probe.lengths, ladder.probe.input_ids
    batch, tokens = ids.shape
    pools = {str(v.name): v for v in model.graph.inputs if str(v.name).startswith("past.")}
    heads = int(next(o.shape[2] for o in model.graph.outputs if o.name == "keep" and o.shape is not None))  # type: ignore[arg-type]
    count = batch * heads * -(-tokens // ladder.page)
    feed: dict[str, np.ndarray] = {"input_ids": ids, "lengths": lengths}
    feed["free"] = np.tile(np.arange(count, dtype=np.int32), (len(pools) // 2, 1))
    for name, pool in pools.items():
        width = int((pool.shape or [0])[-1])  # type: ignore[arg-type]
        kind = np.float16 if pool.dtype is None else pool.dtype.numpy()
        feed[name] = np.zeros((count, ladder.page, width), kind)
    names = {str(v.name) for v in model.graph.inputs}
    running = session(ladder.folder / "prefill.onnx")
    (half,) = running.run(["keep"], {name: x for name, x in feed.items() if name in names})
    single = ladder.outputs(ladder.rewritten)
    valid = np.arange(tokens) < lengths[:, None]
    layers = [site.layer for site in result.sites]
    found = flips(policy, {i: half[i] for i in layers}, {i: single[f"{KEPT}.{i}"] for i in layers}, {}, valid)
    return f"in half precision {found.share:.2%} of decisions differ"


def decisions_of(
    made: list[np.ndarray], prompt: np.ndarray, tokens: int, layers: list[int]
) -> dict[int, np.ndarray]:  # fmt: skip
    """What an engine decided in a prefill and the steps after it, as int32 ``[B, Hkv, S]`` by layer.

    Args:
        made: ``PagedEngine.decisions``: of the prompt ``[L, B, Hkv, S]``, then of each step ``[L, B, Hkv, 1]``.
        prompt: tokens of each row's prompt ``[B]``.
        tokens: S of the result; keys that were not decided about are kept.
        layers: those that a policy decides in.
    """
    count, batch, heads, _ = made[0].shape
    every = np.ones((count, batch, heads, tokens), np.int32)
    for b, n in enumerate(prompt.tolist()):
        every[:, b, :, :n] = made[0][:, b, :, :n]
        for step, keep in enumerate(made[1:]):
            if n + step < tokens:
                every[:, b, :, n + step] = keep[:, b, :, 0]
    return {layer: every[layer] for layer in layers}

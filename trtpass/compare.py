"""The validation ladder (docs/design.md): torch = raised, twin = rewritten, rewritten = engine; forced, then free.

Numbers are compared by Polygraphy. Selections are compared as sets: every token on which two sides disagree must have a
score within ``MARGIN`` of the cut, relative to it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from trtpass import native
from trtpass.anchors import find
from trtpass.errors import InputError
from trtpass.manifest import Check
from trtpass.passes import Pass, PassResult, Site
from trtpass.passes.cache import insert_cache
from trtpass.passes.cache_policy import policy_of
from trtpass.passes.logits import LastLogits
from trtpass.passes.lower import TARGET_KEY, lower
from trtpass.twin import TokenSparseTwin, TorchRun, run_dense
from trtpass.variants import SELECTION, expose, expose_hidden, expose_selections, feeds, force_selections, sites_of

# float32 on both sides, 30 layers: rounding differs by operator order only. Hidden states reach a few hundred in
# magnitude (a handful of massive activations), so the relative part carries most of the bound there.
ATOL, RTOL = 2e-3, 2e-3
# A score is a sum of W softmax terms; inputs that differ by 1e-5 move it by about 1e-4 of itself: far less than this.
MARGIN = 1e-2


@dataclass(frozen=True)
class Probe:
    """Inputs of a check: right-padded ``input_ids [B, S]`` int64 and ``lengths [B]`` int32."""

    input_ids: np.ndarray
    lengths: np.ndarray

    def feed(self, model: ir.Model) -> dict[str, np.ndarray]:
        names = {v.name for v in model.graph.inputs}
        every = {"input_ids": self.input_ids, "lengths": self.lengths}
        return {name: array for name, array in every.items() if name in names}

    def valid(self, hidden: np.ndarray) -> np.ndarray:
        """``hidden [B, S, E]`` with padding rows zeroed: they mean nothing."""
        rows = np.arange(hidden.shape[1])[None, :, None] < self.lengths[:, None, None]
        return np.where(rows, hidden, 0.0).astype(np.float32)


@dataclass
class Difference:
    """Outcome of one numeric comparison; ``max_rel`` is the largest difference over the largest magnitude, and both are
    None where a side holds NaN or infinity."""

    ok: bool
    max_abs: float | None
    max_rel: float | None

    @property
    def words(self) -> str:
        return "outputs hold NaN or infinity" if self.max_abs is None else f"outputs differ by {self.max_abs:.2e}"


def difference(left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray], atol: float, rtol: float) -> Difference:
    """Compare outputs of the same names with Polygraphy; elementwise ``|l - r| <= atol + rtol |r|``, NaN never passes.

    Raises:
        InputError: the two sides do not have the same outputs, or outputs of other shapes.
    """
    from polygraphy.comparator import CompareFunc, IterationResult
    from polygraphy.logger import G_LOGGER

    if set(left) != set(right):
        raise InputError(f"outputs {sorted(left)} are compared with {sorted(right)}")
    for name in left:
        if left[name].shape != right[name].shape:
            raise InputError(
                f"output '{name}' has shape {left[name].shape} on one side and {right[name].shape} on the other"
            )
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        compare = CompareFunc.simple(atol=atol, rtol=rtol, check_error_stat="elemwise", fail_fast=False)
        outcome = compare(
            IterationResult(dict(left), runner_name="left"), IterationResult(dict(right), runner_name="right")
        )
    ok = all(bool(result) for result in outcome.values())
    worst, relative = 0.0, 0.0
    for name in left:
        if not (np.isfinite(left[name]).all() and np.isfinite(right[name]).all()):
            return Difference(False, None, None)
        gap = float(np.max(np.abs(left[name].astype(np.float64) - right[name]), initial=0.0))
        scale = float(np.max(np.abs(right[name]), initial=0.0)) or 1.0
        worst, relative = max(worst, gap), max(relative, gap / scale)
    return Difference(ok, worst, relative)


def run_onnx(
    model: ir.Model, folder: Path, feed: Mapping[str, np.ndarray], threads: int | None = None
) -> dict[str, np.ndarray]:
    """Run a model whose weights are external files of ``folder`` on ONNX Runtime's CPU provider.

    Only a graph that was lowered has native kernels: a rewritten one is the bodies of its operators.
    """
    with running(model, folder, threads) as run:
        return run(feed)


@contextmanager
def running(
    model: ir.Model, folder: Path, threads: int | None = None
) -> Iterator[Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]]:
    """``run_onnx`` for several calls: a function from inputs to outputs."""
    from polygraphy.backend.onnxrt import OnnxrtRunner
    from polygraphy.logger import G_LOGGER

    path = folder / ".check.onnx"
    lowered = model.metadata_props.get(TARGET_KEY) == "cpu"
    onnx.save_model(ir.to_proto(model), str(path))
    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL), OnnxrtRunner(lambda: session(path, threads, lowered)) as runner:
            yield lambda feed: {name: np.array(value) for name, value in runner.infer(dict(feed)).items()}
    finally:
        path.unlink(missing_ok=True)


def session(path: Path, threads: int | None = None, kernels: bool = False) -> Any:
    """An ONNX Runtime CPU session, with native kernels or without; errors of the runtime become one InputError."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if kernels:
        native.register(options)
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise InputError(f"ONNX Runtime cannot load '{path.name}': {str(error)[:300]}") from error


@dataclass
class Disagreement:
    """Free choices of two sides over all rows and heads."""

    decisions: int = 0
    flipped: int = 0
    worst: float = 0.0  # relative distance from the cut of the worst flipped token
    kept: dict[int, float] = field(default_factory=dict)  # by layer: mean kept fraction of the right side

    @property
    def share(self) -> float:
        return self.flipped / self.decisions if self.decisions else 0.0


def disagreement(
    left: Mapping[int, Mapping[str, np.ndarray]],
    right: Mapping[int, Mapping[str, np.ndarray]],
    lengths: np.ndarray,
    protected: int,
) -> Disagreement:
    """Compare selections by layer; scores and cut are the right side's. ``protected``: last positions, always kept."""
    found = Disagreement()
    for layer, mine in right.items():
        other = left[layer]
        batch, sets = mine["count"].shape
        for b in range(batch):
            length, free = int(lengths[b]), max(int(lengths[b]) - protected, 0)
            for n in range(sets):
                keep = mine["index"][b, n, : mine["count"][b, n]]
                seen = other["index"][b, n, : other["count"][b, n]]
                found.decisions += length
                differs = np.setxor1d(keep, seen)
                found.flipped += differs.size
                score = mine["score"][b, n]
                chosen = keep[keep < free]
                if differs.size and chosen.size:
                    cut = float(score[chosen].min())
                    gap = float(np.max(np.abs(score[differs] - cut))) / max(cut, 1e-30)
                    found.worst = max(found.worst, gap) if np.isfinite(gap) else float("inf")
                elif differs.size:
                    found.worst = float("inf")
        found.kept[layer] = float(np.mean(mine["count"] / lengths[:, None]))
    return found


def read_selections(sites: Sequence[Site], outputs: Mapping[str, np.ndarray]) -> dict[int, dict[str, np.ndarray]]:
    """By layer and role, from the outputs of an exposed graph."""
    return {site.layer: {role: outputs[site.values[role]] for role in SELECTION} for site in sites}


@dataclass
class Ladder:
    """The three checks of one engine folder, and what they need: canonical ``dense`` and ``rewritten`` graphs (weights
    external, in ``folder``), the passes that lead from one to the other, the probe, and the torch model (or None)."""

    folder: Path
    dense: ir.Model
    rewritten: ir.Model
    passes: Sequence[Pass]
    results: Sequence[PassResult]
    probe: Probe
    module: Any | None
    original: Path | None = None  # the ONNX file that the engine was made from, where there is no torch model
    saved: TorchRun | None = None  # the torch side of ``rewrite``: what is saved beside the engine
    page: int = 64  # slots of a page, where a policy makes the cache paged
    kept: dict[int, float] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[Site, ...]:
        return sites_of(self.results)

    @property
    def protected(self) -> int:
        options = [p.options for p, r in zip(self.passes, self.results, strict=True) if sites_of([r])]
        return max((o.window if o.prefix else 0 for o in options), default=0)

    def export(self) -> Check:
        """A = B: the torch model and the raised graph, hidden states and last logits."""
        if self.module is None:
            return self._raised() if self.original else Check.not_run("there is neither a torch model nor an ONNX file")
        torch_run = run_dense(self.module, self.probe.input_ids, self.probe.lengths)
        if not self.sites:
            self.saved = torch_run
        graph = self.dense.clone()
        hidden = expose_hidden(graph)
        LastLogits()(graph)
        return self._numeric(self.run(graph, hidden), self._torch(torch_run))

    def _raised(self) -> Check:
        """The given ONNX file and the raised graph: logits of every token of a short prompt."""
        count = min(int(self.probe.lengths.min()), 256)
        inputs = find(self.dense)
        if inputs.input_ids is None or inputs.logits is None or self.original is None:
            return Check.not_run("the raised graph has no token input or no logits")
        feed, name = {str(inputs.input_ids.name): self.probe.input_ids[:, :count]}, str(inputs.logits.name)
        given = session(self.original)
        left = dict(zip((o.name for o in given.get_outputs()), given.run(None, feed), strict=True))
        gap = difference({"logits": run_onnx(self.dense, self.folder, feed)[name]}, {"logits": left[name]}, ATOL, RTOL)
        return Check(
            status="passed" if gap.ok else "failed",
            reason="the given ONNX file = raised ONNX (there is no torch model)" if gap.ok else gap.words,
            max_abs=gap.max_abs,
            max_rel=gap.max_rel,
            tolerance=f"atol {ATOL:g}, rtol {RTOL:g}, 2x{count} tokens",
        )

    def rewrite(self) -> Check:
        """D = C: the twin with the graph's selections forced, tight; its own choices, within the margin of the cut."""
        if (policy := policy_of(self.passes)) is not None:
            from trtpass.paged_checks import rewrite_check

            return rewrite_check(self, policy, self._result(policy))
        from trtpass import span_checks

        if (shorter := span_checks.shortened_by(self.passes, self.results)) is not None:
            return span_checks.rewrite_check(self, *shorter)
        if not self.sites:
            return Check.not_run("no token-selecting pass was applied")
        graph = self.rewritten.clone()
        hidden = expose_hidden(graph)
        LastLogits()(graph)
        expose_selections(graph, self.sites)
        outputs = self.run(graph, hidden)
        chosen = read_selections(self.sites, outputs)
        self.kept = {k: float(np.mean(v["count"] / self.probe.lengths[:, None])) for k, v in chosen.items()}
        if self.module is None:
            if importlib.util.find_spec("torch") is None:
                return Check.not_run("torch, in which the references are written, is not installed")
            return self._sites_alone()
        twin: TokenSparseTwin = self._selecting().twin(self.module, next(r for r in self.results if sites_of([r])))
        forced = {layer: (s["index"], s["count"]) for layer, s in chosen.items()}
        self.saved = twin.run(self.probe.input_ids, self.probe.lengths, forced)
        free = disagreement(chosen, self.saved.selections, self.probe.lengths, self.protected)
        return self._numeric(_main(outputs), self._torch(self.saved), free, pruned=self._pruned())

    def _sites_alone(self) -> Check:
        """Without a torch model: each sparse site against the operators' references, on the graph's own q, k and v."""
        graph = self.rewritten.clone()
        blocks = {block.layer: block for block in find(self.dense).blocks}
        inputs = {
            s.layer: [str(v.name) for v in (blocks[s.layer].q, blocks[s.layer].k, blocks[s.layer].v)]
            for s in self.sites
        }
        expose(
            graph, [*{name for names in inputs.values() for name in names}, *(s.values["output"] for s in self.sites)]
        )
        expose_selections(graph, self.sites)
        outputs = run_onnx(graph, self.folder, self.probe.feed(graph))
        twin: TokenSparseTwin = self._selecting().twin(None, next(r for r in self.results if sites_of([r])))
        chosen = read_selections(self.sites, outputs)
        left, right, own = {}, {}, {}
        for site in self.sites:
            layer = site.layer
            forced = (chosen[layer]["index"], chosen[layer]["count"])
            scale = blocks[layer].scale
            q, k, v = (outputs[name] for name in inputs[layer])
            out, own[layer] = twin.site(q, k, v, self.probe.lengths, scale, forced)
            left[f"layer {layer}"], right[f"layer {layer}"] = outputs[site.values["output"]], out
        free = disagreement(chosen, own, self.probe.lengths, self.protected)
        return self.judge(
            left, right, free, self._pruned(), "each site against its reference (there is no torch model)"
        )

    def engine(self, target: str, kernels: bool = True) -> Check:
        """C = E: the rewritten graph and the lowered prefill graph with C's selections forced; its free choices; the
        cache that it writes; and one dense pass through the decode graph."""
        if (policy := policy_of(self.passes)) is not None:
            from trtpass.paged_checks import engine_check

            return engine_check(self, policy, self._result(policy), target, kernels)
        from trtpass import span_checks

        if (shorter := span_checks.shortened_by(self.passes, self.results)) is not None:
            return span_checks.engine_check(self, *shorter, target, kernels)
        reference = self.rewritten.clone()
        hidden = expose_hidden(reference)
        LastLogits()(reference)
        expose_selections(reference, self.sites)
        keys = {
            f"present.{b.layer}.{r}": str(getattr(b, r[0]).name)
            for b in find(self.dense).blocks
            for r in ("key", "value")
        }
        expose(reference, list(keys.values()))
        expected = self.run(reference, hidden)
        sequence = self.probe.input_ids.shape[1]

        lowered = self.rewritten.clone()
        expose_hidden(lowered)
        names = force_selections(lowered, self.sites)
        expose_selections(lowered, self.sites)
        prefill = lower(insert_cache(lowered, "prefill"), target, kernels).model
        got = self.run(prefill, hidden, {**self.empty(prefill, sequence), **feeds(names, self.sites, expected)})  # type: ignore[dict-item]
        left = {**_main(got), **{name: self._valid_cache(got[name]) for name in keys}}
        right = {**_main(expected), **{name: self._valid_cache(expected[key]) for name, key in keys.items()}}
        free = disagreement(
            read_selections(self.sites, got), read_selections(self.sites, expected), self.probe.lengths, self.protected
        )
        check = self._numeric(left, right, free if self.sites else None, pruned=self._pruned() if self.sites else None)
        return check if check.status == "failed" else self._decode(check, target, kernels)

    def _decode(self, check: Check, target: str, kernels: bool) -> Check:
        """The decode graph from an empty cache is the dense model."""
        count = min(int(self.probe.lengths[0]), 64)
        short = Probe(self.probe.input_ids[:1, :count], np.array([count], np.int32))
        dense = self.dense.clone()
        LastLogits()(dense)
        expected = run_onnx(dense, self.folder, short.feed(dense))
        decode = lower(insert_cache(self.dense, "decode"), target, kernels).model
        feed = {**self.empty(decode, count + 8, 1), "past_lengths": np.zeros(1, np.int32), **short.feed(decode)}
        gap = difference(
            {"logits": run_onnx(decode, self.folder, feed)["logits"]}, {"logits": expected["logits"]}, ATOL, RTOL
        )
        check.max_abs = max(check.max_abs or 0.0, gap.max_abs or 0.0)
        check.max_rel = max(check.max_rel or 0.0, gap.max_rel or 0.0)
        if not gap.ok:
            check.status, check.reason = "failed", f"decode graph and dense model: {gap.words}"
        return check

    def _result(self, step: Pass) -> PassResult:
        return next(r for p, r in zip(self.passes, self.results, strict=True) if p is step)

    def _selecting(self) -> Pass:
        return next(p for p, r in zip(self.passes, self.results, strict=True) if sites_of([r]))

    def _pruned(self) -> float:
        return 1.0 - float(np.mean(list(self.kept.values()))) if self.kept else 0.0

    def run(self, graph: ir.Model, hidden: str, feed: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        outputs = run_onnx(graph, self.folder, {**self.probe.feed(graph), **(feed or {})})
        outputs["hidden"] = self.probe.valid(outputs.pop(hidden))
        logits = find(self.dense).logits
        name = "logits" if "logits" in outputs or logits is None else str(logits.name)
        outputs["logits"] = outputs.pop(name)
        return outputs

    def outputs(self, graph: ir.Model) -> dict[str, np.ndarray]:
        """A graph's outputs on the probe."""
        return run_onnx(graph, self.folder, self.probe.feed(graph))

    def last(self, hidden: np.ndarray) -> np.ndarray:
        """The hidden state of each row's last valid token ``[B, 1, E]``."""
        return hidden[np.arange(len(hidden)), self.probe.lengths - 1][:, None]

    def _torch(self, run: TorchRun) -> dict[str, np.ndarray]:
        return {"hidden": self.probe.valid(run.hidden), "logits": run.logits}

    def empty(self, graph: ir.Model, capacity: int, batch: int | None = None) -> dict[str, np.ndarray]:
        """Empty caches of ``capacity`` slots for every ``past`` input of a graph."""
        rows = len(self.probe.lengths) if batch is None else batch
        caches = {}
        for value in graph.graph.inputs:
            if value.name and value.name.startswith("past.") and value.shape is not None:
                caches[value.name] = np.zeros((rows, int(value.shape[1]), capacity, int(value.shape[3])), np.float32)  # type: ignore[arg-type]
        return caches

    def _valid_cache(self, cache: np.ndarray) -> np.ndarray:
        rows = np.arange(cache.shape[2])[None, None, :, None] < self.probe.lengths[:, None, None, None]
        return np.where(rows, cache, 0.0).astype(np.float32)

    def _numeric(
        self,
        left: Mapping[str, np.ndarray],
        right: Mapping[str, np.ndarray],
        free: Disagreement | None = None,
        pruned: float | None = None,
    ) -> Check:
        return self.judge(_main(left) | {k: v for k, v in left.items() if k in right}, right, free, pruned)

    def judge(
        self,
        left: Mapping[str, np.ndarray],
        right: Mapping[str, np.ndarray],
        free: Disagreement | None = None,
        pruned: float | None = None,
        note: str = "",
        margin: float = MARGIN,
    ) -> Check:
        """The verdict on the numbers of two sides and their free choices; ``pruned`` of 0 proves nothing."""
        gap = difference(left, right, ATOL, RTOL)
        check = Check(
            status="passed" if gap.ok else "failed",
            max_abs=gap.max_abs,
            max_rel=gap.max_rel,
            tolerance=f"atol {ATOL:g}, rtol {RTOL:g}, {'x'.join(map(str, self.probe.input_ids.shape))} tokens",
            reason=note,
        )
        if not gap.ok:
            check.reason = gap.words
        if free is not None:
            check.flipped = free.share
            check.tolerance += f", free choices within {margin:g} of the cut"
            if free.worst > margin:
                flip = f"a flipped token lies {free.worst:.2e} from the cut"
                check.status, check.reason = "failed", f"{check.reason}; {flip}" if check.reason else flip
        if pruned is not None and pruned <= 0 and check.status == "passed":
            check.status, check.reason = (
                "not_run",
                "equal, but nothing was pruned: a proof needs a longer prompt or a larger coverage",
            )
        return check


def _main(outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: outputs[name] for name in ("hidden", "logits")}

"""The validation ladder of an encoder: torch or the given file = raised, twin = rewritten, rewritten = engine.

As for decoders (``trtpass.compare``), choices are compared twice: forced, where the numbers must agree, and freely,
where every token on which two sides disagree must lie within ``MARGIN`` of the cut.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from trtpass.anchors import find
from trtpass.compare import Difference, difference, run_onnx, session
from trtpass.encoder_choices import FORCED, MARGIN, SEEN, Flips, Selections, flips, force, reducing
from trtpass.encoder_inputs import Probe
from trtpass.errors import InputError
from trtpass.manifest import Check, Checks
from trtpass.passes import Pass, PassResult, Site
from trtpass.passes.lower import inline_bodies, lower
from trtpass.plans import TARGETS as PLANS
from trtpass.progress import Report, silent
from trtpass.variants import expose

RAISED = 1e-4  # absolute and relative: the same operators in another spelling
ATOL, RTOL = 1e-3, 1e-3  # float32, other kernels and orders of summing, through all blocks


@dataclass
class EncoderLadder:
    """The three checks of an encoder's engine folder, and what they need: ``dense`` and ``rewritten`` graphs (weights
    external, in ``folder``), the passes between them, the probe, the torch model and the ONNX file, where there are.
    """

    folder: Path
    dense: ir.Model
    rewritten: ir.Model
    passes: Sequence[Pass]
    results: Sequence[PassResult]
    probe: Probe
    module: Any | None
    original: Path | None
    saved: tuple[str, dict[str, np.ndarray]] | None = None  # who made the outputs that are kept beside the engine
    before: dict[int, int] = field(default_factory=dict)  # by layer of a site: tokens of the stream before it
    tokens: dict[int, int] = field(default_factory=dict)  # and after it, the most of all rows
    kept: dict[int, float] = field(default_factory=dict)  # what share of those before they are, the mean of all rows

    @property
    def sites(self) -> tuple[Site, ...]:
        return reducing(self.results)

    @property
    def outputs(self) -> list[str]:
        """Of the rewritten graph: those of the model, then those that passes add."""
        return [str(value.name) for value in self.rewritten.graph.outputs]

    def checks(self, target: str, report: Report = silent, kernels: bool = True, unbuilt: str = "") -> Checks:
        """All three; a plan that cannot run here, or could not be built (``unbuilt``), says so."""
        report("checking the model = raised ONNX", 0.50)
        export = self.export()
        report("checking twin = rewritten ONNX", 0.65)
        rewrite = self.rewrite()
        report("checking rewritten ONNX = engine", 0.80)
        return Checks(export=export, rewrite=rewrite, engine=self.engine(target, kernels, unbuilt))

    def export(self) -> Check:
        """A = B: the torch model, the given file, or both, and the raised graph: all outputs."""
        raised = run_onnx(self.dense, self.folder, self.probe.feed)
        sides: list[tuple[str, dict[str, np.ndarray]]] = []
        if self.original is not None:
            sides.append(("the given ONNX file", self._given(self.original)))
        if self.module is not None:
            sides.append(("torch", self._torch()))
        if not sides:
            return Check.not_run("there is neither a torch model nor an ONNX file")
        if not self.sites:
            self.saved = sides[-1]
        check: Check | None = None
        for name, outputs in sides:
            this = self._judge(raised, outputs, RAISED, RAISED, note=f"{name} = raised ONNX")
            if check is None or this.status == "failed":
                check = this
            elif check.status == "passed":
                check.reason = f"{check.reason}; {this.reason}"
                check.max_abs = max(check.max_abs or 0.0, this.max_abs or 0.0)
                check.max_rel = max(check.max_rel or 0.0, this.max_rel or 0.0)
        return check  # type: ignore[return-value]

    def _given(self, path: Path) -> dict[str, np.ndarray]:
        runner = session(path)
        names = [item.name for item in runner.get_outputs()]
        return dict(zip(names, runner.run(None, self.probe.feed), strict=True))

    def _torch(self) -> dict[str, np.ndarray]:
        """The torch model's outputs by the graph's names, or in its order."""
        import torch

        with torch.inference_mode():
            made = self.module(**{name: torch.from_numpy(array) for name, array in self.probe.feed.items()})  # type: ignore[misc]
        names = [str(value.name) for value in self.dense.graph.outputs]
        if isinstance(made, Mapping) and set(names) <= made.keys():
            return {name: made[name].numpy() for name in names}
        every = [made] if isinstance(made, torch.Tensor) else made.values() if isinstance(made, Mapping) else made
        return {n: v.numpy() for n, v in zip(names, (v for v in every if v is not None), strict=False)}

    def rewrite(self) -> Check:
        """D = C: the twin with the graph's choices forced, tight; its own choices, within the margin of the cut."""
        if not self.sites:
            return Check.not_run("no pass makes a stream shorter")
        outputs = self._reference
        chosen = self._choices(outputs)
        self._count(outputs)
        steps = [(p, r) for p, r in zip(self.passes, self.results, strict=True) if reducing([r])]
        if importlib.util.find_spec("torch") is None:
            return Check.not_run("torch, in which the references are written, is not installed")
        if self.module is None or len(steps) > 1:
            return self._sites_alone(steps, chosen)
        ((step, result),) = steps
        forced = {layer: {role: c[role] for role in FORCED if role in c} for layer, c in chosen.items()}
        try:
            run = step.twin(self.module, result).run(self.probe.feed, forced)
        except InputError as error:
            return Check.not_run(f"there is no twin: {error.found}")
        made = {name: outputs[name] for name in run.outputs}
        self.saved = ("torch", {**self._main(outputs), **run.outputs})
        return self._judge(made, run.outputs, ATOL, RTOL, free=flips(run.selections, chosen), reduced=True)

    def _sites_alone(self, steps: Sequence[tuple[Pass, PassResult]], chosen: Selections) -> Check:
        """Without a twin: each site against the definition, on the graph's own stream, queries and keys."""
        from trtpass.encoder_sites import site_inputs, sites_alone
        from trtpass.passes.stream_pass import StreamPass

        why = "there is no torch model" if self.module is None else "no twin follows several passes at once"
        methods = [(step, result) for step, result in steps if isinstance(step, StreamPass)]
        if len(methods) < len(steps):
            other = next(step.name for step, _ in steps if not isinstance(step, StreamPass))
            return Check.not_run(f"{why}, and pass '{other}' has no definition of a site alone")
        anchors = find(self.dense)
        inputs = [site_inputs(anchors, [site.layer for site in result.sites]) for _, result in methods]
        graph = self.rewritten.clone()
        expose(graph, sorted({name for sites in inputs for site in sites for name in site.names}))
        self._expose(graph)
        outputs = run_onnx(graph, self.folder, self.probe.feed)
        right, own = dict[str, np.ndarray](), dict[int, Mapping[str, np.ndarray]]()
        for (step, result), sites in zip(methods, inputs, strict=True):
            streams, choices = sites_alone(sites, step, result, outputs, chosen)
            right |= {f"layer {layer}": stream for layer, stream in streams.items()}
            own |= choices
        left = {f"layer {site.layer}": outputs[site.values["tokens"]] for site in self.sites}
        note = f"each site against its definition ({why})"
        return self._judge(left, right, ATOL, RTOL, note=note, free=flips(own, chosen), reduced=True)

    def engine(self, target: str, kernels: bool = True, unbuilt: str = "") -> Check:
        """C = E: the rewritten and the lowered graph, with C's choices forced; its free choices."""
        if target in PLANS:
            return self._plan(unbuilt)
        expected = self._reference
        chosen = self._choices(expected)
        graph = self.rewritten.clone()
        given = force(graph, self.sites)
        self._expose(graph)
        feed = {**self.probe.feed, **{name: chosen[layer][role] for name, (layer, role) in given.items()}}
        got = run_onnx(lower(graph, target, kernels).model, self.folder, feed)
        return self._judge(
            self._main(got), self._main(expected), ATOL, RTOL,
            free=flips(self._choices(got), chosen) if self.sites else None, reduced=bool(self.sites),
        )  # fmt: skip

    def _plan(self, unbuilt: str) -> Check:
        """What a CPU can say of a plan: its graph, static bodies in float32, must be the rewritten one."""
        graph = self.rewritten.clone()
        given = force(graph, self.sites)
        inline_bodies(graph, "static")
        chosen, expected = self._choices(self._reference), self._main(self._reference)
        feed = {**self.probe.feed, **{name: chosen[layer][role] for name, (layer, role) in given.items()}}
        made = run_onnx(graph, self.folder, feed)
        for name in made:  # a static body has room for all that shapes allow, a dynamic one for the most there are
            room = tuple(slice(min(sizes)) for sizes in zip(made[name].shape, expected[name].shape, strict=True))
            made[name], expected[name] = np.array(made[name][room]), np.array(expected[name][room])
        check = self._judge(
            made, expected, ATOL, RTOL, note="A plan's graph, in float32 on a CPU, and the rewritten one"
        )
        if check.status == "failed":
            return check
        why = (
            f"there is no plan, only the graphs that TensorRT would read: {unbuilt}"
            if unbuilt
            else "a plan executes on a GPU only, and none is executed while it is built"
        )
        return Check.not_run(f"{why}. {check.reason}: equal within {check.max_abs:.1e}")

    @cached_property
    def _reference(self) -> dict[str, np.ndarray]:
        """Outputs of the rewritten graph, what its sites chose, and the streams around them."""
        graph = self.rewritten.clone()
        self._expose(graph)
        return run_onnx(graph, self.folder, self.probe.feed)

    def _expose(self, graph: ir.Model) -> None:
        roles = (*SEEN, "tokens", "count")
        names = [site.values[role] for site in self.sites for role in roles if role in site.values]
        expose(graph, [*names, *self._before.values()])

    @cached_property
    def _before(self) -> dict[int, str]:
        """By layer of a site, the name of the stream that it shortens ``[B, S, E]``."""
        blocks = {block.layer: block.residual_out for block in find(self.dense).blocks}
        found = {site.layer: blocks.get(site.layer) for site in self.sites}
        return {layer: str(value.name) for layer, value in found.items() if value is not None}

    def _choices(self, outputs: Mapping[str, np.ndarray]) -> dict[int, dict[str, np.ndarray]]:
        """By layer and role, from the outputs of an exposed graph."""
        return {
            site.layer: {role: outputs[site.values[role]] for role in SEEN if role in site.values}
            for site in self.sites
        }

    def _count(self, outputs: Mapping[str, np.ndarray]) -> None:
        """Tokens after each site (the most of all rows), and what share of those before they are (the mean)."""
        for site in self.sites:
            source = site.values.get("score") or self._before[site.layer]
            before = self.before[site.layer] = outputs[source].shape[1]
            held = outputs[site.values["count"]] if "count" in site.values else outputs[site.values["tokens"]].shape[1]
            self.tokens[site.layer] = int(np.max(held))
            self.kept[site.layer] = float(np.mean(held)) / before

    def _main(self, outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: outputs[name] for name in self.outputs}

    def _judge(
        self,
        left: Mapping[str, np.ndarray],
        right: Mapping[str, np.ndarray],
        atol: float,
        rtol: float,
        note: str = "",
        free: Flips | None = None,
        reduced: bool = False,
    ) -> Check:
        """The verdict on the numbers of two sides and their free choices; a stream as long as before proves nothing."""
        gap: Difference = difference(left, right, atol, rtol)
        check = Check(
            status="passed" if gap.ok else "failed",
            max_abs=gap.max_abs,
            max_rel=gap.max_rel,
            tolerance=f"atol {atol:g}, rtol {rtol:g}, {self.probe.words()}",
            reason=note if gap.ok else f"{note}: {gap.words}" if note else gap.words,
        )
        if free is not None:
            check.flipped = free.share
            check.tolerance += f", free choices within {MARGIN:g} of the cut"
            if free.worst > MARGIN:
                flip = f"a flipped token lies {free.worst:.2e} of the scores' range from the cut"
                check.status, check.reason = "failed", f"{check.reason}; {flip}" if check.reason else flip
        if reduced and check.status == "passed" and all(share >= 1 for share in self.kept.values()):
            check.status, check.reason = "not_run", "equal, but no token was removed: a proof needs fewer tokens"
        return check

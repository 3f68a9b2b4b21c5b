"""Measure the quality frontier of KV policies, resumable, and write what was found."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtpass.errors import InputError
from trtpass.kvzap import oracle
from trtpass.kvzap.frontier import policies
from trtpass.kvzap.frontier.log import Log, opened
from trtpass.kvzap.frontier.masked import Read, ask, read
from trtpass.kvzap.frontier.output import write
from trtpass.kvzap.frontier.plan import FULL, SHORT, Plan, Prompt, calibration, describe, prompts
from trtpass.kvzap.frontier.summary import summary
from trtpass.progress import Report, silent
from trtpass.quality.plots import need

if TYPE_CHECKING:
    from torch import Tensor

    from trtpass.kvzap.surrogate import Surrogate

ORACLE, STATIC, DENSE = "kvzip+ oracle", "static", "dense"


@dataclass(frozen=True)
class Policy:
    """A name, the digest of the weights that it uses (empty for none), and its scores of a prompt."""

    name: str
    source: str
    score: Callable[[Read, Prompt], Tensor]


@dataclass(frozen=True)
class _Learned:
    surrogate: Surrogate
    digest: str


def frontier(
    model_name: str,
    out_folder: Path,
    short: bool = False,
    surrogates: Mapping[str, Path] | None = None,
    report: Report = silent,
    *,
    text: Path | None = None,
    plan: Plan | None = None,
    threads: int | None = None,
    minutes: float | None = None,
) -> dict[str, Any]:
    """Measure what each policy keeps of a model's quality at each fraction removed; write it into ``out_folder``.

    Every finished (prompt, policy) is a line of ``frontier.jsonl``; a later call with the same model, text and plan
    does only what is missing, so a surrogate may be added later.

    Args:
        short: one text and one pass key, one cut.
        surrogates: name for reports to a checkpoint of `trtpass.kvzap.surrogate`; None takes the linear weights that
            come with the model, if any.
        text: a text of one's own; its last quarter is measured, the rest calibrates.
        plan: what is measured, in place of the full or short form.
        threads: of torch; one is the fastest on a machine that others use too.
        minutes: begin nothing more after so many, and write what is there.

    Returns:
        What ``quality.json`` holds.

    Raises:
        InputError: no torch module or tokenizer for this model, a checkpoint of another model, a text or context that
            is too short, a folder that holds another run, or matplotlib is missing.
    """
    from graphs import resolve
    from trtpass.corpus import text_corpus
    from trtpass.kvzap.surrogate import Surrogate
    from trtpass.text import Tokenizer

    need()
    if surrogates is None:
        shipped = Surrogate.shipped(model_name)
        surrogates = {"kvzap-linear": shipped} if shipped else {}
    weights = {name: Surrogate.load(path) for name, path in surrogates.items()}
    learned = {name: _Learned(surrogate, _digest(surrogate)) for name, surrogate in weights.items()}
    loaded = resolve(model_name).load()
    module: Any = loaded.module
    if module is None or loaded.tokenizer is None:
        raise InputError(f"{model_name} has no torch module or no tokenizer", "a Hugging Face folder with both")
    config = module.config
    for name, item in learned.items():
        item.surrogate.need(
            config.num_hidden_layers, config.hidden_size, config.num_key_value_heads, f"{model_name} ({name})"
        )
    chosen = (plan or (SHORT if short else FULL)).fit(config.max_position_embeddings)
    content = text_corpus(text)
    tokenizer = Tokenizer(loaded.tokenizer.backend_tokenizer)
    asked = prompts(tokenizer, content, chosen)
    run = {
        "model": model_name,
        "text": hashlib.sha256(content.encode()).hexdigest(),
        "plan": describe(chosen),
        "window": policies.WINDOW,
        "sinks": policies.SINKS,
    }
    with opened(out_folder, run) as log, _threads(threads):
        measured = _Run(module, loaded.tokenizer, chosen, log, report, minutes)
        measured.calibrate(learned, calibration(tokenizer, content, chosen))
        measured.all(asked, learned)
        files = {name: {"file": Path(path).name, "sha256": learned[name].digest} for name, path in surrogates.items()}
        result = summary(log.lines, files, len(asked))
    report("writing", 0.99)
    write(out_folder, result)
    return result


class _Run:
    """One model and one log. Thresholds and `static` are in lines of the log too: they are measured once."""

    def __init__(
        self, module: Any, tokenizer: Any, plan: Plan, log: Log, report: Report, minutes: float | None
    ) -> None:
        self.end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.module, self.plan, self.log, self.report = module, plan, log, report
        self.prefix, _, self.bridge = oracle.prompt_parts(tokenizer, "x")
        self.thresholds: dict[str, dict[str, float | None]] = {}

    def calibrate(self, learned: Mapping[str, _Learned], contexts: Sequence[Sequence[int]]) -> None:
        """Mean oracle score of each head, and the thresholds of surrogates, on text that fitting reads."""
        import torch

        found = self.log.find(calibration=STATIC)
        if found is None:
            self.report("mean scores of heads", 0.0)
            means = [self._oracle(ids).log().mean(-1) for ids in contexts]
            found = self.log.add({"calibration": STATIC, "mean": torch.stack(means).mean(0).tolist()})
        self.mean = torch.tensor(found["mean"])  # [L, Hkv]
        missing = {n: p for n, p in learned.items() if not self.log.find(calibration=n, source=p.digest)}
        if missing:
            self.report("thresholds", 0.0)
            states = [read(self.module, ids).hidden for ids in contexts]
            for name, item in missing.items():
                scores = [item.surrogate.predict(hidden) for hidden in states]
                cuts = {str(cut): policies.threshold(scores, cut) for cut in self.plan.fixed}
                self.log.add({"calibration": name, "source": item.digest, "thresholds": cuts})
        for name, item in learned.items():
            self.thresholds[name] = (self.log.find(calibration=name, source=item.digest) or {})["thresholds"]

    def all(self, asked: Sequence[Prompt], learned: Mapping[str, _Learned]) -> None:
        """Every policy on every prompt that is not in the log, until the time is over."""
        chosen = self._policies(learned)
        whole, spent = sum(p.length for p in asked), 0
        for prompt in asked:
            missing = [p for p in chosen if not self.log.find(prompt=prompt.key, policy=p.name, source=p.source)]
            dense = self.log.find(prompt=prompt.key, policy=DENSE) is not None
            if time.monotonic() > self.end:
                return
            if missing or not dense:
                past = read(self.module, prompt.ids)
            if not dense:
                started = time.monotonic()
                self._add(prompt, DENSE, "", [{"cut": 0.0, **self._point(past, prompt, None)}], started)
            for policy in missing:
                if time.monotonic() > self.end:
                    return
                self.report(f"{prompt.task}, {prompt.length} tokens, {policy.name}", spent / whole)
                started = time.monotonic()
                points = self._points(past, prompt, policy)
                self._add(prompt, policy.name, policy.source, points, started)
            spent += prompt.length

    def _policies(self, learned: Mapping[str, _Learned]) -> list[Policy]:
        def surrogate(item: _Learned) -> Callable[[Read, Prompt], Tensor]:
            return lambda past, prompt: item.surrogate.predict(past.hidden)

        return [
            *(Policy(name, item.digest, surrogate(item)) for name, item in learned.items()),
            Policy(ORACLE, "", lambda past, prompt: self._oracle(prompt.ids)),
            Policy("snapkv", "", lambda past, prompt: policies.snapkv(past)),
            Policy(STATIC, "", lambda past, prompt: policies.static(past, self.mean)),
            Policy("streaming-llm", "", lambda past, prompt: policies.streaming(past)),
            Policy("knorm", "", lambda past, prompt: policies.knorm(past)),
            Policy("random", "", lambda past, prompt: policies.random(past, (prompt.length, prompt.number))),
        ]

    def _oracle(self, ids: Sequence[int]) -> Tensor:
        return oracle.scores(self.module, self.prefix, list(ids), self.bridge, states=()).score

    def _points(self, past: Read, prompt: Prompt, policy: Policy) -> list[dict[str, Any]]:
        score = policy.score(past, prompt)
        if tuple(score.shape) != past.shape:
            raise InputError(f"{policy.name} gives scores of shape {tuple(score.shape)}", f"{past.shape}")
        points = []
        for cut in self.plan.cuts:
            keep = policies.cut(score, cut)
            if keep is not None:
                heads = keep.float().mean(-1).flatten().tolist() if cut == self.plan.histogram else None
                points.append({"cut": cut, **self._point(past, prompt, keep), **({"heads": heads} if heads else {})})
        for name, value in self.thresholds.get(policy.name, {}).items():
            if value is not None:
                keep = policies.above(score, value)
                points.append({"cut": float(name), "threshold": value, **self._point(past, prompt, keep)})
        return points

    def _point(self, past: Read, prompt: Prompt, keep: Tensor | None) -> dict[str, Any]:
        point: dict[str, Any] = {"removed": 0.0 if keep is None else 1 - float(keep.double().mean())}
        for probe in prompt.probes:
            logs, exact = ask(self.module, past, keep, probe.ids, probe.first)
            point[probe.name] = {"mean": float(logs.double().mean()), "exact": bool(exact.all())}
        return point

    def _add(self, prompt: Prompt, name: str, source: str, points: list[dict[str, Any]], started: float) -> None:
        line = {"prompt": prompt.key, "task": prompt.task, "length": prompt.length, "policy": name, "source": source}
        self.log.add({**line, "points": points, "seconds": round(time.monotonic() - started, 2)})


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _digest(surrogate: Surrogate) -> str:
    """SHA-256 of the weights, whatever else the file says."""
    digest = hashlib.sha256()
    for name, array in sorted(surrogate.arrays().items()):
        digest.update(f"{name}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()

"""Dense against rewritten engines on one real Triton Inference Server: tokens a second, and how long clients wait.

Every engine is deployed as it is, but for its stop tokens, which are taken out of the copy: every answer then has the
same length on every side. Before anything is timed, answers of the server must be those of the runtime, token for
token; the same prompts are compared again in every timed round.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from trtpass.bench import serve_overhead
from trtpass.bench.measure import Machine
from trtpass.bench.record import Record
from trtpass.bench.serve_load import (
    CLIENTS,
    SETTLE,
    Prompt,
    Round,
    closed_loop,
    cores,
    median,
    model_name,
    need_same,
    paired,
    prompts,
)
from trtpass.corpus import text_corpus
from trtpass.deploy.plan import VERSION
from trtpass.deploy.repository import Request, deploy
from trtpass.errors import InputError
from trtpass.manifest import Manifest
from trtpass.runtime import Engine
from trtpass.server.install import installed
from trtpass.server.process import Server
from trtpass.serving.text_model import ENGINE_FOLDER
from trtpass.text import Tokenizer

NAMES = ("serve.throughput", "serve.latency", "serve.overhead")
MODEL = "smollm2-135m"
DENSE = "dense.cpu"
DEFAULT = (DENSE, "token-sparse.cpu", "kvzap.cpu")  # folders under engines/MODEL
BUILD = (
    f"make engine MODEL={MODEL} PASSES=none for the dense one; make engine MODEL={MODEL} (token-sparse) or "
    f"make engine MODEL={MODEL} PASSES=kvzap for a rewritten one"
)
BASELINE = "the dense engine on the same server, the same requests from as many clients"


@dataclass(frozen=True)
class Plan:
    """What is sent.

    Args:
        clients: how many at once.
        requests: of one round of each of those.
        lengths: tokens of the prompts, in turn.
        new_tokens: of each answer.
        rounds: most rounds over all sides.
        overhead: of the comparison with the bare runtime.
    """

    clients: tuple[int, ...] = (1, 4, 16)
    requests: tuple[int, ...] = (4, 8, 16)
    lengths: tuple[int, ...] = (64, 1200, 128, 256)
    new_tokens: int = 32
    rounds: int = 3
    overhead: serve_overhead.Plan = field(default_factory=serve_overhead.Plan)


@dataclass(frozen=True)
class Side:
    """An engine as a model of the server, and what the runtime answers to some prompts."""

    model: str
    expected: Mapping[int, tuple[int, ...]]


def run(
    names: Sequence[str], folders: Sequence[Path], machine: Machine, repeats: int, note: Callable[[str], None],
    plan: Plan = Plan(),
) -> list[Record]:  # fmt: skip
    """The benchmarks in ``names``, of ``NAMES``, on the engines in ``folders``, the first of which is dense.

    Raises:
        InputError: no server is installed, engines of different models, or prompts that an engine cannot take.
        CheckFailed: the server's answers are not the runtime's.
    """
    if machine.clock != "wall":
        raise InputError("a server timed by this process's clock", "--clock wall: the server is another process")
    loads = bool({"serve.throughput", "serve.latency"} & set(names))
    used = folders if loads else folders[:1]
    _check(used)
    tokenizer, text = Tokenizer.open(folders[0]), text_corpus()
    mixed = prompts(tokenizer, text, plan.lengths, max(plan.requests))
    equal = prompts(tokenizer, text, plan.overhead.lengths, plan.overhead.clients)
    records: list[Record] = []
    note(f"{', '.join(names)}: deploying {', '.join(map(str, used))}")
    with served(used, plan, [*mixed, *equal], machine.threads) as server:
        if loads:
            sides = [_side(server, folder, mixed, plan, machine.threads, note) for folder in used]
            records += [r for r in _loads(server, sides, mixed, plan, machine, repeats, note) if r.name in names]
        if "serve.overhead" in names:
            note(f"serve.overhead: {used[0]}")
            records += serve_overhead.run(server, used[0], equal, plan.overhead, machine, repeats)
    return records


@contextmanager
def served(folders: Sequence[Path], plan: Plan, given: Sequence[Prompt], threads: int) -> Iterator[Server]:
    """A server of all these engines, without their stop tokens, in a repository that goes with it.

    Args:
        folders: of the engines; their names are those of the models.
        plan: what they have to take on.
        given: all prompts.
        threads: of an operator.
    """
    installed()
    rows = max(*plan.clients, plan.overhead.clients)
    with tempfile.TemporaryDirectory(prefix="trtpass-bench-") as scratch:
        for folder in folders:
            deploy(
                Request(
                    folder, Path(scratch), model_name(folder), rows=rows, queue=rows, threads=threads,
                    prompt_tokens=max(len(prompt.ids) for prompt in given),
                    new_tokens=max(plan.new_tokens, plan.overhead.new_tokens),
                )
            )  # fmt: skip
            inside = Path(scratch, model_name(folder), VERSION, ENGINE_FOLDER)
            Manifest.read(inside).model_copy(update={"stop_ids": []}).write(inside)
        with Server(scratch) as server:
            yield server


def find(folders: Sequence[Path], root: Path) -> list[Path]:
    """The engines to compare, the dense one first.

    Args:
        folders: those that were asked for; none means those of ``DEFAULT`` that are there.
        root: folder of all engines.

    Raises:
        InputError: there is no dense engine beside them, or nothing to compare it with.
    """
    asked = list(folders) or [root / MODEL / name for name in DEFAULT if (root / MODEL / name).is_dir()]
    manifests = {folder: Manifest.read(folder) for folder in asked}
    dense = [folder for folder, manifest in manifests.items() if not manifest.passes]
    others = [folder for folder in asked if folder not in dense]
    if not dense and others and (others[0].parent / DENSE).is_dir():
        dense = [others[0].parent / DENSE]
    if not dense or not others:
        raise InputError(
            f"{'no dense engine' if not dense else 'no rewritten engine'} among {_listed(asked)}",
            "the folders of a dense and a rewritten engine",
            BUILD,
        )
    return [dense[0], *others]


def _listed(folders: Sequence[Path]) -> str:
    return ", ".join(map(str, folders)) or "none: there are no engines"


def _check(folders: Sequence[Path]) -> None:
    models = [Manifest.read(folder).model for folder in folders]
    if len(set(models)) > 1:
        raise InputError(f"engines of {' and '.join(dict.fromkeys(models))}", "engines of one model")
    labels = [model_name(folder) for folder in folders]
    if len(set(labels)) < len(labels):
        raise InputError(f"folders named {', '.join(labels)}", "different names, by which the server knows the models")


def _side(
    server: Server, folder: Path, given: Sequence[Prompt], plan: Plan, threads: int, note: Callable[[str], None]
) -> Side:
    """An engine whose server has answered the shortest and the longest prompt as the runtime does.

    Raises:
        CheckFailed: it has not.
    """
    note(f"serve: {folder}: the server's answers against the runtime's")
    engine = Engine.open(folder, "cpu", threads, Manifest.read(folder).context)
    sizes = [len(prompt.ids) for prompt in given[: min(plan.requests)]]
    expected = {}
    for number in sorted({int(np.argmin(sizes)), int(np.argmax(sizes))}):
        steps = engine.generate([given[number].ids], plan.new_tokens)
        expected[number] = tuple(step.tokens[0] or 0 for step in steps)
    side = Side(model_name(folder), expected)
    _ask(server, side, given, len(expected), plan.new_tokens, list(expected))
    return side


def _ask(
    server: Server, side: Side, given: Sequence[Prompt], clients: int, new_tokens: int, numbers: Sequence[int]
) -> Round:
    """A closed loop whose answers are the expected ones, where one is known."""
    made = closed_loop(server, side.model, given, clients, new_tokens, numbers)
    for answer in made.answers:
        need_same(f"{side.model}, prompt {answer.prompt}", answer.tokens, side.expected.get(answer.prompt))
    return made


def _loads(
    server: Server, sides: Sequence[Side], given: Sequence[Prompt], plan: Plan, machine: Machine, repeats: int,
    note: Callable[[str], None],
) -> list[Record]:  # fmt: skip
    """Rounds over all sides and numbers of clients; which side comes first changes."""
    rounds = min(plan.rounds, repeats)
    made: dict[tuple[int, str], list[Round]] = {}
    for turn in range(rounds):
        note(f"serve: round {turn + 1} of {rounds}")
        for clients, requests in zip(plan.clients, plan.requests, strict=True):
            for side in [*sides[turn % len(sides) :], *sides[: turn % len(sides)]]:
                time.sleep(SETTLE)
                one = _ask(server, side, given, clients, plan.new_tokens, range(requests))
                made.setdefault((clients, side.model), []).append(one)
    records = []
    for clients, requests in zip(plan.clients, plan.requests, strict=True):
        base = made[clients, sides[0].model]
        read = sum(len(prompt.ids) for prompt in given[:requests])
        for side in sides:
            load = {"requests": requests, "prompt tokens": list(plan.lengths), "new tokens": plan.new_tokens,
                    "rounds": rounds, "clients are": CLIENTS}  # fmt: skip
            params = {"engine": side.model, "clients": clients, "load": load}
            ours = made[clients, side.model]
            records += _records(params, read, ours, None if side is sides[0] else base, machine)
    return records


def _records(
    params: dict[str, Any], read: int, ours: Sequence[Round], base: Sequence[Round] | None, machine: Machine
) -> list[Record]:
    """One of tokens a second, four of latency. ``read``: tokens of all prompts; ``base``: dense, None for itself."""

    def record(name: str, more: dict[str, Any], unit: str, get: Callable[[Round], float], rate: bool) -> Record:
        mine = np.array([get(one) for one in ours])
        if base is None:
            alone = (median(mine), None, None, None, None, None, machine.as_dict())
            return Record(name, {**params, **more}, "none: it is the baseline", unit, *alone)
        theirs = np.array([get(one) for one in base])
        return paired(name, {**params, **more}, BASELINE, unit, mine, theirs, rate, None, machine)

    extra = {
        "total tokens/s": round(float(np.median([(read + one.tokens) / one.seconds for one in ours])), 1),
        "requests/s": round(float(np.median([len(one.answers) / one.seconds for one in ours])), 3),
        "cores": cores(ours),
    }
    made = [record("serve.throughput", extra, "tokens/s", lambda one: one.tokens / one.seconds, True)]
    for what, words in (("first", "first token"), ("gaps", "next token")):
        for percent in (50, 99):
            more = {"wait for": words, "percentile": percent}
            made.append(record("serve.latency", more, "ms", partial(Round.quantile, what=what, percent=percent), False))
    return made

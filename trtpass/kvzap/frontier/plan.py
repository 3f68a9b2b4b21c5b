"""How much is measured, and the prompts of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trtpass.errors import InputError
from trtpass.kvzap.oracle import INSTRUCTION
from trtpass.quality.tasks import QUESTION, Encoder, continuations, passkeys

FIT, TEST = 0.70, 0.75  # shares of the corpus: what fitting reads ends at FIT, what is measured here begins at TEST


@dataclass(frozen=True)
class Plan:
    """What one run measures. Lengths are in tokens.

    Args:
        cuts: fractions of all context keys that are removed.
        fixed: the cuts for which thresholds fixed on other text are measured too.
        texts, passkeys: ``(context length, prompts)``.
        continuation: tokens of the continuation, of which all but the first are scored.
        repeat: tokens of the repeated text, from the beginning of the context.
        calibration: lengths of the contexts, of text that fitting reads, on which thresholds and `static` are fixed.
    """

    cuts: tuple[float, ...]
    fixed: tuple[float, ...]
    texts: tuple[tuple[int, int], ...]
    passkeys: tuple[tuple[int, int], ...]
    continuation: int = 200
    repeat: int = 128
    calibration: tuple[int, ...] = (1000, 2000)

    @property
    def histogram(self) -> float:
        """The cut at which the kept fraction of each head is recorded."""
        return min(self.cuts, key=lambda cut: abs(cut - 0.75))

    def fit(self, context: int) -> Plan:
        """The plan without lengths that a model of ``context`` positions cannot hold.

        Raises:
            InputError: nothing is left.
        """
        spare = max(self.continuation, self.repeat + 64)
        least = min(n for n, _ in (*self.texts, *self.passkeys)) + spare
        if context < least:
            raise InputError(f"a context of {context} tokens", f"at least {least}, the shortest quality check")

        def held(sizes: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
            return tuple((length, n) for length, n in sizes if length + spare <= context)

        return replace(self, texts=held(self.texts), passkeys=held(self.passkeys))


FULL = Plan(
    cuts=(0.40, 0.60, 0.75, 0.85, 0.90),
    fixed=(0.75, 0.85),
    texts=((1000, 6), (2000, 6), (4000, 4), (7000, 3)),
    passkeys=((1000, 8), (2000, 8), (4000, 4), (7000, 3)),
)
SHORT = Plan(
    cuts=(0.50,),
    fixed=(0.50,),
    texts=((350, 1),),
    passkeys=((350, 1),),
    continuation=64,
    repeat=48,
    calibration=(350,),
)


@dataclass(frozen=True)
class Probe:
    """Tokens that follow a context, scored from ``first`` on."""

    name: str
    ids: tuple[int, ...]
    first: int


@dataclass(frozen=True)
class Prompt:
    """A context that is read once, and what is asked after it. ``key``: task/length/number."""

    task: str
    length: int
    number: int
    ids: tuple[int, ...]
    probes: tuple[Probe, ...]

    @property
    def key(self) -> str:
        return f"{self.task}/{self.length}/{self.number}"


def prompts(tokenizer: Encoder, text: str, plan: Plan) -> list[Prompt]:
    """Every prompt, in an order in which a run that is cut short has done about the same share of each length.

    Raises:
        InputError: a text that is too short, or a length too short for a pass key.
    """
    groups = [*_texts(tokenizer, text[int(TEST * len(text)) :], plan)]
    question = tokenizer.encode(QUESTION, special=False)
    for length, count in plan.passkeys:
        group = []
        for i, sample in enumerate(passkeys(tokenizer, length, count)):
            whole = [*sample.prompt.tolist(), *sample.target.tolist()]
            context = len(sample.prompt) - len(question)  # the question comes after eviction
            probe = Probe("passkey", tuple(whole[context:]), len(question))
            group.append(Prompt("passkey", length, i, tuple(whole[:context]), (probe,)))
        groups.append(group)
    placed = [((prompt.number + 0.5) / len(group), prompt) for group in groups for prompt in group]
    return [prompt for _, prompt in sorted(placed, key=lambda pair: pair[0])]


def calibration(tokenizer: Encoder, text: str, plan: Plan) -> list[list[int]]:
    """Contexts of the text that fitting reads, one of each length.

    Raises:
        InputError: a text that is too short.
    """
    tokens = tokenizer.encode(text[: int(FIT * len(text))], special=False)
    longest = max(plan.calibration)
    samples = continuations(tokens, longest, len(plan.calibration), 1, longest)
    return [s.prompt[:n].tolist() for s, n in zip(samples, plan.calibration, strict=True)]


def _texts(tokenizer: Encoder, text: str, plan: Plan) -> Iterator[list[Prompt]]:
    if not plan.texts:
        return
    tokens = tokenizer.encode(text, special=False)
    bridge = tokenizer.encode(f"{INSTRUCTION}\n\n", special=False)
    longest = max(length for length, _ in plan.texts)
    for length, count in plan.texts:
        group = []
        for i, sample in enumerate(continuations(tokens, length, count, plan.continuation, longest)):
            ids = tuple(sample.prompt.tolist())
            again = Probe("repeat", (*bridge, *ids[: plan.repeat]), len(bridge))
            after = Probe("continuation", tuple(sample.target.tolist()), 1)
            group.append(Prompt("text", length, i, ids, (again, after)))
        yield group


def describe(plan: Plan) -> dict[str, Any]:
    """The plan as JSON, lists for tuples."""
    return {name: _plain(value) for name, value in vars(plan).items()}


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, Sequence) else value

"""The two tasks: find a pass key in a long prompt, and predict how a text goes on after a long context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from trtpass.errors import InputError
from trtpass.quality.plan import Plan, spread

# The prompt of the pass-key task of Mohtashami and Jaggi (2023, arXiv 2305.16300), as plain text: the chat form of a
# small model is less reliable.
_INTRO = "There is important information hidden inside a lot of irrelevant text. Find it and memorize it.\n"
_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
_NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "What is the pass key? The pass key is"


class Encoder(Protocol):
    """What the tasks need of a tokenizer."""

    def encode(self, text: str, special: bool = True) -> list[int]: ...


@dataclass(frozen=True)
class Sample:
    """A prompt ``[S]`` int64, the tokens that should follow it ``[T]`` int64, and a label for reports."""

    prompt: np.ndarray
    target: np.ndarray
    label: str

    @property
    def cost(self) -> float:
        """A measure of the time to read the prompt: linear for the MLP, quadratic for attention."""
        return self.prompt.size * (1 + self.prompt.size / 4096)


@dataclass(frozen=True)
class Tasks:
    """Samples by prompt length, and the prompt ``bound [S]`` on which the local error is measured."""

    passkey: dict[int, list[Sample]]
    documents: dict[int, list[Sample]]
    bound: np.ndarray = field(repr=False)

    @staticmethod
    def make(tokenizer: Encoder, text: str, plan: Plan) -> Tasks:
        """All samples of a plan.

        Raises:
            InputError: the text is too short for it, or a length is too short for a pass key.
        """
        tokens = tokenizer.encode(text, special=False)
        longest = max(plan.bound_tokens, *(length for length, _ in plan.documents))
        documents = {
            length: continuations(tokens, length, n, plan.continuation, longest) for length, n in plan.documents
        }
        (bound,) = continuations(tokens, plan.bound_tokens, 1, plan.continuation, longest)
        return Tasks({length: passkeys(tokenizer, length, n) for length, n in plan.passkey}, documents, bound.prompt)

    def without_longest(self) -> Tasks:
        """The tasks without the longest prompts of each kind, unless there is one length only."""

        def cut(samples: dict[int, list[Sample]]) -> dict[int, list[Sample]]:
            return {n: s for n, s in samples.items() if n < max(samples) or len(samples) == 1}

        return Tasks(cut(self.passkey), cut(self.documents), self.bound)

    def all(self) -> Iterator[tuple[str, int, list[Sample]]]:
        """``("passkey" or "text", length, samples)`` of every length."""
        for kind, groups in (("passkey", self.passkey), ("text", self.documents)):
            for length, samples in groups.items():
                yield kind, length, samples

    @property
    def cost(self) -> float:
        """A measure of the time that all prompts take."""
        return sum(sample.cost for _, _, samples in self.all() for sample in samples)


def passkeys(tokenizer: Encoder, length: int, count: int, seed: int = 0) -> list[Sample]:
    """``count`` prompts of at most ``length`` tokens, shorter by less than one filler line; seeded keys, even depths.

    Raises:
        InputError: ``length`` is too short for the key and the question.
    """
    rng = np.random.default_rng([seed, length])
    intro, filler = tokenizer.encode(_INTRO), tokenizer.encode(_FILLER, special=False)
    question = tokenizer.encode(QUESTION, special=False)
    samples = []
    for i in range(count):
        key, depth = int(rng.integers(10_000, 100_000)), (i + 0.5) / count
        needle = tokenizer.encode(_NEEDLE.format(key=key), special=False)
        answer = tokenizer.encode(f"{QUESTION} {key}", special=False)
        lines = (length - len(intro) - len(needle) - len(question)) // len(filler)
        if lines < 1:
            raise InputError(
                f"pass-key prompts of {length} tokens", "room for a line of filler, the key and the question"
            )
        if answer[: len(question)] != question:
            raise InputError("the tokenizer joins the question and the key to one token", "a boundary between them")
        before = round(depth * lines)
        prompt = [*intro, *filler * before, *needle, *filler * (lines - before), *question]
        samples.append(Sample(_ids(prompt), _ids(answer[len(question) :]), f"key {key} at depth {depth:.2f}"))
    return samples


def continuations(tokens: Sequence[int], length: int, count: int, after: int, longest: int) -> list[Sample]:
    """``count`` places of a text: ``length`` tokens of context and the ``after`` tokens that follow.

    The scored tokens are the same for every ``length`` up to ``longest``: document i of a short context is document i
    of a long one, cut on the left.

    Raises:
        InputError: the text is too short.
    """
    room = len(tokens) - longest - after
    if room < count:
        raise InputError(
            f"the text has {len(tokens)} tokens",
            f"more than {longest + after + count}",
            "give a longer one with --text",
        )
    starts = [longest + place for place in spread(count, room)]
    return [
        Sample(_ids(tokens[s - length : s]), _ids(tokens[s : s + after]), f"tokens {s - length} to {s + after}")
        for s in starts
    ]


def _ids(tokens: Sequence[int]) -> np.ndarray:
    return np.asarray(tokens, np.int64)

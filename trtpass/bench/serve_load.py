"""A closed loop of clients against a server: each sends its next request when its last answer is whole.

The clients are threads of this process, which is idle otherwise: they take processor time from the server, as clients
on the same machine do, and how much is measured too.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trtpass.bench.measure import Array, Machine
from trtpass.bench.record import Record
from trtpass.errors import CheckFailed, InputError
from trtpass.server import client
from trtpass.server.process import Server
from trtpass.text import Tokenizer

START = 20_000  # characters of the corpus that are left out: its head matter
CHARACTERS = 12  # of the corpus for each token that is wanted, more than enough
SETTLE = 0.1  # seconds before a side's turn: threads of the one before spin for some milliseconds, on the same cores
CLIENTS = "threads of one process on the same machine, over gRPC"
ALL = "length"  # how an answer ends that has all the tokens that were asked for


@dataclass(frozen=True)
class Prompt:
    """A text and its token ids."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Timed:
    """One answer.

    Args:
        prompt: number of its prompt.
        tokens: token ids.
        first: seconds from the request to its first token.
        gaps: seconds between tokens.
    """

    prompt: int
    tokens: tuple[int, ...]
    first: float
    gaps: tuple[float, ...]


@dataclass(frozen=True)
class Round:
    """All answers of a closed loop.

    Args:
        seconds: from the first request to the end of the last answer.
        answers: in the order in which clients had them.
        busy: processor seconds of the model's process, the server's, the clients', and of all else on the machine,
            which should be none.
    """

    seconds: float
    answers: tuple[Timed, ...]
    busy: dict[str, float]

    @property
    def tokens(self) -> int:
        """Tokens of all answers."""
        return sum(len(answer.tokens) for answer in self.answers)

    def quantile(self, what: str, percent: float) -> float:
        """Milliseconds to the first token (``first``), or between two tokens (``gaps``)."""
        seconds = [np.atleast_1d(getattr(answer, what)) for answer in self.answers]
        return 1e3 * float(np.percentile(np.concatenate(seconds), percent))


def model_name(folder: Path) -> str:
    """What an engine is called on the server: its folder's name, as far as a model can have it."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", folder.absolute().name)[:64].strip("-._")


def prompts(tokenizer: Tokenizer, text: str, lengths: Sequence[int], count: int) -> list[Prompt]:
    """Texts one after the other in ``text``, of about ``lengths`` tokens in turn: a cut may change a token or two.

    Raises:
        InputError: the text is too short.
    """
    wanted = [lengths[i % len(lengths)] for i in range(count)]
    ids = tokenizer.encode(text[START : START + CHARACTERS * sum(wanted)], special=False)
    if len(ids) < sum(wanted):
        raise InputError(f"the text has {len(ids)} tokens", f"at least {sum(wanted)}")
    ends = np.cumsum(wanted).tolist()
    pieces = [tokenizer.decode(ids[end - length : end]) for end, length in zip(ends, wanted, strict=True)]
    return [Prompt(piece, tuple(tokenizer.encode(piece))) for piece in pieces]


def closed_loop(
    server: Server, model: str, given: Sequence[Prompt], clients: int, new_tokens: int, numbers: Sequence[int]
) -> Round:
    """Send some prompts from so many clients, each over a stream of its own.

    Args:
        server: a running one.
        model: of its repository.
        given: all prompts.
        clients: how many take the next prompt as soon as they have an answer.
        new_tokens: tokens of every answer; the model must not stop earlier.
        numbers: which prompts, in this order.

    Raises:
        CheckFailed: an answer has not as many tokens.
        InputError: the server refuses a request, or goes away.
    """
    left = deque(numbers)  # its pops are atomic

    def loop() -> list[Timed]:
        made: list[Timed] = []
        while True:
            try:
                number = left.popleft()
            except IndexError:
                return made
            made.append(_ask(server.grpc, model, number, given[number].text, new_tokens))

    before, start = _busy(server, model), time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        waiting = [pool.submit(loop) for _ in range(clients)]
        answers = [answer for future in waiting for answer in future.result()]
    seconds, after = time.perf_counter() - start, _busy(server, model)
    return Round(seconds, tuple(answers), {name: after[name] - before[name] for name in after})


def _ask(address: str, model: str, number: int, text: str, new_tokens: int) -> Timed:
    start = time.perf_counter()
    tokens: list[int] = []
    times: list[float] = []
    finish = ""
    for piece in client.stream_grpc(address, model, text, max_tokens=new_tokens):
        now = time.perf_counter()
        tokens += piece.tokens
        times += [now] * len(piece.tokens)
        finish = piece.finish
    if len(tokens) != new_tokens or finish != ALL:
        raise CheckFailed(
            f"{model}: an answer of {len(tokens)} tokens that ends with '{finish}'",
            f"{new_tokens} tokens and '{ALL}'",
            "no speed is reported for answers that are not whole",
        )
    return Timed(number, tuple(tokens), times[0] - start, tuple(np.diff(times).tolist()))


def _busy(server: Server, model: str) -> dict[str, float]:
    """Processor seconds so far, user and system."""
    import psutil

    folder = str(server.repository / model / "1")
    parent = psutil.Process(server.pid)
    models = [child for child in parent.children() if any(folder in word for word in child.cmdline())]
    busy = {"model": _seconds(models), "server": _seconds([parent]), "clients": _seconds([psutil.Process()])}
    whole = psutil.cpu_times()
    return {**busy, "others": sum(whole) - whole.idle - getattr(whole, "iowait", 0.0) - sum(busy.values())}


def _seconds(processes: Sequence[Any]) -> float:
    times = [process.cpu_times() for process in processes]
    return float(sum(spent.user + spent.system for spent in times))


def need_same(what: str, got: tuple[int, ...], expected: tuple[int, ...] | None) -> None:
    """Raises CheckFailed unless an answer is the expected one, where one is known."""
    if expected is not None and got != expected:
        at = next(
            (i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), min(map(len, (got, expected)))
        )
        raise CheckFailed(
            f"{what}: token {at} of the answer is {list(got[at : at + 1])}",
            f"{list(expected[at : at + 1])}, as the runtime has it",
            "no speed is reported for wrong answers; run trtpass validate --url, and the tests marked server",
        )


def paired(
    name: str, params: dict[str, Any], baseline: str, unit: str, ours: Array, theirs: Array, rate: bool,
    limit: float | None, machine: Machine,
) -> Record:  # fmt: skip
    """A record of paired rates or times ``[rounds]``, of which larger (``rate``) or smaller is better."""
    ratios = ours / theirs if rate else theirs / ours
    return Record(
        name, params, baseline, unit, median(ours), median(theirs), median(ratios), round(float(ratios.min()), 4),
        round(float(ratios.max()), 4), limit, machine.as_dict(),
    )  # fmt: skip


def median(values: Array) -> float:
    return round(float(np.median(values)), 4)


def cores(rounds: Sequence[Round]) -> dict[str, float]:
    """Cores that each process kept busy, medians over rounds."""
    return {
        name: round(float(np.median([one.busy[name] / one.seconds for one in rounds])), 3) for name in rounds[0].busy
    }

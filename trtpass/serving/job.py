"""A request on its way through the scheduler, and the checks before it gets there."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from trtpass.errors import InputError
from trtpass.sampling import RowSampler
from trtpass.serving.request import Limits, Listener, OverLimit, Request
from trtpass.text import AnswerText, Tokenizer


@dataclass(eq=False)
class Job:
    """A request that was taken, until its end."""

    request: Request
    listener: Listener
    text: AnswerText
    sampler: RowSampler
    submitted: float  # of time.monotonic
    row: int = -1  # of the batch, while it runs
    paused: Any = None  # what the batch gave for the row, while it is paused
    token: int = 0  # chosen, and not in the cache yet
    made: int = 0  # tokens chosen
    kept: float = 1.0  # share of its tokens that the cache held when this was last asked
    ended: bool = False

    @classmethod
    def of(
        cls, request: Request, listener: Listener, tokenizer: Tokenizer, stop_ids: frozenset[int], limits: Limits,
        capacity: int,
    ) -> Job:  # fmt: skip
        """Check a request (all but its token ids, which the engine checks) and make ready what it needs.

        Args:
            capacity: tokens that a row may have. An answer may be asked for that is longer: it ends with ``context``.

        Raises:
            OverLimit: the prompt or the answer is longer than the limits allow.
            InputError: a value is not in its range.
        """
        count, longest = len(request.prompt), min(limits.prompt_tokens, capacity)
        if not count:
            raise InputError("a prompt without tokens", "at least one token")
        if count > longest:
            raise OverLimit(f"a prompt of {count} tokens", f"at most {longest}", "shorten the prompt")
        if request.max_tokens > limits.new_tokens:
            raise OverLimit(f"max_tokens={request.max_tokens}", f"at most {limits.new_tokens}", "ask for fewer")
        text = AnswerText(tokenizer, request.stop)
        sampler = RowSampler(
            request.max_tokens, stop_ids, request.temperature, request.seed, top_p=request.top_p, ends=text.push
        )
        return cls(request, listener, text, sampler, time.monotonic())

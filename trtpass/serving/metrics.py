"""What a deployed model counts, on the server's metrics port in Prometheus' form. Seconds are of wall-clock time.

``TEXT`` and ``ARRAYS`` say which metrics there are; the dashboard of ``trtpass deploy`` is made from them too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trtpass.serving.observer import Observer


@dataclass(frozen=True)
class Family:
    """A metric: its kind, what it says, a label of its own with all its values, bounds of a histogram's buckets."""

    kind: Literal["counter", "gauge", "histogram"]
    about: str
    label: str = ""
    values: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_WAITS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_STEPS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)

TEXT: dict[str, Family] = {
    "trtpass_prefill_tokens_total": Family("counter", "Tokens of prompts that were read"),
    "trtpass_decode_tokens_total": Family("counter", "Tokens that decode steps made"),
    "trtpass_requests_total": Family(
        "counter", "Requests that ended, by how", "finish",
        ("stop", "length", "context", "cache", "cancelled", "failed"),
    ),
    "trtpass_refused_total": Family(
        "counter", "Requests that were not taken, by why", "reason", ("queue", "limit", "input", "closing")
    ),
    "trtpass_paused_total": Family("counter", "Rows that gave up their pages for others, for a while"),
    "trtpass_pages_in_use": Family("gauge", "Pages of the cache in use, all layers together"),
    "trtpass_pages": Family("gauge", "Pages of the cache that there are, all layers together"),
    "trtpass_cache_bytes": Family("gauge", "Bytes of keys and values that the running rows hold"),
    "trtpass_kept_fraction": Family("gauge", "Share of their tokens that the running rows' cache holds"),
    "trtpass_rows_running": Family("gauge", "Requests that are being decoded"),
    "trtpass_requests_waiting": Family("gauge", "Requests that wait for a row"),
    "trtpass_queue_seconds": Family("histogram", "Wait of a request for a row", buckets=_WAITS),
    "trtpass_time_to_first_token_seconds": Family(
        "histogram", "From a request to its first token", buckets=_WAITS
    ),
    "trtpass_time_per_output_token_seconds": Family(
        "histogram", "One decode step, which makes a token of every running row", buckets=_STEPS
    ),
}  # fmt: skip
ARRAYS: dict[str, Family] = {
    "trtpass_array_rows_total": Family("counter", "Rows of a batch that were computed"),
    "trtpass_array_failed_total": Family("counter", "Requests that were answered with an error"),
    "trtpass_array_run_seconds": Family("histogram", "One run of the graph, of one or more requests", buckets=_WAITS),
}


class Metrics:
    """The metrics of one model in one server. A call costs some 20 microseconds, since the server is another process.

    Args:
        pb: the server's Python module.
        families: what there is.
        model: value of the label ``model``.
    """

    def __init__(self, pb: Any, families: Mapping[str, Family], model: str) -> None:
        self._families: list[Any] = []  # a family must live as long as its metrics
        self._metrics: dict[tuple[str, str], Any] = {}
        self._last: dict[str, float] = {}
        for name, family in families.items():
            made = pb.MetricFamily(
                name=name, description=family.about, kind=getattr(pb.MetricFamily, family.kind.upper())
            )
            self._families.append(made)
            for value in family.values or ("",):
                labels = {"model": model, **({family.label: value} if family.label else {})}
                extra = {"buckets": list(family.buckets)} if family.buckets else {}
                self._metrics[name, value] = made.Metric(labels=labels, **extra)

    def add(self, name: str, amount: float = 1, value: str = "") -> None:
        """Raise a counter; ``value`` is that of its own label."""
        self._metrics[name, value].increment(amount)

    def put(self, name: str, number: float) -> None:
        """Set a gauge; nothing is sent where it is the same as before."""
        if self._last.get(name) != number:
            self._metrics[name, ""].set(number)
            self._last[name] = number

    def observe(self, name: str, seconds: float) -> None:
        """Add to a histogram."""
        self._metrics[name, ""].observe(seconds)


class TextMetrics(Observer):
    """The observer of a scheduler that counts in the server's metrics."""

    def __init__(self, pb: Any, model: str) -> None:
        self._to = Metrics(pb, TEXT, model)

    def refused(self, reason: str) -> None:
        self._to.add("trtpass_refused_total", value=reason)

    def started(self, queue_seconds: float, prompt_tokens: int) -> None:
        self._to.observe("trtpass_queue_seconds", queue_seconds)
        self._to.add("trtpass_prefill_tokens_total", prompt_tokens)

    def first_token(self, seconds: float) -> None:
        self._to.observe("trtpass_time_to_first_token_seconds", seconds)

    def stepped(self, tokens: int, seconds: float) -> None:
        self._to.add("trtpass_decode_tokens_total", tokens)
        self._to.observe("trtpass_time_per_output_token_seconds", seconds)

    def ended(self, finish: str, completion_tokens: int, seconds: float, kept: float) -> None:
        self._to.add("trtpass_requests_total", value=finish)

    def paused(self) -> None:
        self._to.add("trtpass_paused_total")

    def state(self, waiting: int, running: int, pages_held: int, pages: int, bytes_held: int, kept: float) -> None:
        self._to.put("trtpass_requests_waiting", waiting)
        self._to.put("trtpass_rows_running", running)
        self._to.put("trtpass_pages_in_use", pages_held)
        self._to.put("trtpass_pages", pages)
        self._to.put("trtpass_cache_bytes", bytes_held)
        self._to.put("trtpass_kept_fraction", round(kept, 4))

"""What a scheduler tells about itself. Seconds are of ``time.monotonic``; all calls come from the scheduler's thread,
but for ``refused``."""

from __future__ import annotations


class Observer:
    """Does nothing: the base of whoever wants to know."""

    def refused(self, reason: str) -> None:
        """A request was not taken: ``queue``, ``limit``, ``input`` or ``closing``."""

    def started(self, queue_seconds: float, prompt_tokens: int) -> None:
        """A request left the queue and its prompt was read."""

    def first_token(self, seconds: float) -> None:
        """The first token of a request was chosen, so long after it was submitted."""

    def stepped(self, tokens: int, seconds: float) -> None:
        """One decode step of so many rows took so long."""

    def ended(self, finish: str, completion_tokens: int, seconds: float, kept: float) -> None:
        """A request ended: a ``Finish``, ``cancelled`` or ``failed``; seconds since it was submitted."""

    def paused(self) -> None:
        """A row gave up its pages for the others, for a while."""

    def state(self, waiting: int, running: int, pages_held: int, pages: int, bytes_held: int, kept: float) -> None:
        """After every turn of the loop. ``waiting``: paused ones too; ``kept``: mean over the running rows, or 1."""

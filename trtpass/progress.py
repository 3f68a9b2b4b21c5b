"""Progress on a terminal, silence in a pipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[str, float], None]  # (what is being done, fraction of the whole in [0, 1])


def silent(_what: str, _fraction: float) -> None:
    """A report that shows nothing."""


@contextmanager
def bar(title: str) -> Iterator[Report]:
    """A progress bar on stderr where that is a terminal; otherwise nothing is shown."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield silent
        return
    columns = (TextColumn(f"[bold]{title}[/]"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=1.0)

        def report(what: str, fraction: float) -> None:
            progress.update(task, description=what, completed=fraction)

        yield report

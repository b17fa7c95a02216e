"""Progress on a terminal, on stderr; elsewhere nothing, for there the log has a line an epoch and a stage."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress


@contextmanager
def bar(title: str, total: int, done: int = 0) -> Iterator[Callable[[], None]]:
    """A bar of `total` steps, `done` of which are behind; call what it yields after each further one."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, refresh_per_second=4, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total, completed=done)
        yield lambda: progress.advance(task)

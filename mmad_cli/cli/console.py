"""Progress and notices on standard error; results on standard output."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress

# Shorter work leaves no line in a log
_WORTH_A_LINE = 1.0


def print_json(value: Any) -> None:
    """JSON on standard output."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_rich(renderable: RenderableType) -> None:
    """A table or text on standard output, as wide as the terminal (or wide enough, in a file)."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 160
    Console(width=width).print(renderable)


class ConsoleReporter:
    """Draws bars with time estimates on a terminal; in a log, writes one line per finished piece of work."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console: Console = Console(stderr=True)
        self._progress: Progress | None = None
        self._notices: set[str] = set()

    def __enter__(self) -> ConsoleReporter:
        if self._console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
            from rich.progress import TimeRemainingColumn as Remaining

            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                Remaining(),
                console=self._console,
                transient=True,
            )
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    @contextlib.contextmanager
    def task(self, title: str, total: int) -> Iterator[Callable[[int, int], None]]:
        """A bar on a terminal, a line at the end elsewhere."""
        start = time.perf_counter()
        state = {"done": 0, "total": total}
        task = self._progress.add_task(title, total=total or None) if self._progress is not None else None

        def advance(done: int, total: int) -> None:
            state.update(done=done, total=total)
            if self._progress is not None and task is not None:
                self._progress.update(task, completed=done, total=total or None)

        yield advance
        if self._progress is not None and task is not None:
            self._progress.remove_task(task)
        seconds = time.perf_counter() - start
        if seconds >= _WORTH_A_LINE:
            count = f" {state['total']}" if state["total"] else ""
            self._print(f"{title}:{count} done in {seconds:.1f} s")

    def notice(self, message: str) -> None:
        """A line on standard error; the same line only once."""
        if message not in self._notices:
            self._notices.add(message)
            self._print(message)

    def _print(self, message: str) -> None:
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

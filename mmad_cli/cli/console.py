"""Progress and notices on standard error; results on standard output."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from mmad_cli.errors import StoreError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress

# Shorter work leaves no line in a log
_WORTH_A_LINE = 1.0


def accept_all_characters() -> None:
    """Let the standard streams write what their encoding lacks as an escape, instead of failing on a file name."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def print_out(text: str, end: str = "\n") -> None:
    """Text on standard output."""
    _write(sys.stdout, text + end)


def print_err(text: str) -> None:
    """A line on standard error."""
    _write(sys.stderr, f"{text}\n")


def _write(stream: TextIO | None, text: str) -> None:
    if stream is None:
        # closed by whoever started this process
        return
    with _reader_may_leave(stream):
        stream.write(text)


@contextlib.contextmanager
def _reader_may_leave(stream: TextIO) -> Iterator[None]:
    """Flush at the end. A reader that has left (`| head`) stops neither the work nor the exit code that tells of it."""
    try:
        yield
        stream.flush()
    except (BrokenPipeError, SystemExit):
        # rich turns the first into the second
        _discard(stream)
    except OSError as error:
        _discard(stream)
        raise StoreError(f"{stream.name}: cannot be written ({error.strerror}); the work itself is done") from error


def _discard(stream: TextIO) -> None:
    """Send the rest nowhere; else the interpreter would complain about it when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def print_json(value: Any) -> None:
    """JSON on standard output, in ASCII: any terminal and any pipe takes it unchanged."""
    print_out(json.dumps(value, indent=2, default=str))


def print_rich(renderable: RenderableType) -> None:
    """A table or text on standard output, as wide as the terminal (or wide enough, in a file)."""
    from rich.console import Console

    if sys.stdout is None:
        return
    with _reader_may_leave(sys.stdout):
        Console(width=None if sys.stdout.isatty() else 160).print(renderable)


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
        if self._progress is None:
            print_err(message)
        else:
            self._console.print(message, markup=False, highlight=False, soft_wrap=True)

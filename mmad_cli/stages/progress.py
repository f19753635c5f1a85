"""How stages tell what they are doing. The command line draws it; as a library it is silent."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

Advance = Callable[[int, int], None]


class Reporter(Protocol):
    """Receives progress and notices of the stages."""

    def task(self, title: str, total: int) -> contextlib.AbstractContextManager[Advance]:
        """A bar for one piece of work; the returned function takes (done, total)."""

    def notice(self, message: str) -> None:
        """Something the user should know, in one line."""


class Collector:
    """Keeps notices for whoever sent the work."""

    def __init__(self) -> None:
        self.notices: list[str] = []

    @contextlib.contextmanager
    def task(self, title: str, total: int) -> Iterator[Advance]:
        """A bar that is not drawn."""
        yield lambda done, total: None

    def notice(self, message: str) -> None:
        """Keep the message, once."""
        if message not in self.notices:
            self.notices.append(message)


class SilentReporter:
    """Shows nothing."""

    @contextlib.contextmanager
    def task(self, title: str, total: int) -> Iterator[Advance]:
        """A bar that is not drawn."""
        yield lambda done, total: None

    def notice(self, message: str) -> None:
        """Drop the message."""

"""A cluster in the process of the test, for what need not be seen on a real one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import pytest


class KilledWorker(Exception):  # noqa: N818
    """As the scheduler raises it."""


class Inside(Executor):
    """A cluster in this process. `deadly` says which jobs kill every worker that tries them."""

    def __init__(self, deadly: Callable[[Any, Any], bool]) -> None:
        self.deadly = deadly
        self.tried: list[Any] = []

    def submit(self, function: Any, /, *arguments: Any, **_: Any) -> Future[Any]:
        self.tried.append(arguments[0])
        future: Future[Any] = Future()
        if self.deadly(function, arguments[0]):
            future.set_exception(KilledWorker())
        else:
            future.set_result(function(arguments[0]))
        return future

    def executor(self) -> Executor:
        return self

    def workers(self) -> int:
        return 2

    def check(self, *_: object) -> None:
        """Everything is the same in the same process."""

    def close(self) -> None:
        """Nothing is open."""


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any, Any], bool]], Inside]:
    def make(deadly: Callable[[Any, Any], bool]) -> Inside:
        made = Inside(deadly)
        monkeypatch.setattr("mmad_cli.stages.session.Cluster", lambda *_: made)
        return made

    return make

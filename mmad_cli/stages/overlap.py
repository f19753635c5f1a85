"""Reading ahead of the work and writing behind it: disk and device are busy at the same time, the order stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")


def read_ahead(items: Sequence[Item], read: Callable[[Item], Value]) -> Iterator[tuple[Item, Future[Value]]]:
    """Each item with what `read` gave for it, in order; a thread reads the next one while the caller has the present.

    One item is read ahead, no more, so that memory holds two. What `read` raises comes out of the item's future.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
        coming: Future[Value] | None = None
        try:
            for position, item in enumerate(items):
                present = coming or reader.submit(read, item)
                following = items[position + 1 : position + 2]
                coming = reader.submit(read, following[0]) if following else None
                yield item, present
        finally:
            if coming is not None:
                coming.cancel()


class Behind:
    """A thread that finishes what the caller hands over, one piece after the other and at most one waiting.

    As a context manager it ends with everything done. What a piece raises is raised from the next call or at the end.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="behind")
        self._last: Future[Any] | None = None

    def __enter__(self) -> Behind:
        return self

    def hand_over(self, work: Callable[[], object]) -> None:
        """Do this as soon as the piece before it is done; returns once that is so."""
        self.finish()
        self._last = self._thread.submit(work)

    def finish(self) -> None:
        """Wait until everything that was handed over is done."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)
        # what went wrong first is what is told
        if self._last is not None and error is None:
            self._last.result()

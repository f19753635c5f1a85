"""Where independent tasks run: in this process or in a pool of processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.sharedctypes import Synchronized
from typing import TypeVar

from mmad_cli.errors import StoreError, UsageError
from mmad_cli.processes import become_worker
from mmad_cli.threads import available_cores, limit_threads

Job = TypeVar("Job")
Result = TypeVar("Result")


def resolve_workers(workers: int | None) -> int:
    """Number of worker processes: as asked, else one per available core. Raises UsageError for less than one."""
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers}: must be at least 1")
    return available_cores() if workers is None else workers


def make_pool(workers: int) -> Executor | None:
    """A pool of `workers` processes, or None for work in this process.

    Processes are spawned, not forked: the numeric libraries' thread pools do not survive a fork.
    """
    if workers <= 1:
        return None
    threads = max(1, available_cores() // workers)
    context = multiprocessing.get_context("spawn")
    started = context.Value("i", 0)
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(threads, started))


def run_tasks(
    executor: Executor | None, function: Callable[[Job], Result], jobs: Sequence[Job]
) -> Iterator[tuple[int, Result]]:
    """Results as they finish, with the index of their job. The first exception stops the rest and is raised."""
    if executor is None:
        for index, job in enumerate(jobs):
            yield index, function(job)
        return
    pending: dict[Future[Result], int] = {}
    try:
        with _interrupts_held():
            for index, job in enumerate(jobs):
                pending[executor.submit(function, job)] = index
        for future in as_completed(list(pending)):
            yield pending.pop(future), future.result()
    except BrokenProcessPool as error:
        raise StoreError(
            "a worker process died (often: out of memory). What was finished is kept; "
            "run the same command again, with fewer --workers if it happens again"
        ) from error
    finally:
        for future in pending:
            future.cancel()


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let Ctrl-C wait while workers start; they inherit that, and only the parent decides what an interrupt means."""
    if not hasattr(signal, "pthread_sigmask"):
        # not on Windows
        yield
        return
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def close_pool(executor: Executor | None) -> None:
    """Drop what has not started and let the workers end."""
    if executor is not None:
        with contextlib.suppress(OSError):
            executor.shutdown(wait=True, cancel_futures=True)


def _start_worker(threads: int, started: Synchronized[int]) -> None:
    with started.get_lock():
        number = started.value
        started.value += 1
    limit_threads(threads, share=number)
    become_worker()

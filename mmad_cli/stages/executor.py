"""Where independent tasks run: in this process or in a pool of processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.sharedctypes import Synchronized
from typing import TypeVar

from mmad_cli.errors import StoreError, UsageError
from mmad_cli.processes import become_worker
from mmad_cli.stages.cluster import has_no_workers, is_lost_worker, lost_cluster
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
    executor: Executor | None,
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    lost: Callable[[Job], Result] | None = None,
) -> Iterator[tuple[int, Result]]:
    """Results as they finish, with the index of their job. The first exception stops the rest and is raised.

    lost: gives the result of a job that killed several workers of a cluster; without it that is an error too. Such
    jobs are tried once more, alone, after the others: they may only have been at a worker that another one killed.
    """
    if executor is None:
        for index, job in enumerate(jobs):
            yield index, function(job)
        return
    pending: dict[Future[Result], int] = {}
    # grows by every job that is tried again
    waves = [list(range(len(jobs)))]
    try:
        for wave in waves:
            with _interrupts_held():
                for index in wave:
                    pending[executor.submit(function, jobs[index])] = index
            for future in as_completed(list(pending)):
                index = pending.pop(future)
                try:
                    result = future.result()
                except Exception as error:
                    if has_no_workers(error):
                        raise lost_cluster() from error
                    if lost is None or not is_lost_worker(error):
                        raise
                    if len(wave) > 1:
                        waves.append([index])
                        continue
                    result = lost(jobs[index])
                yield index, result
    except CancelledError as error:
        raise lost_cluster() from error
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
            if isinstance(executor, ProcessPoolExecutor):
                executor.shutdown(wait=True, cancel_futures=True)
            else:
                # of a cluster: what is not finished is dropped
                executor.shutdown(wait=False)


def _start_worker(threads: int, started: Synchronized[int]) -> None:
    with started.get_lock():
        number = started.value
        started.value += 1
    limit_threads(threads, share=number)
    become_worker()

"""The tasks that go to workers, and running many of them with progress, notices and per-sample failures."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import TypeVar

from mmad_cli.errors import UNFORESEEN, DataError, unforeseen
from mmad_cli.stages.clean import CleanJob, load_clean
from mmad_cli.stages.executor import run_tasks
from mmad_cli.stages.features import Batch, FeatureJob, batch_size, extract_batch, runs_in_pool
from mmad_cli.stages.overlap import Behind, read_ahead
from mmad_cli.stages.progress import Reporter
from mmad_cli.stages.session import Session, resolve_device
from mmad_cli.stages.timing import Stopwatch

Job = TypeVar("Job")
Result = TypeVar("Result")

# Samples per task on a cluster, where networks are not loaded by who hands the tasks out
_CLUSTER_BATCH = 8
LOST = "every worker of the cluster that tried it died (often: out of memory); run the same command again"
_one_at_a_time = threading.RLock()


def one_at_a_time(function: Callable[[Job], Result]) -> Callable[[Job], Result]:
    """A task that waits for others of its process: workers of a cluster may have several threads.

    The numeric libraries seed their random numbers and set their threads for a whole process.
    """

    @functools.wraps(function)
    def alone(job: Job) -> Result:
        with _one_at_a_time:
            return function(job)

    return alone


@dataclass
class Outcome:
    """What came of one task: notices for the user, and failures by sample id."""

    notices: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    samples: int = 1


@one_at_a_time
def clean_task(job: CleanJob) -> Outcome:
    """Clean one scan into the store."""
    outcome = Outcome()
    try:
        load_clean(job, outcome.notices.append)
    except (DataError, *UNFORESEEN) as error:
        outcome.failures[job.ref.id] = _said(error, job)
    return outcome


def _said(error: Exception, job: CleanJob) -> str:
    """The message of a failure; it names the sample's files."""
    if isinstance(error, DataError):
        return str(error)
    return f"{', '.join(str(path) for path in job.ref.files.values())}: {unforeseen(error)}"


@dataclass(frozen=True)
class ExtractTask:
    """Features of a few samples, computed as one batch."""

    jobs: tuple[FeatureJob, ...]
    device: str


@one_at_a_time
def extract_task(task: ExtractTask) -> Outcome:
    """Extract a batch into the store; if it fails, one by one, so that the failing sample is named."""
    outcome = Outcome(samples=len(task.jobs))
    try:
        extract_batch(task.jobs, resolve_device(task.device)[0], outcome.notices.append)
    except (DataError, *UNFORESEEN) as error:
        if len(task.jobs) == 1:
            outcome.failures[task.jobs[0].clean.ref.id] = _said(error, task.jobs[0].clean)
            return outcome
        for job in task.jobs:
            single = extract_task(ExtractTask((job,), task.device))
            outcome.notices += single.notices
            outcome.failures.update(single.failures)
    return outcome


def extract_here(tasks: Sequence[ExtractTask]) -> Iterator[tuple[int, Outcome]]:
    """`extract_task` of each, in this process: the next batch is read and the one before stored while one is computed.

    Yields the position of a task and its outcome.
    """
    noticed: list[list[str]] = [[] for _ in tasks]

    def read(position: int) -> Batch:
        batch = Batch(tasks[position].jobs)
        batch.read(noticed[position].append)
        return batch

    before: Batch | None = None
    with Behind() as behind:
        for position, batch in read_ahead(range(len(tasks)), read):
            task, notices = tasks[position], noticed[position]
            try:
                ready = batch.result()
                if before is not None and before.shares_with(ready):
                    # this thread must not wait for a lock that it has taken itself
                    behind.finish()
                ready.compute(resolve_device(task.device)[0])
            except (DataError, *UNFORESEEN):
                # again in the plain way, which names the sample that fails
                outcome = extract_task(task)
                yield position, replace(outcome, notices=[*notices, *outcome.notices])
                continue
            try:
                behind.hand_over(ready.write)
            except BaseException:
                ready.release()
                raise
            before = ready
            yield position, Outcome(notices, samples=len(task.jobs))


def pays_beside(session: Session) -> bool:
    """Whether reading and storing beside the computing gains time: not where networks and files share the cores."""
    return session.resolve_device() != "cpu" or "://" in session.store.address


def extract_tasks(session: Session, jobs: Sequence[FeatureJob]) -> list[ExtractTask]:
    """The jobs, all of one feature, in batches."""
    if session.cluster is not None:
        # which device a worker has, it knows itself
        device, size = session.device, 1 if runs_in_pool(jobs[0].spec) else _CLUSTER_BATCH
    else:
        device = session.resolve_device()
        size = 1 if runs_in_pool(jobs[0].spec) else batch_size(jobs[0].spec, device)
    return [ExtractTask(tuple(jobs[i : i + size]), device) for i in range(0, len(jobs), size)]


def run_all(
    function: Callable[[Job], Outcome],
    jobs: Sequence[Job],
    *,
    total: int,
    title: str,
    executor: Executor | None,
    reporter: Reporter,
    watch: Stopwatch,
    here: Callable[[Sequence[Job]], Iterator[tuple[int, Outcome]]] | None = None,
) -> dict[str, str]:
    """Run tasks with a progress bar and a stopwatch over samples; returns the failures by sample id.

    here: what runs them all where there is no executor, instead of the function one by one.
    """
    failures: dict[str, str] = {}
    if not jobs:
        return failures

    def lost(job: Job) -> Outcome:
        ids = [one.clean.ref.id for one in job.jobs] if isinstance(job, ExtractTask) else [_sample_id(job)]
        return Outcome(failures=dict.fromkeys(ids, LOST), samples=len(ids))

    done = 0
    with reporter.task(title, total) as advance:
        results = here(jobs) if here and executor is None else run_tasks(executor, function, jobs, lost=lost)
        for _, outcome in results:
            for message in outcome.notices:
                reporter.notice(message)
            failures.update(outcome.failures)
            done += outcome.samples
            watch.lap(done)
            advance(done, total)
    return failures


def _sample_id(job: object) -> str:
    return job.ref.id if isinstance(job, CleanJob) else str(getattr(job, "path", job))

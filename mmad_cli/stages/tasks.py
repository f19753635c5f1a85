"""The tasks that go to workers, and running many of them with progress, notices and per-sample failures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TypeVar

from mmad_cli.errors import UNFORESEEN, DataError, unforeseen
from mmad_cli.stages.clean import CleanJob, load_clean
from mmad_cli.stages.executor import run_tasks
from mmad_cli.stages.features import FeatureJob, extract_batch
from mmad_cli.stages.progress import Reporter
from mmad_cli.stages.timing import Stopwatch

Job = TypeVar("Job")


@dataclass
class Outcome:
    """What came of one task: notices for the user, and failures by sample id."""

    notices: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    samples: int = 1


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


def extract_task(task: ExtractTask) -> Outcome:
    """Extract a batch into the store; if it fails, one by one, so that the failing sample is named."""
    outcome = Outcome(samples=len(task.jobs))
    try:
        extract_batch(task.jobs, task.device, outcome.notices.append)
    except (DataError, *UNFORESEEN) as error:
        if len(task.jobs) == 1:
            outcome.failures[task.jobs[0].clean.ref.id] = _said(error, task.jobs[0].clean)
            return outcome
        for job in task.jobs:
            single = extract_task(ExtractTask((job,), task.device))
            outcome.notices += single.notices
            outcome.failures.update(single.failures)
    return outcome


def run_all(
    function: Callable[[Job], Outcome],
    jobs: Sequence[Job],
    *,
    total: int,
    title: str,
    executor: Executor | None,
    reporter: Reporter,
    watch: Stopwatch,
) -> dict[str, str]:
    """Run tasks with a progress bar and a stopwatch over samples; returns the failures by sample id."""
    failures: dict[str, str] = {}
    if not jobs:
        return failures
    done = 0
    with reporter.task(title, total) as advance:
        for _, outcome in run_tasks(executor, function, jobs):
            for message in outcome.notices:
                reporter.notice(message)
            failures.update(outcome.failures)
            done += outcome.samples
            watch.lap(done)
            advance(done, total)
    return failures

"""Evaluating on a cluster: the grid of methods, seeds and categories, one task per cell.

Shared work goes first, each piece once: clean scans, then features, then trainings over all categories. What fails
there is not recorded; the cell that needs it meets the same failure and reports it. A cell runs the same code as in
one process, on a worker, with everything that it needs in the store already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmad_cli.errors import DataError
from mmad_cli.results.schema import CategoryResult, RunResult
from mmad_cli.stages.clean import CleanJob
from mmad_cli.stages.evaluate import OpenRun, compute_record, open_run
from mmad_cli.stages.executor import run_tasks
from mmad_cli.stages.features import FeatureJob
from mmad_cli.stages.pipeline import CategoryOutcome, fit_category
from mmad_cli.stages.plan import CategoryPlan
from mmad_cli.stages.progress import Collector
from mmad_cli.stages.request import EvaluateRequest, Prepared
from mmad_cli.stages.session import Session
from mmad_cli.stages.shared import SharedPlan, train_shared
from mmad_cli.stages.tasks import ExtractTask, clean_task, extract_task, extract_tasks, one_at_a_time, run_all
from mmad_cli.stages.timing import Stopwatch
from mmad_cli.store import open_store


@dataclass(frozen=True)
class CellTask:
    """One category of one run, for a worker."""

    store: str
    device: str
    prepared: Prepared
    plan: CategoryPlan
    shared: SharedPlan | None


@dataclass(frozen=True)
class CellOutcome:
    """The result, or why there is none, and what the user should know."""

    failure: CategoryResult | None
    notices: tuple[str, ...] = ()


def evaluate_grid(session: Session, requests: Sequence[EvaluateRequest]) -> list[tuple[RunResult, Path]]:
    """Evaluate every request on the session's cluster; results are as those of `evaluate`, one after the other."""
    runs = [open_run(session, request) for request in requests]
    executor = session.pool(1)
    for run in runs:
        session.check_cluster(run.prepared.dataset.root, run.prepared.run.weights)
    cells = [(run, category) for run in runs for category in run.plans if not run.is_done(session, category)]
    plans = [run.plans[category] for run, category in cells]
    prepare_inputs(session, executor, plans, [run.shared for run, _ in cells if run.shared is not None])
    _warm(session, executor, {r.shared.artefact.key: r for r, _ in cells if r.shared is not None})
    for run in runs:
        for category in run.prepared.categories:
            if (run, category) not in cells:
                run.conclude(session, category)
    tasks = [CellTask(session.store.address, session.device, r.prepared, r.plans[c], r.shared) for r, c in cells]
    with session.reporter.task("evaluating", len(tasks)) as advance:
        lost = _lost(lambda task: f"{task.prepared.run.definition.name} {task.plan.samples.category}")
        for done, (index, outcome) in enumerate(run_tasks(executor, cell_task, tasks, lost=lost), start=1):
            for notice in outcome.notices:
                session.reporter.notice(notice)
            run, category = cells[index]
            run.conclude(session, category, outcome.failure)
            advance(done, len(tasks))
    return [(run.result, run.folder) for run in runs]


def prepare_inputs(
    session: Session, executor: Executor | None, plans: Iterable[CategoryPlan], shared: Iterable[SharedPlan] = ()
) -> None:
    """Clean scans and features of all plans into the store, each once."""
    clean: dict[str, CleanJob] = {}
    features: dict[str, FeatureJob] = {}
    parts = [*(_jobs(plan) for plan in plans), *(_jobs(part) for part in shared)]
    for part in parts:
        for by_id, by_name in part:
            clean.update({job.key: job for job in by_id.values()})
            features.update({job.key: job for jobs in by_name.values() for job in jobs.values() if job.wanted})
    left = [job for job in clean.values() if not session.store.has_tensors(job.artefact)]
    _run(session, executor, clean_task, left, len(left), "preprocessing")
    by_spec: dict[Any, list[FeatureJob]] = {}
    for job in features.values():
        if not session.store.has_tensors(job.artefact):
            by_spec.setdefault(job.spec, []).append(job)
    tasks: list[ExtractTask] = [task for jobs in by_spec.values() for task in extract_tasks(session, jobs)]
    _run(session, executor, extract_task, tasks, sum(len(task.jobs) for task in tasks), "extracting")


def fit_grid(
    session: Session,
    prepared: Prepared,
    plans: Sequence[CategoryPlan],
    shared: SharedPlan | None,
) -> list[CategoryOutcome]:
    """Fit every category on the session's cluster."""
    executor = session.pool(1)
    session.check_cluster(prepared.dataset.root, prepared.run.weights)
    prepare_inputs(session, executor, plans, [] if shared is None else [shared])
    tasks = [FitTask(session.store.address, session.device, prepared, plan) for plan in plans]
    outcomes: list[CategoryOutcome | None] = [None] * len(tasks)
    with session.reporter.task("fitting", len(tasks)) as advance:
        for done, (index, (outcome, notices)) in enumerate(run_tasks(executor, fit_task, tasks), start=1):
            outcomes[index] = outcome
            for notice in notices:
                session.reporter.notice(notice)
            advance(done, len(tasks))
    return [outcome for outcome in outcomes if outcome is not None]


@dataclass(frozen=True)
class FitTask:
    """Fitting one category, for a worker."""

    store: str
    device: str
    prepared: Prepared
    plan: CategoryPlan


@one_at_a_time
def fit_task(task: FitTask) -> tuple[CategoryOutcome, tuple[str, ...]]:
    """Fit one category into the store."""
    reporter = Collector()
    with Session(open_store(task.store), workers=1, device=task.device, reporter=reporter) as session:
        return fit_category(session, task.prepared, task.plan), tuple(reporter.notices)


@one_at_a_time
def cell_task(task: CellTask) -> CellOutcome:
    """Evaluate one category; the result goes into the store."""
    reporter = Collector()
    with Session(open_store(task.store), workers=1, device=task.device, reporter=reporter) as session:
        _, failure = compute_record(session, task.prepared, task.plan, task.shared)
    return CellOutcome(failure, tuple(reporter.notices))


@dataclass(frozen=True)
class SharedTask:
    """A training over all categories, for a worker."""

    store: str
    device: str
    prepared: Prepared
    plan: SharedPlan


@one_at_a_time
def shared_task(task: SharedTask) -> tuple[str, ...]:
    """Train over all categories into the store."""
    reporter = Collector()
    with Session(open_store(task.store), workers=1, device=task.device, reporter=reporter) as session:
        try:
            train_shared(session, task.plan, task.prepared.run)
        except DataError:
            # the cells that need it meet the same error and report it
            return ()
    return tuple(reporter.notices)


def _jobs(part: CategoryPlan | SharedPlan) -> Iterable[tuple[Any, Any]]:
    if isinstance(part, CategoryPlan):
        return [(part.clean, part.features)]
    return [(part.clean[category], part.features[category]) for category in part.clean]


def _run(
    session: Session, executor: Executor | None, function: Callable[[Any], Any], jobs: list[Any], total: int, title: str
) -> None:
    run_all(
        function,
        jobs,
        total=total,
        title=title,
        executor=executor,
        reporter=session.reporter,
        watch=Stopwatch(session.pool_workers(len(jobs))),
    )


def _warm(session: Session, executor: Executor | None, runs: dict[str, OpenRun]) -> None:
    tasks = [
        SharedTask(session.store.address, session.device, run.prepared, run.shared)
        for run in runs.values()
        if run.shared is not None and not session.store.has_folder(run.shared.artefact)
    ]
    for _, notices in run_tasks(executor, shared_task, tasks):
        for notice in notices:
            session.reporter.notice(notice)


def _lost(name: Callable[[CellTask], str]) -> Callable[[CellTask], CellOutcome]:
    """What a cell comes to whose workers died over it again and again."""

    def outcome(task: CellTask) -> CellOutcome:
        text = f"{name(task)}: every worker that tried it died (often: out of memory); run the same command again"
        return CellOutcome(CategoryResult(status="failed", error=text))

    return outcome

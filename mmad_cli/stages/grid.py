"""Fitting and evaluating on a cluster: a task per category, and the grid of methods, seeds and categories.

Shared work goes first, each piece once: clean scans, then features, then trainings over all categories. A scan that
fails there is not recorded; the cell that needs it meets the same failure and reports it. What killed every worker
that tried it is not tried again: the cells that need it fail. A cell runs the same code as in one process, on a
worker, with everything that it needs in the store already.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from mmad_cli.errors import UNFORESEEN, DataError, unforeseen
from mmad_cli.results.schema import CategoryResult, RunResult
from mmad_cli.stages.clean import CleanJob
from mmad_cli.stages.cluster import stop_if_dropped
from mmad_cli.stages.evaluate import compute_record, open_run
from mmad_cli.stages.executor import run_tasks
from mmad_cli.stages.features import FeatureJob
from mmad_cli.stages.pipeline import CategoryOutcome, fit_category
from mmad_cli.stages.plan import CategoryPlan
from mmad_cli.stages.progress import Advance, Collector, Reporter
from mmad_cli.stages.request import EvaluateRequest, Prepared
from mmad_cli.stages.session import Session
from mmad_cli.stages.shared import SharedPlan, train_shared
from mmad_cli.stages.tasks import (
    LOST,
    ExtractTask,
    Outcome,
    clean_task,
    extract_task,
    extract_tasks,
    one_at_a_time,
)
from mmad_cli.store import open_store

_NAMED_AT_MOST = 5


class _Told(Protocol):
    """What a task comes to: notices for the user, and how many items it was."""

    @property
    def notices(self) -> Sequence[str]: ...

    @property
    def samples(self) -> int: ...


Job = TypeVar("Job")
Result = TypeVar("Result", bound=_Told)


@dataclass(frozen=True)
class Place:
    """How a worker works: with which store, device and memory."""

    store: str
    device: str
    memory_limit: int | None

    def session(self, reporter: Reporter) -> Session:
        """A session of one process."""
        store = open_store(self.store)
        return Session(store, 1, self.device, memory_limit=self.memory_limit, reporter=reporter)


class WorkerReporter(Collector):
    """Keeps notices for who sent the task, and ends the task at its next progress when nobody waits for it any more."""

    @contextlib.contextmanager
    def task(self, title: str, total: int) -> Iterator[Advance]:
        """A bar that is not drawn."""

        def advance(done: int, total: int) -> None:
            stop_if_dropped()

        yield advance


@dataclass(frozen=True)
class CategoryTask:
    """One category to fit or to evaluate, for a worker."""

    place: Place
    prepared: Prepared
    plan: CategoryPlan
    shared: SharedPlan | None


@dataclass(frozen=True)
class SharedTask:
    """A training over all categories, for a worker."""

    place: Place
    prepared: Prepared
    plan: SharedPlan


@dataclass(frozen=True)
class CellOutcome:
    """The result, or why there is none, and what the user should know."""

    failure: CategoryResult | None
    notices: tuple[str, ...] = ()
    samples: int = 1


@dataclass(frozen=True)
class FitOutcome:
    """What came of fitting a category, and what the user should know."""

    outcome: CategoryOutcome
    notices: tuple[str, ...] = ()
    samples: int = 1


@dataclass(frozen=True)
class SharedOutcome:
    """Why a training over all categories has no result, if so, and what the user should know."""

    error: str | None
    notices: tuple[str, ...] = ()
    samples: int = 1


@dataclass
class Inputs:
    """What went before the cells.

    missing: keys of what the store did not have. lost: sample id by key of what killed the workers that tried it.
    untrained: why there is no training over all categories, by its key.
    """

    missing: set[str] = field(default_factory=set)
    lost: dict[str, str] = field(default_factory=dict)
    untrained: dict[str, str] = field(default_factory=dict)

    def obstacle(self, plan: CategoryPlan, shared: SharedPlan | None) -> str | None:
        """Why a category cannot be worked on."""
        return self.loss(plan) or (None if shared is None else self.untrained.get(shared.artefact.key))

    def loss(self, part: CategoryPlan | SharedPlan) -> str | None:
        """What is said of samples that killed workers, None where there is none."""
        ids = list(dict.fromkeys(self.lost[key] for key in _keys(part) if key in self.lost))
        if not ids:
            return None
        more = f" and {len(ids) - _NAMED_AT_MOST} more" if len(ids) > _NAMED_AT_MOST else ""
        return f"{', '.join(ids[:_NAMED_AT_MOST])}{more}: {LOST}"


def evaluate_grid(session: Session, requests: Sequence[EvaluateRequest]) -> list[tuple[RunResult, Path]]:
    """Evaluate every request on the session's cluster; results are as those of `evaluate`, one after the other."""
    runs = [open_run(session, request) for request in requests]
    for run in runs:
        session.check_cluster(run.prepared.dataset.root, run.prepared.run.weights)
    open_cells = [(run, category) for run in runs for category in run.plans if not run.is_done(session, category)]
    unfinished = {(run.folder, category) for run, category in open_cells}
    for run in runs:
        for category in run.prepared.categories:
            if (run.folder, category) not in unfinished:
                run.conclude(session, category)
    shared = {run.shared.artefact.key: (run.prepared, run.shared) for run, _ in open_cells if run.shared is not None}
    inputs = prepare_inputs(session, [run.plans[category] for run, category in open_cells], list(shared.values()))
    cells = []
    for run, category in open_cells:
        obstacle = inputs.obstacle(run.plans[category], run.shared)
        if obstacle is None:
            cells.append((run, category))
        else:
            run.conclude(session, category, CategoryResult(status="failed", error=obstacle))
    tasks = [CategoryTask(_place(session), run.prepared, run.plans[c], run.shared) for run, c in cells]
    for index, outcome in _run(session, "evaluating", cell_task, tasks, _lost_cell):
        run, category = cells[index]
        run.conclude(session, category, outcome.failure)
    for run in runs:
        # cells end in any order; a run lists them as one process would
        known = run.result.categories
        run.result.categories = {name: known[name] for name in run.prepared.categories if name in known}
        run.result.to_disk(run.folder)
    return [(run.result, run.folder) for run in runs]


def fit_grid(
    session: Session,
    prepared: Prepared,
    plans: Sequence[CategoryPlan],
    shared: SharedPlan | None,
) -> list[CategoryOutcome]:
    """Fit every category on the session's cluster."""
    session.check_cluster(prepared.dataset.root, prepared.run.weights)
    inputs = prepare_inputs(session, plans, [] if shared is None else [(prepared, shared)])
    obstacles = [inputs.obstacle(plan, shared) for plan in plans]
    outcomes = [
        CategoryOutcome(plan.samples.category, error=obstacle) for plan, obstacle in zip(plans, obstacles, strict=True)
    ]
    left = [number for number, obstacle in enumerate(obstacles) if obstacle is None]
    tasks = [CategoryTask(_place(session), prepared, plans[number], shared) for number in left]
    for index, found in _run(session, "fitting", fit_task, tasks, _lost_fit):
        outcomes[left[index]] = _counted(found.outcome, plans[left[index]], inputs.missing)
    return outcomes


def prepare_inputs(
    session: Session, plans: Iterable[CategoryPlan], shared: Sequence[tuple[Prepared, SharedPlan]] = ()
) -> Inputs:
    """Clean scans, features and trainings over all categories into the store, each once."""
    inputs = Inputs()
    clean: dict[str, CleanJob] = {}
    features: dict[str, FeatureJob] = {}
    for by_id, by_name in (
        *(pair for plan in plans for pair in _jobs(plan)),
        *(p for _, s in shared for p in _jobs(s)),
    ):
        clean.update({job.key: job for job in by_id.values()})
        features.update({job.key: job for jobs in by_name.values() for job in jobs.values() if job.wanted})

    def lost(job: CleanJob | ExtractTask) -> Outcome:
        jobs = job.jobs if isinstance(job, ExtractTask) else (job,)
        inputs.lost.update({one.key: (one if isinstance(one, CleanJob) else one.clean).ref.id for one in jobs})
        return Outcome(samples=len(jobs))

    uncleaned = [job for job in clean.values() if not session.store.has_tensors(job.artefact)]
    inputs.missing.update(job.key for job in uncleaned)
    for _ in _run(session, "preprocessing", clean_task, uncleaned, lost):
        pass
    # a batch that kills workers must not cost another category
    batches: dict[Any, list[FeatureJob]] = {}
    for job in features.values():
        if job.clean.key not in inputs.lost and not session.store.has_tensors(job.artefact):
            inputs.missing.add(job.key)
            batches.setdefault((job.spec, job.artefact.category), []).append(job)
    tasks: list[ExtractTask] = [task for jobs in batches.values() for task in extract_tasks(session, jobs)]
    for _ in _run(session, "extracting", extract_task, tasks, lost, sum(len(task.jobs) for task in tasks)):
        pass
    _train(session, shared, inputs)
    return inputs


def _train(session: Session, shared: Sequence[tuple[Prepared, SharedPlan]], inputs: Inputs) -> None:
    tasks = []
    for prepared, plan in shared:
        loss = inputs.loss(plan)
        if loss is not None:
            inputs.untrained[plan.artefact.key] = loss
        elif not session.store.has_folder(plan.artefact):
            tasks.append(SharedTask(_place(session), prepared, plan))
    title = "training over all categories"
    for index, outcome in _run(session, title, shared_task, tasks, lambda _: SharedOutcome(f"{title}: {LOST}")):
        if outcome.error is not None:
            inputs.untrained[tasks[index].plan.artefact.key] = outcome.error


@one_at_a_time
def fit_task(task: CategoryTask) -> FitOutcome:
    """Fit one category into the store."""
    reporter = WorkerReporter()
    with task.place.session(reporter) as session:
        outcome = fit_category(session, task.prepared, task.plan, task.shared)
    return FitOutcome(outcome, tuple(reporter.notices))


@one_at_a_time
def cell_task(task: CategoryTask) -> CellOutcome:
    """Evaluate one category; the result goes into the store."""
    reporter = WorkerReporter()
    with task.place.session(reporter) as session:
        _, failure = compute_record(session, task.prepared, task.plan, task.shared)
    return CellOutcome(failure, tuple(reporter.notices))


@one_at_a_time
def shared_task(task: SharedTask) -> SharedOutcome:
    """Train over all categories into the store."""
    reporter = WorkerReporter()
    error = None
    with task.place.session(reporter) as session:
        try:
            train_shared(session, task.plan, task.prepared.run)
        except DataError as failure:
            error = str(failure)
        except UNFORESEEN as failure:
            error = unforeseen(failure)
    return SharedOutcome(error, tuple(reporter.notices))


def _place(session: Session) -> Place:
    return Place(session.store.address, session.device, session.memory_limit)


def _lost_cell(task: CategoryTask) -> CellOutcome:
    name = f"{task.prepared.run.definition.name} {task.plan.samples.category}"
    return CellOutcome(CategoryResult(status="failed", error=f"{name}: {LOST}"))


def _lost_fit(task: CategoryTask) -> FitOutcome:
    return FitOutcome(CategoryOutcome(task.plan.samples.category, error=LOST))


def _counted(outcome: CategoryOutcome, plan: CategoryPlan, missing: set[str]) -> CategoryOutcome:
    """The outcome with what was computed for it before its own task."""
    jobs = {
        "preprocess": [job.key for job in plan.clean.values()],
        "extract": [job.key for by_id in plan.features.values() for job in by_id.values()],
    }
    reports = {
        stage: replace(report, computed=sum(key in missing for key in jobs[stage]) - len(report.failures))
        for stage, report in outcome.reports.items()
    }
    return replace(outcome, reports=reports)


def _keys(part: CategoryPlan | SharedPlan) -> Iterator[str]:
    for by_id, by_name in _jobs(part):
        yield from (job.key for job in by_id.values())
        yield from (job.key for jobs in by_name.values() for job in jobs.values())


def _jobs(
    part: CategoryPlan | SharedPlan,
) -> Iterable[tuple[Mapping[str, CleanJob], Mapping[str, Mapping[str, FeatureJob]]]]:
    if isinstance(part, CategoryPlan):
        return [(part.clean, part.features)]
    return [(part.clean[category], part.features[category]) for category in part.clean]


def _run(
    session: Session,
    title: str,
    function: Callable[[Job], Result],
    tasks: Sequence[Job],
    lost: Callable[[Job], Result],
    total: int | None = None,
) -> Iterator[tuple[int, Result]]:
    """Results of tasks as they finish, with progress and notices; `lost` gives that of a task that killed workers."""
    if not tasks:
        return
    total = len(tasks) if total is None else total
    done = 0
    with session.reporter.task(title, total) as advance:
        for index, outcome in run_tasks(session.pool(len(tasks)), function, tasks, lost=lost):
            for notice in outcome.notices:
                session.reporter.notice(notice)
            yield index, outcome
            done += outcome.samples
            advance(done, total)

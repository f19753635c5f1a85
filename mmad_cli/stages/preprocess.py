"""Stages one and two for one category: clean scans, then features, into the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mmad_cli.stages.clean import STAGE as PREPROCESS
from mmad_cli.stages.clean import CleanJob, recomputed
from mmad_cli.stages.features import STAGE as EXTRACT
from mmad_cli.stages.features import FeatureJob, runs_in_pool
from mmad_cli.stages.session import Session
from mmad_cli.stages.tasks import clean_task, extract_here, extract_task, extract_tasks, pays_beside, run_all
from mmad_cli.stages.timing import Stopwatch, extract_name, preprocess_name, raw_megabytes
from mmad_cli.store import Artefact, CorruptArtefactError, make_key


@dataclass(frozen=True)
class StageReport:
    """What a stage did for one category."""

    category: str
    total: int
    computed: int
    failures: Mapping[str, str] = field(default_factory=dict)


def preprocess_category(session: Session, category: str, jobs: Mapping[str, CleanJob]) -> StageReport:
    """Bring every clean scan into the store; what is there already is not touched."""
    missing = [job for job in jobs.values() if _described(session, job.artefact) is None]
    workers = session.pool_workers(len(missing))
    watch = Stopwatch(workers)
    failures = run_all(
        clean_task,
        missing,
        total=len(missing),
        title=f"{category}: preprocessing",
        executor=session.pool(len(missing)),
        reporter=session.reporter,
        watch=watch,
    )
    if missing and not failures and session.cluster is None:
        watch.record(session, preprocess_name(missing[0].config, workers), raw_megabytes(missing[0]))
    _write_manifest(session, PREPROCESS, category, {id_: job.key for id_, job in jobs.items() if id_ not in failures})
    return StageReport(category, len(jobs), len(missing) - len(failures), failures)


def extract_category(session: Session, category: str, features: Mapping[str, Mapping[str, FeatureJob]]) -> StageReport:
    """Bring every feature into the store; what is there already is not touched."""
    total = computed = 0
    failures: dict[str, str] = {}
    for name, jobs in features.items():
        jobs = {id_: job for id_, job in jobs.items() if job.wanted}
        missing = [job for job in jobs.values() if _described(session, job.artefact) is None]
        total += len(jobs)
        if not missing:
            _write_manifest(session, EXTRACT, category, {i: job.key for i, job in jobs.items()}, known=True)
            continue
        spec = missing[0].spec
        in_pool = runs_in_pool(spec) or session.cluster is not None
        tasks = extract_tasks(session, missing)
        workers = session.pool_workers(len(tasks)) if in_pool else 1
        watch = Stopwatch(workers)
        failed = run_all(
            extract_task,
            tasks,
            total=len(missing),
            title=f"{category}: extracting {name}",
            executor=session.pool(len(tasks)) if in_pool else None,
            reporter=session.reporter,
            watch=watch,
            here=extract_here if not in_pool and pays_beside(session) else None,
        )
        if not failed and session.cluster is None:
            watch.record(session, extract_name(spec, session.resolve_device(), workers))
        failures.update(failed)
        computed += len(missing) - len(failed)
        _write_manifest(session, EXTRACT, category, {i: job.key for i, job in jobs.items() if i not in failed})
    return StageReport(category, total, computed, failures)


def _write_manifest(session: Session, stage: str, category: str, keys: Mapping[str, str], known: bool = False) -> None:
    """List a stage's artefacts for a category with their digests; `known`: only where there is no such list yet."""
    key = make_key(f"{stage}-manifest", 1, category=category, keys=dict(keys))
    if known and session.store.has_manifest(stage, category, key):
        return
    described = {id_: _described(session, Artefact(stage, category, key)) for id_, key in keys.items()}
    samples = {id_: what for id_, what in described.items() if what is not None}
    session.store.write_manifest(stage, category, key, {"stage": stage, "category": category, "samples": samples})


def _described(session: Session, artefact: Artefact) -> dict[str, Any] | None:
    """What the header of a stored file says; None where it is missing or damaged (said so, and removed)."""
    try:
        return session.store.describe(artefact)
    except FileNotFoundError:
        return None
    except CorruptArtefactError as error:
        session.reporter.notice(recomputed(error))
        session.store.remove(artefact)
        return None

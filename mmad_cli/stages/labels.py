"""Labels that an algorithm computes of whole scan files: once per file and into the store, before samples are known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmad_cli.datasets.base import PseudoLabelled, ScanLabels, raise_errors
from mmad_cli.errors import UNFORESEEN, DataError, unforeseen
from mmad_cli.stages.clean import Notice, recomputed
from mmad_cli.stages.tasks import Outcome, run_all
from mmad_cli.stages.timing import Stopwatch
from mmad_cli.store import Artefact, RawIndex, check_unchanged, library_versions, make_key, open_store
from mmad_cli.types import SampleRef

if TYPE_CHECKING:
    from mmad_cli.datasets.base import Dataset
    from mmad_cli.stages.session import Session

STAGE = "labels"
VERSION = 1


@dataclass(frozen=True)
class LabelJob:
    """Everything that is needed to have the labels of one scan file, in any process."""

    store: str
    dataset: PseudoLabelled
    path: Path
    digest: str
    artefact: Artefact


def list_refs(session: Session, dataset: Dataset, category: str, index: RawIndex) -> list[SampleRef]:
    """The samples of a category; labels that are computed come from the store. Raises DataError naming files."""
    if not isinstance(dataset, PseudoLabelled):
        return dataset.samples(category)
    paths = dataset.scan_files(category)
    digests = index.digests(paths)
    jobs = {path: _job(session, dataset, category, path, digests[path]) for path in paths}
    missing = [job for job in jobs.values() if not session.store.has_tensors(job.artefact)]
    failures = run_all(
        label_task,
        missing,
        total=len(missing),
        title=f"{category}: labelling scans",
        executor=session.pool(len(missing)),
        reporter=session.reporter,
        watch=Stopwatch(session.pool_workers(len(missing))),
    )
    if failures:
        raise DataError("; ".join(list(failures.values())[:3]))
    labels = {path: scan_labels(job, session.reporter.notice) for path, job in jobs.items()}
    listing = dataset.list_labelled(category, labels)
    raise_errors(listing.findings)
    return list(listing.refs)


def label_task(job: LabelJob) -> Outcome:
    """Label one scan file into the store."""
    outcome = Outcome()
    try:
        scan_labels(job, outcome.notices.append)
    except DataError as error:
        outcome.failures[job.path.name] = str(error)
    except UNFORESEEN as error:
        outcome.failures[job.path.name] = f"{job.path}: {unforeseen(error)}"
    return outcome


def scan_labels(job: LabelJob, notice: Notice) -> ScanLabels:
    """The labels of one scan file from the store, computed first where they are missing or damaged."""
    tensors, info = open_store(job.store).tensors_or_compute(
        job.artefact, lambda: _compute(job), lambda error: notice(recomputed(error))
    )
    return ScanLabels(int(info["points"]), np.asarray(tensors["marked"]))


def _job(session: Session, dataset: PseudoLabelled, category: str, path: Path, digest: str) -> LabelJob:
    key = make_key(
        STAGE, VERSION, labelling=dataset.labelling(), libraries=library_versions(("scikit-learn",)), raw=digest
    )
    return LabelJob(session.store.address, dataset, path, digest, Artefact(STAGE, category, key))


def _compute(job: LabelJob) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    labels = job.dataset.label_scan(job.path)
    check_unchanged({"scan": job.path}, {"scan": job.digest})
    return {"marked": labels.marked}, {"points": labels.points}

"""What a method learns once for all categories of a dataset (M3DM's fusion network), before it is fitted to each."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mmad_cli.errors import DataError
from mmad_cli.files import translated_os_errors
from mmad_cli.methods.base import SharedTraining
from mmad_cli.stages.clean import CleanJob, recomputed
from mmad_cli.stages.features import FeatureJob, StoredFeatures, StoredSample
from mmad_cli.stages.plan import (
    CategorySamples,
    MethodRun,
    Selection,
    clean_jobs,
    feature_jobs,
    select_samples,
)
from mmad_cli.stages.preprocess import extract_category, preprocess_category
from mmad_cli.stages.session import Session
from mmad_cli.stages.timing import Stopwatch, method_name
from mmad_cli.store import Artefact, CorruptArtefactError, library_versions, make_key

if TYPE_CHECKING:
    from mmad_cli.datasets.base import Dataset
    from mmad_cli.methods.base import Method
    from mmad_cli.preprocessing.config import PreprocessConfig

STAGE = "fit-shared"
ALL_CATEGORIES = "all categories"
# Checkpoints of trainings that are not finished
WORK = "work"


@dataclass(frozen=True)
class SharedPlan:
    """Jobs and key of the training over all categories; only training samples take part."""

    artefact: Artefact
    clean: Mapping[str, Mapping[str, CleanJob]]
    features: Mapping[str, Mapping[str, Mapping[str, FeatureJob]]]

    @property
    def trained(self) -> int:
        """How many samples are learned from."""
        return sum(len(jobs) for jobs in self.clean.values())

    @property
    def keys(self) -> set[str]:
        """Every artefact key that it depends on, its own included."""
        keys = {self.artefact.key}
        keys.update(job.key for jobs in self.clean.values() for job in jobs.values())
        keys.update(job.key for names in self.features.values() for by in names.values() for job in by.values())
        return keys


def plan_shared(
    session: Session,
    dataset: Dataset,
    samples: Mapping[str, CategorySamples],
    selection: Selection,
    preprocessing: PreprocessConfig,
    run: MethodRun,
) -> SharedPlan | None:
    """The plan over all categories of the dataset, or None for a method that learns nothing across them.

    Categories that were not asked for take part too, so that the result does not depend on what was asked for; one
    whose files do not pair up is left out, and that is said.
    """
    method = run.build("cpu")
    if not isinstance(method, SharedTraining) or not method.needs_shared():
        return None
    clean, features = {}, {}
    for category in dataset.categories():
        try:
            chosen = samples.get(category) or select_samples(session, dataset, category, selection)
        except DataError as error:
            session.reporter.notice(f"{category} takes no part in the training over all categories: {error}")
            continue
        training = replace(chosen, validation=(), test=())
        clean[category] = clean_jobs(session, dataset, training, preprocessing)
        features[category] = feature_jobs(clean[category], run.specs, run.weights)
    key = make_key(
        STAGE,
        run.definition.version,
        method=run.definition.name,
        config=run.config_dump,
        seed=run.seed,
        libraries=library_versions(run.definition.libraries),
        train={
            category: {name: [job.key for job in jobs.values()] for name, jobs in names.items()}
            for category, names in features.items()
        },
    )
    return SharedPlan(Artefact(STAGE, ALL_CATEGORIES, key), clean, features)


def train_shared(session: Session, plan: SharedPlan, run: MethodRun) -> None:
    """Bring the trained state into the store; an interrupted training goes on where it was.

    Raises DataError when a scan of any category cannot be used, since the result would depend on which.
    """
    store = session.store
    with store.lock(plan.artefact):
        try:
            store.read_folder(plan.artefact)
            return
        except FileNotFoundError:
            pass
        except CorruptArtefactError as error:
            session.reporter.notice(recomputed(error))
        for category, jobs in plan.clean.items():
            for report in (
                preprocess_category(session, category, jobs),
                extract_category(session, category, plan.features[category]),
            ):
                if report.failures:
                    raise DataError("; ".join(list(report.failures.values())[:3]))
        method = run.build(session.resolve_device())
        work = store.root / WORK / plan.artefact.key
        with translated_os_errors(work):
            work.mkdir(parents=True, exist_ok=True)
            from_start = not any(work.iterdir())
        watch = Stopwatch()
        with session.reporter.task("training over all categories", 0) as advance:
            _shared(method).fit_shared(_sets(session, plan), seed=run.seed, folder=work, progress=advance)
        watch.lap(plan.trained)
        if from_start:
            watch.record(session, method_name(STAGE, run, session.resolve_device(), plan.trained))
        with store.write_folder(plan.artefact, {}) as folder:
            _shared(method).save_shared(folder)
        shutil.rmtree(work, ignore_errors=True)


def load_shared(session: Session, artefact: Artefact, method: Method) -> None:
    """Give a method what was learned across the categories. Raises FileNotFoundError or CorruptArtefactError."""
    folder, _ = session.store.read_folder(artefact)
    _shared(method).load_shared(Path(folder))


def _shared(method: Method) -> SharedTraining:
    if not isinstance(method, SharedTraining):
        raise TypeError(f"{type(method).__name__} does not learn across categories")
    return method


def _sets(session: Session, plan: SharedPlan) -> dict[str, StoredFeatures]:
    device = session.resolve_device()
    return {
        category: StoredFeatures(
            [
                StoredSample(id_, {name: by[id_] for name, by in names.items()}, device, session.reporter.notice)
                for id_ in next(iter(names.values()))
            ]
        )
        for category, names in plan.features.items()
    }

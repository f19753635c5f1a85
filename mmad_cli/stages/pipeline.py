"""The stages before evaluation, for a whole dataset: preprocess, extract, fit, and the plan of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from mmad_cli.errors import UNFORESEEN, DataError, UsageError, unforeseen, unknown_name
from mmad_cli.methods.base import DiskEstimate
from mmad_cli.stages.checkpoints import check_export, export_state
from mmad_cli.stages.donors import donor_pool
from mmad_cli.stages.experts import STAGE as FIT_EXPERTS
from mmad_cli.stages.experts import forget_experts
from mmad_cli.stages.features import FeatureJob, runs_in_pool
from mmad_cli.stages.plan import (
    FIT,
    PREDICT,
    CategoryPlan,
    CategorySamples,
    Selection,
    choose_categories,
    clean_jobs,
    feature_jobs,
    plan_category,
    select_samples,
)
from mmad_cli.stages.predict import fitted_method
from mmad_cli.stages.preprocess import StageReport, extract_category, preprocess_category
from mmad_cli.stages.request import EvaluateRequest, Prepared, prepare, preprocess_config
from mmad_cli.stages.session import Session
from mmad_cli.stages.shared import ALL_CATEGORIES, SharedPlan, plan_shared, train_shared
from mmad_cli.stages.timing import extract_name, method_name, metrics_name, preprocess_name, seconds_for
from mmad_cli.store import Artefact, RawIndex

if TYPE_CHECKING:
    from pathlib import Path

    from mmad_cli.backbones.specs import FeatureSpec
    from mmad_cli.datasets.base import Dataset
    from mmad_cli.preprocessing.config import PreprocessConfig


@dataclass(frozen=True)
class CategoryOutcome:
    """What a stage did for one category, or why it could not."""

    category: str
    reports: Mapping[str, StageReport] = field(default_factory=dict)
    error: str | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether everything of this category is done."""
        return self.error is None and not any(report.failures for report in self.reports.values())


@dataclass(frozen=True)
class PlanLine:
    """What one stage of one category still has to do, and what that will take.

    seconds: from earlier work on this machine; None when nothing like it has been measured yet.
    """

    category: str
    stage: str
    total: int
    missing: int
    disk_bytes: int
    memory_bytes: int
    seconds: float | None = None


def _each_category(
    session: Session, dataset: Dataset, categories: list[str], selection: Selection
) -> Iterator[tuple[str, CategorySamples | DataError]]:
    index = RawIndex(session.store.root, dataset.root)
    for category in categories:
        try:
            yield category, select_samples(session, dataset, category, selection, index=index)
        except DataError as error:
            yield category, error


def preprocess(
    session: Session,
    data: Path,
    *,
    protocol: str = "m3dm",
    settings: Mapping[str, Any] | None = None,
    selection: Selection | None = None,
    force: bool = False,
) -> list[CategoryOutcome]:
    """Clean scans of a dataset into the store; raw files are only read. Failing samples are listed, the rest kept."""
    from mmad_cli.datasets import open_dataset

    selection = selection or Selection()
    config = preprocess_config(protocol, settings or {})
    dataset = open_dataset(data)
    session.check_cluster(dataset.root, {})
    outcomes = []
    for category, samples in _each_category(
        session, dataset, choose_categories(dataset, selection.categories), selection
    ):
        if isinstance(samples, DataError):
            outcomes.append(CategoryOutcome(category, error=str(samples)))
            continue
        jobs = clean_jobs(session, dataset, samples, config)
        if force:
            for job in jobs.values():
                session.store.remove(job.artefact)
        outcomes.append(CategoryOutcome(category, {"preprocess": preprocess_category(session, category, jobs)}))
    return outcomes


def extract(
    session: Session,
    data: Path,
    specs: Mapping[str, FeatureSpec],
    *,
    preprocessing: PreprocessConfig,
    selection: Selection | None = None,
    force: bool = False,
) -> list[CategoryOutcome]:
    """Features of a dataset into the store; scans are cleaned first where that is missing."""
    from mmad_cli.backbones.weights import resolve
    from mmad_cli.datasets import open_dataset
    from mmad_cli.datasets.base import require_modalities

    selection = selection or Selection()
    names = sorted({name for spec in specs.values() for name in spec.weights_names()})
    weights = {name: resolve(name).sha256 for name in names}
    dataset = open_dataset(data)
    require_modalities(dataset, (spec.input for spec in specs.values()), f"backbone {', '.join(specs)}")
    session.check_cluster(dataset.root, weights)
    outcomes = []
    for category, samples in _each_category(
        session, dataset, choose_categories(dataset, selection.categories), selection
    ):
        if isinstance(samples, DataError):
            outcomes.append(CategoryOutcome(category, error=str(samples)))
            continue
        clean = clean_jobs(session, dataset, samples, preprocessing)
        cleaned = preprocess_category(session, category, clean)
        usable = {id_: job for id_, job in clean.items() if id_ not in cleaned.failures}
        jobs = feature_jobs(usable, specs, weights, donor_pool(session, dataset, usable, preprocessing, specs))
        if force:
            _forget(session, jobs)
        extracted = extract_category(session, category, jobs)
        outcomes.append(CategoryOutcome(category, {"preprocess": cleaned, "extract": extracted}))
    return outcomes


def _forget(session: Session, jobs: Mapping[str, Mapping[str, FeatureJob]]) -> None:
    for by_id in jobs.values():
        for job in by_id.values():
            session.store.remove(job.artefact)


def backbone_spec(name: str, settings: Mapping[str, Any]) -> FeatureSpec:
    """The feature that `mmad extract --backbone NAME` means: `fpfh`, or a timm model with its tag."""
    from mmad_cli.backbones.specs import PARAMS, FeatureSpec

    if name == "timm":
        raise UsageError("--backbone timm: name the model, for example resnet18.tv_in1k")
    known = set(PARAMS[name].model_fields) if name in PARAMS else {*PARAMS["timm"].model_fields, "input", "view"}
    for setting in settings:
        if setting not in known - {"model"}:
            raise unknown_name(f"setting of {name}", setting, known - {"model"}, "--set")
    if name in PARAMS:
        return FeatureSpec(backbone=name, input="xyz" if name != "depth" else "depth", params=dict(settings))
    return FeatureSpec.timm(name, **settings)


def fit(session: Session, request: EvaluateRequest) -> list[CategoryOutcome]:
    """Fit a method per category and store it; earlier stages are run where they are missing."""
    prepared = prepare(session, request)
    check_export(request.export, prepared.categories)
    found = dict(_each_category(session, prepared.dataset, prepared.categories, request.selection))
    usable = {name: samples for name, samples in found.items() if not isinstance(samples, DataError)}
    shared = plan_shared(session, prepared.dataset, usable, request.selection, prepared.preprocessing, prepared.run)
    artefact = None if shared is None else shared.artefact
    plans = {name: _training_part(session, prepared, samples, artefact) for name, samples in usable.items()}
    if request.force:
        if shared is not None:
            session.store.remove(shared.artefact)
        for one in plans.values():
            _forget_fit(session, one)
    if session.cluster is not None:
        from mmad_cli.stages.grid import fit_grid

        fitted = dict(zip(plans, fit_grid(session, prepared, list(plans.values()), shared), strict=True))
    else:
        fitted = {name: fit_category(session, prepared, one, shared) for name, one in plans.items()}
    if request.export is not None:
        fitted = {name: _exported(session, plans[name], one, request.export) for name, one in fitted.items()}
    return [
        CategoryOutcome(category, error=str(samples)) if isinstance(samples, DataError) else fitted[category]
        for category, samples in found.items()
    ]


def _training_part(
    session: Session, prepared: Prepared, samples: CategorySamples, shared: Artefact | None
) -> CategoryPlan:
    """The plan of a category with the jobs of its training and validation samples only."""
    whole = plan_category(session, prepared.dataset, samples, prepared.preprocessing, prepared.run, shared=shared)
    wanted = {ref.id for ref in (*whole.samples.train, *whole.samples.validation)}
    return replace(
        whole,
        clean={id_: job for id_, job in whole.clean.items() if id_ in wanted},
        features={name: {id_: job for id_, job in by.items() if id_ in wanted} for name, by in whole.features.items()},
    )


def _forget_fit(session: Session, plan: CategoryPlan) -> None:
    _forget(session, plan.features)
    session.store.remove(plan.fit)
    if plan.experts is not None:
        forget_experts(session, plan.experts)


def _exported(session: Session, plan: CategoryPlan, outcome: CategoryOutcome, folder: Path) -> CategoryOutcome:
    """The outcome, with the fitted state written below `folder` where there is one."""
    if not outcome.ok:
        return outcome
    try:
        parts = [plan.fit] if plan.experts is None else [plan.experts.artefact, plan.fit]
        export_state(session.store, parts, folder)
    except DataError as error:
        return replace(outcome, error=str(error))
    return outcome


def fit_category(
    session: Session, prepared: Prepared, plan: CategoryPlan, shared: SharedPlan | None
) -> CategoryOutcome:
    """Fit one category into the store; earlier stages, and a training over all, are run where they are missing."""
    category = plan.samples.category
    reports = {"preprocess": preprocess_category(session, category, plan.clean)}
    if reports["preprocess"].failures:
        return CategoryOutcome(category, reports)
    reports["extract"] = extract_category(session, category, plan.features)
    if reports["extract"].failures:
        return CategoryOutcome(category, reports)
    try:
        if shared is not None:
            train_shared(session, shared, prepared.run)
        _, info = fitted_method(session, plan, prepared.run)
    except DataError as error:
        return CategoryOutcome(category, reports, error=str(error))
    except UNFORESEEN as error:
        # a defect of ours or of a third party's method must not cost the other categories
        return CategoryOutcome(category, reports, error=unforeseen(error))
    return CategoryOutcome(category, reports, info=info)


def plan(session: Session, request: EvaluateRequest) -> list[PlanLine]:
    """What `evaluate` would still have to compute, with estimates of disk, memory and time; nothing is computed."""
    prepared = prepare(session, request)
    found = {}
    for category, samples in _each_category(session, prepared.dataset, prepared.categories, request.selection):
        if isinstance(samples, DataError):
            raise samples
        found[category] = samples
    lines = []
    known = session.timings.known()
    shared = plan_shared(session, prepared.dataset, found, request.selection, prepared.preprocessing, prepared.run)
    if shared is not None:
        lines.append(_plan_shared_line(session, prepared, shared, known))
    for samples in found.values():
        chain = plan_category(
            session,
            prepared.dataset,
            samples,
            prepared.preprocessing,
            prepared.run,
            shared=None if shared is None else shared.artefact,
            full_resolution=request.full_resolution,
        )
        lines += _plan_samples(session, prepared, chain, known)
        lines += _plan_results(session, prepared, chain, known)
    return lines


def _plan_shared_line(session: Session, prepared: Prepared, shared: SharedPlan, known: Mapping[str, float]) -> PlanLine:
    stage = shared.artefact.stage
    missing = int(not session.store.has_folder(shared.artefact))
    seconds = _method_seconds(session, known, stage, prepared, shared.trained, missing * shared.trained)
    return PlanLine(ALL_CATEGORIES, stage, 1, missing, 0, 0, seconds)


def _plan_samples(
    session: Session, prepared: Prepared, chain: CategoryPlan, known: Mapping[str, float]
) -> Iterator[PlanLine]:
    """Cleaning and extraction."""
    store, category = session.store, chain.samples.category
    left = [job for job in chain.clean.values() if not store.has_tensors(job.artefact)]
    scan_bytes = sum(sum(p.stat().st_size for p in job.ref.files.values()) for job in left)
    workers = session.pool_workers(len(left))
    seconds = seconds_for(known, preprocess_name(prepared.preprocessing, workers), scan_bytes / 1e6, workers)
    # the clean form keeps existing points and the image uncompressed: at most about the raw size
    yield PlanLine(category, "preprocess", len(chain.clean), len(left), scan_bytes, 0, seconds)
    for name, jobs in chain.features.items():
        spec = prepared.run.specs[name]
        jobs = {id_: job for id_, job in jobs.items() if job.wanted}
        missing = sum(not store.has_tensors(job.artefact) for job in jobs.values())
        workers = session.pool_workers(missing) if runs_in_pool(spec) else 1
        seconds = _on_device(session, known, missing, partial(extract_name, spec, workers=workers), workers)
        yield PlanLine(category, f"extract {name}", len(jobs), missing, spec.estimated_bytes() * missing, 0, seconds)


def _plan_results(
    session: Session, prepared: Prepared, chain: CategoryPlan, known: Mapping[str, float]
) -> Iterator[PlanLine]:
    """Fitting, scoring and metrics."""
    store, category = session.store, chain.samples.category
    trained, tested = len(chain.samples.train), len(chain.samples.test)
    if chain.experts is not None:
        missing = int(not store.has_folder(chain.experts.artefact))
        seconds = _method_seconds(session, known, FIT_EXPERTS, prepared, trained, missing * trained)
        yield PlanLine(category, FIT_EXPERTS, 1, missing, 0, 0, seconds)
    missing = int(not store.has_folder(chain.fit))
    method = prepared.run.build("cpu")
    memory = method.memory_estimate(trained)
    disk = missing * method.disk_estimate(trained) if isinstance(method, DiskEstimate) else 0
    seconds = _method_seconds(session, known, FIT, prepared, trained, missing * trained)
    yield PlanLine(category, "fit", 1, missing, disk, memory, seconds)
    tested = len(chain.predictions)
    left = sum(not store.has_tensors(artefact) for artefact in chain.predictions.values())
    seconds = _method_seconds(session, known, PREDICT, prepared, trained, left)
    yield PlanLine(category, "predict", tested, left, left * 201_000, 0, seconds)
    missing = int(not store.has_record(chain.result))
    seconds = seconds_for(known, metrics_name(prepared.request.full_resolution), missing * tested)
    yield PlanLine(category, "evaluate", 1, missing, 0, tested * 250_000, seconds)


def _method_seconds(
    session: Session, known: Mapping[str, float], stage: str, prepared: Prepared, trained: int, items: int
) -> float | None:
    return _on_device(session, known, items, lambda device: method_name(stage, prepared.run, device, trained))


def _on_device(
    session: Session, known: Mapping[str, float], items: int, name: Callable[[str], str], workers: int = 1
) -> float | None:
    """Estimate for what is named by its device, which is looked for only where that makes a difference."""
    by_device = {device: seconds_for(known, name(device), items, workers) for device in ("cpu", "cuda")}
    if by_device["cpu"] == by_device["cuda"]:
        return by_device["cpu"]
    return by_device[session.resolve_device()]

"""Stage five: run what is missing, score the test split, write a run."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmad_cli._version import __version__
from mmad_cli.errors import UNFORESEEN, DataError, MmadError, StoreError, UsageError, WeightsError, unforeseen
from mmad_cli.files import atomic_write, translated_os_errors
from mmad_cli.results.schema import (
    SUMMARY,
    BankInfo,
    CategoryCounts,
    CategoryResult,
    DatasetInfo,
    Environment,
    MethodInfo,
    Preprocessing,
    RunResult,
    WeightsInfo,
)
from mmad_cli.stages.plan import (
    CategoryPlan,
    CategorySamples,
    MethodRun,
    Selection,
    choose_categories,
    plan_category,
    select_samples,
)
from mmad_cli.stages.predict import fitted_method, predictions, read_prediction
from mmad_cli.stages.preprocess import StageReport, extract_category, preprocess_category
from mmad_cli.stages.session import Session
from mmad_cli.stages.shared import SharedPlan, plan_shared, train_shared
from mmad_cli.store import CorruptArtefactError, RawIndex, library_version
from mmad_cli.store.keys import canonical_json, digest_bytes

if TYPE_CHECKING:
    from mmad_cli.backbones.weights import WeightsRecord
    from mmad_cli.datasets.base import Dataset
    from mmad_cli.methods.base import Prediction
    from mmad_cli.preprocessing.config import PreprocessConfig

RUNS = "runs"
MAPS = "maps.safetensors"


@dataclass(frozen=True)
class EvaluateRequest:
    """What `mmad evaluate` was asked for."""

    data: Path
    method: str
    variant: str | None = None
    recipe: str = "official"
    settings: Mapping[str, Any] = field(default_factory=dict)
    protocol: str | None = None
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    selection: Selection = field(default_factory=Selection)
    save_maps: bool = False
    full_resolution: bool = False
    force: bool = False
    out: Path | None = None
    argv: Sequence[str] = ()


@dataclass(frozen=True)
class Prepared:
    """A request with everything looked up: nothing is computed yet, and bad input has been refused."""

    request: EvaluateRequest
    dataset: Dataset
    categories: list[str]
    run: MethodRun
    records: list[WeightsRecord]
    preprocessing: PreprocessConfig


def prepare(session: Session, request: EvaluateRequest) -> Prepared:
    """Check method, variant, fields, weights, dataset and categories. Raises errors with exit code 2."""
    from mmad_cli.datasets import open_dataset
    from mmad_cli.methods import build, build_config, get_method
    from mmad_cli.methods.base import OwnWeights, ReadsValidation

    definition = get_method(request.method)
    config = build_config(definition, request.variant, request.recipe, request.settings)
    method = build(definition, config)
    if request.full_resolution and method.view != "resize":
        raise UsageError(
            f"--full-resolution: {definition.name} scores a crop of the image here; "
            "add --set view=resize or leave --full-resolution out"
        )
    dataset = open_dataset(request.data)
    categories = choose_categories(dataset, request.selection.categories)
    specs = method.features()
    own_weights = tuple(method.weights_names()) if isinstance(method, OwnWeights) else ()
    records = _weights(specs, own_weights)
    run = MethodRun(
        definition,
        config,
        request.selection.seed,
        specs,
        {record.name: record.sha256 for record in records},
        own_weights,
        reads_validation=isinstance(method, ReadsValidation) and method.needs_validation,
    )
    preprocessing = preprocess_config(request.protocol or definition.protocol, request.preprocessing)
    return Prepared(request, dataset, categories, run, records, preprocessing)


def preprocess_config(protocol: str, settings: Mapping[str, Any]) -> PreprocessConfig:
    """Parameters of a protocol with single fields set by the user."""
    from pydantic import ValidationError

    from mmad_cli.preprocessing.config import PreprocessConfig

    try:
        return PreprocessConfig.model_validate({"protocol": protocol, **settings})
    except ValidationError as error:
        first = error.errors()[0]
        option = str((first["loc"] or ("protocol",))[0]).replace("_", "-")
        raise UsageError(f"--{option} {first.get('input')}: {first['msg']}") from error


def _weights(specs: Mapping[str, Any], own: Sequence[str]) -> list[WeightsRecord]:
    from mmad_cli.backbones.weights import resolve

    names = {name for spec in specs.values() for name in spec.weights_names()} | set(own)
    return [resolve(name) for name in sorted(names)]


def evaluate(session: Session, request: EvaluateRequest) -> tuple[RunResult, Path]:
    """Evaluate a method on a dataset, one category at a time; returns the result and the run's folder.

    The summary is written after each category, so an interrupted run keeps what it had. A category that fails is
    recorded with its error and the others go on.
    """
    prepared = prepare(session, request)
    index = RawIndex(session.store.root, prepared.dataset.root)
    samples: dict[str, CategorySamples] = {}
    failed: dict[str, str] = {}
    for category in prepared.categories:
        try:
            samples[category] = select_samples(session, prepared.dataset, category, request.selection, index=index)
        except DataError as error:
            failed[category] = str(error)
    result = _start_run(prepared, samples)
    folder = (request.out or Path(RUNS) / result.run_id).absolute()
    _check_out(folder, prepared.dataset)
    _keep_history(session, result, folder, force=request.force)
    shared = plan_shared(session, prepared.dataset, samples, request.selection, prepared.preprocessing, prepared.run)
    plans = {
        category: plan_category(
            session,
            prepared.dataset,
            chosen,
            prepared.preprocessing,
            prepared.run,
            shared=None if shared is None else shared.artefact,
            full_resolution=request.full_resolution,
        )
        for category, chosen in samples.items()
    }
    # all at once and before anything is computed: pruning must not take what a later category has already
    _announce(session, folder, set().union(*(part.keys for part in (*plans.values(), shared) if part is not None)))
    for category in prepared.categories:
        if category in failed:
            outcome = CategoryResult(status="failed", error=failed[category])
        else:
            plan = plans[category]
            if request.force:
                forget(session, plan)
            outcome, device = evaluate_category(session, prepared, plan, folder, shared)
            if device is not None:
                result.environment.device = device
        if outcome.status == "failed":
            session.reporter.notice(f"{category}: failed: {outcome.error}")
        result.set_category(category, outcome)
        result.to_disk(folder)
    return result, folder


def forget(session: Session, plan: CategoryPlan) -> None:
    """Drop what the store has for this plan, so that everything is computed again."""
    for job in plan.clean.values():
        session.store.remove(job.artefact)
    for jobs in plan.features.values():
        for feature in jobs.values():
            session.store.remove(feature.artefact)
    for artefact in (plan.fit, plan.result, *plan.predictions.values()):
        session.store.remove(artefact)


def evaluate_category(
    session: Session,
    prepared: Prepared,
    plan: CategoryPlan,
    folder: Path,
    shared: SharedPlan | None = None,
) -> tuple[CategoryResult, str | None]:
    """Result of one category and the device that computed it; from the store where it is known already."""
    category = plan.samples.category
    try:
        record = _stored_result(session, plan)
        if record is None or (prepared.request.save_maps and not _maps_complete(session, plan)):
            record = _compute_category(session, prepared, plan, shared)
            session.store.write_record(plan.result, record)
        _write_category_files(session, prepared, plan, record, folder / _folder_name(category))
    except (UsageError, WeightsError, StoreError):
        # not this category's fault: the others would fail alike
        raise
    except MmadError as error:
        return CategoryResult(status="failed", error=str(error)), None
    except UNFORESEEN as error:
        # a defect of ours or of a third party's method must not cost the other categories
        return CategoryResult(status="failed", error=unforeseen(error)), None
    return CategoryResult.model_validate(record["result"]), record["device"]


def _stored_result(session: Session, plan: CategoryPlan) -> dict[str, Any] | None:
    try:
        return session.store.read_record(plan.result)
    except FileNotFoundError:
        return None
    except CorruptArtefactError as error:
        session.reporter.notice(f"{error}; computed again")
        return None


def _compute_category(
    session: Session, prepared: Prepared, plan: CategoryPlan, shared: SharedPlan | None
) -> dict[str, Any]:
    if not plan.samples.test:
        raise DataError(
            f"category {plan.samples.category}: no test sample; expected images in "
            f"{prepared.dataset.root / plan.samples.category / 'test'}"
        )
    if not plan.samples.train:
        raise DataError(
            f"category {plan.samples.category}: no training sample; expected scans in "
            f"{prepared.dataset.root / plan.samples.category / 'train' / 'good'}"
        )
    clock = _Clock()
    with clock("preprocess"):
        _raise_failures(preprocess_category(session, plan.samples.category, plan.clean))
    with clock("extract"):
        _raise_failures(extract_category(session, plan.samples.category, plan.features))
    if shared is not None:
        with clock("fit-shared"):
            train_shared(session, shared, prepared.run)
    with clock("fit"):
        method, info = fitted_method(session, plan, prepared.run)
    with clock("predict"):
        scored = predictions(session, plan, prepared.run, method)
    with clock("metrics"):
        values, reasons = _metrics(session, prepared, plan, scored)
    result = CategoryResult(
        status="ok",
        metrics=values,
        metrics_null_reasons=reasons,
        n_train=len(plan.samples.train),
        n_test=len(plan.samples.test),
        bank={name: BankInfo(**size) for name, size in info["banks"].items()},
        seconds=clock.seconds,
        peak_rss_bytes=_peak_rss(),
        peak_vram_bytes=_peak_vram(),
    )
    return {
        "result": result.model_dump(mode="json"),
        "device": _device_name(session),
        "scores": [
            [ref.id, ref.defect, ref.label, prediction.image_score]
            for ref, prediction in zip(plan.samples.test, scored, strict=True)
        ],
    }


def _raise_failures(report: StageReport) -> None:
    if report.failures:
        messages = list(report.failures.values())
        more = f" (and {len(messages) - 3} more; `mmad check` lists all)" if len(messages) > 3 else ""
        raise DataError("; ".join(messages[:3]) + more)


def _metrics(
    session: Session, prepared: Prepared, plan: CategoryPlan, scored: Sequence[Prediction]
) -> tuple[dict[str, float | None], dict[str, str]]:
    import numpy as np

    from mmad_cli.metrics import all_metrics
    from mmad_cli.stages.clean import load_clean
    from mmad_cli.stages.masks import map_at_size, mask_in_view

    view = prepared.run.build("cpu").view
    masks, maps = [], []
    for ref, prediction in zip(plan.samples.test, scored, strict=True):
        clean = load_clean(plan.clean[ref.id], session.reporter.notice)
        if prepared.request.full_resolution:
            masks.append(clean.mask)
            maps.append(map_at_size(prediction.anomaly_map, clean.mask.shape))
        else:
            masks.append(mask_in_view(clean, view))
            maps.append(prediction.anomaly_map)
    labels = np.array([ref.label for ref in plan.samples.test])
    scores = np.array([prediction.image_score for prediction in scored])
    result = all_metrics(labels, scores, masks, maps)
    return dict(result.values), dict(result.reasons)


def _maps_complete(session: Session, plan: CategoryPlan) -> bool:
    return all(session.store.has_tensors(artefact) for artefact in plan.predictions.values())


def _folder_name(category: str) -> str:
    from mmad_cli.store.store import safe_name

    return safe_name(category)


def _write_category_files(
    session: Session, prepared: Prepared, plan: CategoryPlan, record: Mapping[str, Any], folder: Path
) -> None:
    from mmad_cli.results.runs import SCORES, SampleScore, write_scores

    write_scores(folder / SCORES, [SampleScore(*row) for row in record["scores"]])
    if not prepared.request.save_maps:
        return
    from safetensors.numpy import save

    found = {ref.id: read_prediction(session, plan.predictions[ref.id]) for ref in plan.samples.test}
    lost = [ref for ref in plan.samples.test if found[ref.id] is None]
    if lost:
        for ref, prediction in zip(plan.samples.test, predictions(session, plan, prepared.run, None), strict=True):
            found[ref.id] = prediction
    maps = {id_: prediction.anomaly_map for id_, prediction in found.items() if prediction is not None}
    atomic_write(folder / MAPS, save(maps))


def _check_out(folder: Path, dataset: Dataset) -> None:
    """Refuse what cannot become a run folder. Raises UsageError naming --out."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise UsageError(f"--out {folder}: is not a folder; name one that is new or holds a run")
    raw = (dataset.root, *(dataset.root / name for name in dataset.categories()))
    place = folder.resolve()
    if place == raw[0].resolve() or any(place.is_relative_to(category.resolve()) for category in raw[1:]):
        raise UsageError(f"--out {folder}: lies in the dataset, which is only read; name a folder outside of it")


def _announce(session: Session, folder: Path, keys: set[str]) -> None:
    """Tell the store that the run in this folder needs these artefacts, so that pruning keeps them."""
    with translated_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    # one name per folder: another run that takes the folder's place takes over its record too
    name = f"{_folder_name(folder.name)}-{digest_bytes(os.fsencode(folder))[:8]}"
    session.store.write_run(name, {"folder": str(folder), "keys": sorted(keys)})


def _keep_history(session: Session, result: RunResult, folder: Path, *, force: bool) -> None:
    """A repeated run keeps the date of its first result, and what it had until that is confirmed or replaced."""
    if not (folder / SUMMARY).is_file():
        return
    try:
        earlier = RunResult.from_disk(folder)
    except DataError:
        return
    if earlier.run_id != result.run_id:
        session.reporter.notice(f"{folder}: held the run {earlier.run_id}, which {result.run_id} replaces")
        return
    result.created = earlier.created
    if not force:
        result.categories = {n: earlier.categories[n] for n in result.dataset.categories if n in earlier.categories}


def _start_run(prepared: Prepared, samples: Mapping[str, CategorySamples]) -> RunResult:
    request, run = prepared.request, prepared.run
    digest = digest_bytes(canonical_json({name: s.digest for name, s in sorted(samples.items())}).encode())
    preprocessing = prepared.preprocessing.model_dump(mode="json")
    identity = {
        "config": run.config_hash,
        "recipe": request.recipe,
        "weights": run.weights,
        "dataset": digest,
        "preprocessing": preprocessing,
        "selection": [request.selection.shots, request.selection.limit, request.selection.seed],
        "categories": prepared.categories,
        "full_resolution": request.full_resolution,
    }
    suffix = digest_bytes(canonical_json(identity).encode())[:8]
    result = RunResult(
        run_id=f"{run.definition.name}-{run.config.variant}-{prepared.dataset.name}-{suffix}",
        argv=list(request.argv),
        method=MethodInfo(
            name=run.definition.name,
            variant=run.config.variant,
            recipe=request.recipe,
            config=run.config_dump,
            config_hash=run.config_hash,
            method_version=str(run.definition.version),
        ),
        dataset=DatasetInfo(
            name=prepared.dataset.name,
            digest=digest,
            categories={name: CategoryCounts(**s.counts) for name, s in samples.items()},
        ),
        preprocessing=Preprocessing(
            protocol=prepared.preprocessing.protocol,
            parameters=preprocessing,
            key=digest_bytes(canonical_json(preprocessing).encode()),
        ),
        weights=[
            WeightsInfo(name=r.name, sha256=r.sha256, source=r.source, stand_in=not r.official)
            for r in prepared.records
        ],
        environment=environment(),
        seed=request.selection.seed,
        shots=request.selection.shots,
        limit=request.selection.limit,
        full_resolution=request.full_resolution,
    )
    for reason in not_comparable_reasons(prepared, samples):
        result.mark_not_comparable(reason)
    return result


def not_comparable_reasons(prepared: Prepared, samples: Mapping[str, CategorySamples]) -> list[str]:
    """Why the numbers of a run must not be put beside published ones."""
    from mmad_cli.datasets import published_train_counts
    from mmad_cli.methods import build_config

    request, run = prepared.request, prepared.run
    reasons = []
    if request.selection.limit is not None:
        reasons.append(f"limit: at most {request.selection.limit} samples per split and defect")
    if request.selection.shots is not None:
        reasons.append(f"shots: {request.selection.shots} training samples per category")
    left_out = [name for name in prepared.dataset.categories() if name not in prepared.categories]
    if left_out:
        reasons.append(f"missing categories: {', '.join(left_out)} not evaluated")
    published = published_train_counts(prepared.dataset.name)
    absent = [name for name in published if name not in prepared.dataset.categories()]
    if absent:
        reasons.append(f"missing categories: {', '.join(absent)} not in the dataset folder")
    for name, chosen in samples.items():
        if name in published and chosen.counts["train"] != published[name]:
            reasons.append(
                f"incomplete category: {name} has {chosen.counts['train']} training samples, "
                f"the published dataset {published[name]}"
            )
    reasons += [
        f"stand-in weights: {record.name} is not the published file"
        for record in prepared.records
        if not record.official
    ]
    default = build_config(run.definition, run.config.variant, request.recipe, {}).model_dump(mode="json")
    changed = [name for name, value in run.config_dump.items() if value != default[name]]
    if changed:
        reasons.append(f"settings: {', '.join(changed)} differ from the recipe")
    if prepared.preprocessing.protocol not in (run.definition.protocol, *run.definition.other_protocols):
        reasons.append(f"protocol: {prepared.preprocessing.protocol} instead of the method's {run.definition.protocol}")
    # both debris algorithms keep the same points
    by_hand = [name for name in request.preprocessing if name not in ("protocol", "debris")]
    if by_hand:
        reasons.append(f"preprocessing: {', '.join(by_hand)} set by hand")
    if request.full_resolution:
        reasons.append("full resolution: published metrics are at 224 x 224")
    if request.recipe != "official":
        reasons.append(f"recipe: {request.recipe} departs from the published code")
    return reasons


class _Clock:
    """Wall seconds per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stage = ""
        self._start = 0.0

    def __call__(self, stage: str) -> _Clock:
        self._stage = stage
        return self

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self._stage] = round(time.perf_counter() - self._start, 3)


def environment() -> Environment:
    """Versions without importing anything heavy; the device is filled in by what computes."""
    return Environment(
        mmad=__version__,
        git=_git_revision(),
        python=platform.python_version(),
        platform=platform.platform(),
        device="cpu",
        torch=library_version("torch"),
        timm=library_version("timm"),
        faiss=library_version("faiss"),
        open3d=library_version("open3d"),
        numpy=library_version("numpy"),
        **{"scikit-learn": library_version("scikit-learn")},
    )


def _git_revision() -> str | None:
    """Commit of a source checkout of mmad; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _device_name(session: Session) -> str:
    if session.resolve_device() == "cpu":
        return "cpu"
    import torch

    return f"cuda ({torch.cuda.get_device_name()})"


def _peak_rss() -> int | None:
    """Largest resident set of this process so far, in bytes."""
    try:
        import resource
    except ImportError:
        # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # kilobytes on Linux, bytes on macOS
    return int(peak if sys.platform == "darwin" else peak * 1024)


def _peak_vram() -> int | None:
    if "torch" not in sys.modules:
        return None
    import torch

    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else None

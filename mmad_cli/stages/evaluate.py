"""Stage five: run what is missing, score the test split, write a run."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmad_cli.errors import UNFORESEEN, DataError, MmadError, StoreError, UsageError, WeightsError, unforeseen
from mmad_cli.files import atomic_write, translated_os_errors
from mmad_cli.results.schema import (
    SUMMARY,
    BankInfo,
    CategoryResult,
    RunResult,
)
from mmad_cli.stages.experts import forget_experts
from mmad_cli.stages.peak_memory import PeakMemory, peak_rss
from mmad_cli.stages.plan import (
    CategoryPlan,
    CategorySamples,
    plan_category,
    select_samples,
)
from mmad_cli.stages.predict import fitted_method, predictions, read_prediction
from mmad_cli.stages.preprocess import StageReport, extract_category, preprocess_category
from mmad_cli.stages.provenance import device_name, peak_vram, start_run
from mmad_cli.stages.request import EvaluateRequest, Prepared, prepare
from mmad_cli.stages.scoring import Scoring
from mmad_cli.stages.session import Session
from mmad_cli.stages.shared import SharedPlan, plan_shared, train_shared
from mmad_cli.stages.timing import Stopwatch, metrics_name
from mmad_cli.store import CorruptArtefactError, RawIndex
from mmad_cli.store.keys import digest_bytes

if TYPE_CHECKING:
    from mmad_cli.datasets.base import Dataset

RUNS = "runs"
MAPS = "maps.safetensors"
# in the metadata of that file: what AUPRO multiplies maps by, as JSON by sample id, where that is not 1
AUPRO_SCALES = "aupro_scale"
_NAMED_AT_MOST = 5


@dataclass
class OpenRun:
    """A run whose categories are still to be computed, all or some: everything is looked up and planned."""

    prepared: Prepared
    result: RunResult
    folder: Path
    shared: SharedPlan | None
    plans: Mapping[str, CategoryPlan]
    failed: Mapping[str, str]

    def is_done(self, session: Session, category: str) -> bool:
        """Whether the store has everything that a category's part of the run folder is written from."""
        return _known_record(session, self.prepared, self.plans[category]) is not None

    def conclude(self, session: Session, category: str, failure: CategoryResult | None = None) -> None:
        """Enter a category and write the summary: its failure, or what the store has, computed here where needed."""
        if category in self.failed:
            outcome = CategoryResult(status="failed", error=self.failed[category])
        elif failure is not None:
            outcome = failure
        else:
            plan = self.plans[category]
            outcome, record = evaluate_category(session, self.prepared, plan, self.folder, self.shared)
            if record is not None:
                self.result.environment.device = record["device"]
                self.result.environment.device_reason = record.get("device_reason")
        if outcome.status == "failed":
            session.reporter.notice(f"{category}: failed: {outcome.error}")
        if outcome.sample_notes:
            _tell_notes(session, category, outcome.sample_notes)
            self.result.mark_not_comparable(
                f"sample notes: {len(outcome.sample_notes)} of {outcome.n_test} test samples of {category} were scored "
                "otherwise than the rest"
            )
        self.result.set_category(category, outcome)
        self.result.to_disk(self.folder)


def evaluate(session: Session, request: EvaluateRequest) -> tuple[RunResult, Path]:
    """Evaluate a method on a dataset, one category at a time; returns the result and the run's folder.

    The summary is written after each category, so an interrupted run keeps what it had. A category that fails is
    recorded with its error and the others go on.
    """
    return evaluate_all(session, [request])[0]


def evaluate_all(session: Session, requests: Sequence[EvaluateRequest]) -> list[tuple[RunResult, Path]]:
    """Evaluate several requests: one after the other, or all at once on the session's cluster."""
    if session.cluster is not None:
        from mmad_cli.stages.grid import evaluate_grid

        return evaluate_grid(session, requests)
    results = []
    for request in requests:
        run = open_run(session, request)
        for category in run.prepared.categories:
            run.conclude(session, category)
        results.append((run.result, run.folder))
    return results


def open_run(session: Session, request: EvaluateRequest) -> OpenRun:
    """Look up and plan a run; with `force`, forget what the store has of it."""
    prepared = prepare(session, request)
    index = RawIndex(session.store.root, prepared.dataset.root)
    samples: dict[str, CategorySamples] = {}
    failed: dict[str, str] = {}
    for category in prepared.categories:
        try:
            samples[category] = select_samples(session, prepared.dataset, category, request.selection, index=index)
        except DataError as error:
            failed[category] = str(error)
    result = start_run(prepared, samples)
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
    if request.force:
        if shared is not None:
            session.store.remove(shared.artefact)
        for plan in plans.values():
            forget(session, plan)
    return OpenRun(prepared, result, folder, shared, plans, failed)


def _tell_notes(session: Session, category: str, notes: Mapping[str, str]) -> None:
    """One line per kind of note, with the samples that it is about."""
    for note in dict.fromkeys(notes.values()):
        about = [id_ for id_, other in notes.items() if other == note]
        more = f" and {len(about) - _NAMED_AT_MOST} more" if len(about) > _NAMED_AT_MOST else ""
        session.reporter.notice(f"{category}: {note}: {', '.join(about[:_NAMED_AT_MOST])}{more}")


def forget(session: Session, plan: CategoryPlan) -> None:
    """Drop what the store has for this plan, so that everything is computed again."""
    for job in plan.clean.values():
        session.store.remove(job.artefact)
    for jobs in plan.features.values():
        for feature in jobs.values():
            session.store.remove(feature.artefact)
    for artefact in (plan.fit, plan.result, *plan.predictions.values()):
        session.store.remove(artefact)
    if plan.experts is not None:
        forget_experts(session, plan.experts)


def evaluate_category(
    session: Session,
    prepared: Prepared,
    plan: CategoryPlan,
    folder: Path,
    shared: SharedPlan | None = None,
) -> tuple[CategoryResult, dict[str, Any] | None]:
    """Result of one category and the stored record that it comes from; computed only where it is not known."""
    record, failure = compute_record(session, prepared, plan, shared)
    if record is None or failure is not None:
        return failure or CategoryResult(status="failed"), None
    failure = _failure_of(
        lambda: _write_category_files(session, prepared, plan, record, folder / _folder_name(plan.samples.category))
    )
    if failure is not None:
        return failure, None
    return CategoryResult.model_validate(record["result"]), record


def compute_record(
    session: Session, prepared: Prepared, plan: CategoryPlan, shared: SharedPlan | None
) -> tuple[dict[str, Any] | None, CategoryResult | None]:
    """The stored record of a category, computed where it is missing, or its failure."""
    record: dict[str, Any] = {}

    def compute() -> None:
        known = _known_record(session, prepared, plan)
        if known is None:
            known = _compute_category(session, prepared, plan, shared)
            session.store.write_record(plan.result, known)
        record.update(known)

    failure = _failure_of(compute)
    return (None, failure) if failure is not None else (record, None)


def _failure_of(work: Callable[[], None]) -> CategoryResult | None:
    """Do the work of one category; what it failed with, if it did and that is not everybody's failure."""
    try:
        work()
    except (UsageError, WeightsError, StoreError):
        # not this category's fault: the others would fail alike
        raise
    except MmadError as error:
        return CategoryResult(status="failed", error=str(error))
    except UNFORESEEN as error:
        # a defect of ours or of a third party's method must not cost the other categories
        return CategoryResult(status="failed", error=unforeseen(error))
    return None


def _known_record(session: Session, prepared: Prepared, plan: CategoryPlan) -> dict[str, Any] | None:
    record = _stored_result(session, plan)
    return None if prepared.request.save_maps and not _maps_complete(session, plan) else record


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
    with Scoring(session, prepared, plan) as scoring:
        with clock("predict"):
            scored = predictions(session, plan, prepared.run, method, scored=scoring.take)
            # a plan has validation samples only where they are scored
            validated = predictions(session, plan, prepared.run, method, plan.samples.validation)
        watch = Stopwatch()
        with clock("metrics"):
            values, reasons = scoring.metrics(scored, validated)
        watch.lap(len(scored))
    watch.record(session, metrics_name(prepared.request.full_resolution))
    result = CategoryResult(
        status="ok",
        metrics=values,
        metrics_null_reasons=reasons,
        n_train=len(plan.samples.train),
        n_test=len(plan.samples.test),
        bank={name: BankInfo(**size) for name, size in info["banks"].items()},
        seconds=clock.seconds,
        peak_rss_bytes=peak_rss(),
        peak_rss_bytes_by_stage=clock.peaks,
        peak_vram_bytes=peak_vram(),
        training=info.get("losses", {}),
        sample_notes={
            ref.id: prediction.note
            for ref, prediction in zip(plan.samples.test, scored, strict=True)
            if prediction.note
        },
    )
    return {
        "result": result.model_dump(mode="json"),
        "device": device_name(session),
        "device_reason": session.device_reason(),
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
    known = {id_: prediction for id_, prediction in found.items() if prediction is not None}
    maps = {id_: prediction.anomaly_map for id_, prediction in known.items()}
    scales = {id_: prediction.aupro_scale for id_, prediction in known.items() if prediction.aupro_scale != 1.0}
    atomic_write(folder / MAPS, save(maps, metadata={AUPRO_SCALES: json.dumps(scales)} if scales else None))


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


class _Clock:
    """Wall seconds and peak memory per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._stage = ""
        self._start = 0.0
        self._memory = PeakMemory()

    def __call__(self, stage: str) -> _Clock:
        self._stage = stage
        return self

    def __enter__(self) -> None:
        self._memory = PeakMemory()
        self._memory.__enter__()
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self._stage] = round(time.perf_counter() - self._start, 3)
        self._memory.__exit__()
        if self._memory.bytes is not None:
            self.peaks[self._stage] = self._memory.bytes

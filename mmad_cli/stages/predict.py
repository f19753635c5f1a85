"""Stages three and four for one category: a fitted method, then a score and a map per test sample."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmad_cli.errors import DataError
from mmad_cli.files import translated_os_errors
from mmad_cli.methods.base import Prediction, Trained
from mmad_cli.stages.checkpoints import load_checkpoint
from mmad_cli.stages.clean import recomputed
from mmad_cli.stages.experts import LookedSample, experts_of, ready_experts
from mmad_cli.stages.features import StoredFeatures, StoredSample
from mmad_cli.stages.overlap import Behind
from mmad_cli.stages.plan import FIT, PREDICT, CategoryPlan, MethodRun
from mmad_cli.stages.session import Session
from mmad_cli.stages.shared import WORK, load_shared
from mmad_cli.stages.timing import Stopwatch, method_name
from mmad_cli.store import Artefact, CorruptArtefactError
from mmad_cli.types import SampleRef

if TYPE_CHECKING:
    from mmad_cli.methods.base import Method


def stored_sample(session: Session, plan: CategoryPlan, ref: SampleRef, method: Method) -> StoredSample:
    """Features of one sample, and what the method's experts say of it where it has some."""
    jobs = {name: by_id[ref.id] for name, by_id in plan.features.items() if ref.id in by_id}
    plain = StoredSample(ref.id, jobs, session.resolve_device(), session.reporter.notice)
    if plan.experts is None:
        return plain
    looks = {name: by_id[ref.id] for name, by_id in plan.experts.looks.items() if ref.id in by_id}
    return LookedSample(plain.id, plain.jobs, plain.device, plain.notice, looks, experts_of(method), session)


def stored_features(session: Session, plan: CategoryPlan, refs: Sequence[SampleRef], method: Method) -> StoredFeatures:
    """Features of several samples."""
    return StoredFeatures([stored_sample(session, plan, ref, method) for ref in refs])


def fitted_method(session: Session, plan: CategoryPlan, run: MethodRun) -> tuple[Method, dict[str, Any]]:
    """The fitted method from the store, fitted first where it is missing or damaged."""
    store = session.store
    with store.lock(plan.fit):
        try:
            return _load(session, plan, run)
        except FileNotFoundError:
            pass
        except CorruptArtefactError as error:
            session.reporter.notice(recomputed(error))
        method = _unfitted(session, plan, run)
        if plan.checkpoint is not None:
            load_checkpoint(method, plan.checkpoint)
            return method, _keep(session, plan, method)
        if not plan.samples.train:
            raise DataError(f"category {plan.samples.category}: no training sample in train/good")
        train = stored_features(session, plan, plan.samples.train, method)
        validation = stored_features(session, plan, plan.samples.validation, method)
        work = store.root / WORK / plan.fit.key
        with session.reporter.task(f"{plan.samples.category}: fitting", 0) as advance:
            watch = Stopwatch()
            from_start = _fit(method, train, validation, run.seed, work, advance)
            watch.lap(len(train))
        info = _keep(session, plan, method)
        shutil.rmtree(work, ignore_errors=True)
        if from_start:
            watch.record(session, method_name(FIT, run, session.resolve_device(), len(train)))
        return method, info


def _keep(session: Session, plan: CategoryPlan, method: Method) -> dict[str, Any]:
    """Put a fitted method into the store; returns what is recorded with it."""
    info: dict[str, Any] = {"banks": {name: {"rows": b.rows, "dim": b.dim} for name, b in method.banks().items()}}
    if isinstance(method, Trained):
        info["losses"] = method.losses()
    with session.store.write_folder(plan.fit, info) as folder:
        method.save(folder)
    return info


def _fit(
    method: Method,
    train: StoredFeatures,
    validation: StoredFeatures,
    seed: int,
    work: Path,
    advance: Callable[[int, int], None],
) -> bool:
    """Fit, going on from what an interrupted training left in `work`; whether it began at the start."""
    if not isinstance(method, Trained):
        method.fit(train, validation, seed=seed, progress=advance)
        return True
    with translated_os_errors(work):
        work.mkdir(parents=True, exist_ok=True)
        from_start = not any(work.iterdir())
    method.fit_resumable(train, validation, seed=seed, folder=work, progress=advance)
    return from_start


def _load(session: Session, plan: CategoryPlan, run: MethodRun) -> tuple[Method, dict[str, Any]]:
    folder, info = session.store.read_folder(plan.fit)
    method = _unfitted(session, plan, run)
    method.load(folder)
    return method, info


def _unfitted(session: Session, plan: CategoryPlan, run: MethodRun) -> Method:
    method = run.build(session.resolve_device())
    if plan.shared is not None:
        load_shared(session, plan.shared, method)
    if plan.experts is not None:
        train = stored_features(session, plan, plan.samples.train, method)
        ready_experts(session, plan.experts, train, run, method, plan.samples.category)
    return method


def read_prediction(session: Session, artefact: Artefact) -> Prediction | None:
    """A stored prediction; None where it is missing or damaged (said so)."""
    try:
        tensors, record = session.store.read_tensors(artefact)
    except FileNotFoundError:
        return None
    except CorruptArtefactError as error:
        session.reporter.notice(recomputed(error))
        session.store.remove(artefact)
        return None
    scale = float(tensors["aupro_scale"][0]) if "aupro_scale" in tensors else 1.0
    return Prediction(tensors["anomaly_map"], float(tensors["image_score"][0]), scale, record.get("note", ""))


def write_prediction(session: Session, artefact: Artefact, prediction: Prediction) -> None:
    """Store a prediction. Raises DataError for scores that are not finite."""
    tensors: dict[str, NDArray[Any]] = {
        "anomaly_map": np.asarray(prediction.anomaly_map, dtype=np.float32),
        "image_score": np.asarray([prediction.image_score], dtype=np.float64),
    }
    if prediction.aupro_scale != 1.0:
        tensors["aupro_scale"] = np.asarray([prediction.aupro_scale], dtype=np.float64)
    session.store.write_tensors(artefact, tensors, {"note": prediction.note} if prediction.note else {})


def predictions(
    session: Session,
    plan: CategoryPlan,
    run: MethodRun,
    method: Method | None,
    refs: Sequence[SampleRef] | None = None,
    scored: Callable[[SampleRef, Prediction], None] | None = None,
) -> list[Prediction]:
    """A prediction per test sample in order, or per sample of `refs`; only what is missing is computed.

    scored: told of each prediction as soon as it is there, those of the store first.
    """
    refs = plan.samples.test if refs is None else refs
    found: dict[str, Prediction] = {}

    def keep(ref: SampleRef, prediction: Prediction) -> None:
        found[ref.id] = prediction
        if scored is not None:
            scored(ref, prediction)

    for ref in refs:
        if (known := read_prediction(session, plan.predictions[ref.id])) is not None:
            keep(ref, known)
    missing = [ref for ref in refs if ref.id not in found]
    if missing:
        method = method or fitted_method(session, plan, run)[0]
        watch = Stopwatch()
        with session.reporter.task(f"{plan.samples.category}: scoring", len(missing)) as advance, Behind() as behind:
            samples = stored_features(session, plan, missing, method)
            for done, (ref, sample) in enumerate(zip(missing, samples, strict=True), start=1):
                prediction = method.predict(sample)
                numbers = (prediction.image_score, prediction.aupro_scale)
                if not (np.isfinite(prediction.anomaly_map).all() and np.isfinite(numbers).all()):
                    raise DataError(f"{plan.samples.category} {ref.id}: the method gave a score that is not finite")
                behind.hand_over(partial(write_prediction, session, plan.predictions[ref.id], prediction))
                keep(ref, prediction)
                watch.lap(done)
                advance(done, len(missing))
        watch.record(session, method_name(PREDICT, run, session.resolve_device(), len(plan.samples.train)))
    return [found[ref.id] for ref in refs]

"""Metrics of one category: ground truth and maps in one geometry, made ready while the method still scores."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING

from mmad_cli.memory.limit import bounded_empty, fits
from mmad_cli.stages.clean import load_clean
from mmad_cli.types import BoolArray, FloatArray, SampleRef

if TYPE_CHECKING:
    from mmad_cli.methods.base import Prediction
    from mmad_cli.stages.plan import CategoryPlan
    from mmad_cli.stages.request import Prepared
    from mmad_cli.stages.session import Session


class Scoring:
    """Takes predictions one by one; a thread reads their ground truth meanwhile. Use it as a context manager."""

    def __init__(self, session: Session, prepared: Prepared, plan: CategoryPlan) -> None:
        self._session, self._prepared, self._plan = session, prepared, plan
        self._view = prepared.run.build("cpu").view
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ground-truth")
        self._ready: dict[str, Future[tuple[BoolArray, FloatArray]]] = {}

    def __enter__(self) -> Scoring:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def take(self, ref: SampleRef, prediction: Prediction) -> None:
        """Get the ground truth of a scored sample ready."""
        self._ready[ref.id] = self._thread.submit(self._mask_and_map, ref, prediction)

    def metrics(
        self, scored: Sequence[Prediction], validated: Sequence[Prediction]
    ) -> tuple[dict[str, float | None], dict[str, str]]:
        """Every metric of the test split, and why a metric is null.

        scored: predictions of the test samples in order, all of them taken before; validated: those of the validation
        samples.
        """
        import numpy as np

        from mmad_cli.metrics import all_metrics

        test, run = self._plan.samples.test, self._prepared.run
        ready = [self._ready[ref.id].result() for ref in test]
        masks, maps = [mask for mask, _ in ready], [one for _, one in ready]
        labels = np.array([ref.label for ref in test])
        scores = np.array([prediction.image_score for prediction in scored])
        scaled = None
        if any(prediction.aupro_scale != 1.0 for prediction in scored):
            scaled = [_held(one * np.float32(p.aupro_scale)) for one, p in zip(maps, scored, strict=True)]
        with_validation = run.reads_validation or run.scores_validation
        good = [prediction.image_score for prediction in validated] if with_validation else None
        result = all_metrics(
            labels, scores, masks, maps, aupro_maps=scaled, validation_scores=good, empty=bounded_empty
        )
        return dict(result.values), dict(result.reasons)

    def _mask_and_map(self, ref: SampleRef, prediction: Prediction) -> tuple[BoolArray, FloatArray]:
        from mmad_cli.stages.masks import map_at_size, mask_in_view

        clean = load_clean(self._plan.clean[ref.id], self._session.reporter.notice)
        if self._prepared.request.full_resolution:
            return clean.mask, _held(map_at_size(prediction.anomaly_map, clean.mask.shape))
        return mask_in_view(clean, self._view, len(prediction.anomaly_map)), prediction.anomaly_map


def _held(one: FloatArray) -> FloatArray:
    """The same map where a memory limit wants it."""
    if fits(one.nbytes):
        return one
    held = bounded_empty(one.shape, one.dtype)
    held[...] = one
    return held

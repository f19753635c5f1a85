"""All metrics of one category from one pass over its images, under the names that results and reports use."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from mmad_cli.metrics.arrays import AnyArray, ImageStack, read_labels_and_scores
from mmad_cli.metrics.pro import exact_curve, grid_curve, normalised_areas
from mmad_cli.metrics.ranking import (
    Empty,
    OperatingPoints,
    RankedPixels,
    missing_image_class,
    operating_points,
    rank_pixels,
)
from mmad_cli.metrics.roc import (
    area_under_precision,
    area_under_roc,
    best_f1,
    false_positive_rate_at,
    threshold_at_fpr,
)
from mmad_cli.types import BoolArray

# Raised whenever a value can change for the same masks and maps
METRICS_VERSION = 2

IMAGE_KEYS = ("i_auroc", "i_ap", "i_f1max", "i_fpr95")
# at the threshold that 0.5 % of the good validation images exceed; only where these were scored
VALIDATION_KEYS = ("i_fpr_val", "i_tpr_val")
PIXEL_KEYS = ("p_auroc", "p_ap", "p_f1max", "p_fpr95")

# Number of thresholds (None: exact) and, for each key, the limit on the false-positive rate
AUPRO_RULES: tuple[tuple[int | None, dict[str, float]], ...] = (
    (None, {"aupro_30": 0.3, "aupro_10": 0.1, "aupro_05": 0.05, "aupro_01": 0.01}),
    (100, {"aupro_30_grid100": 0.3}),
    (99, {"aupro_30_grid99": 0.3, "aupro_10_grid99": 0.1, "aupro_05_grid99": 0.05, "aupro_01_grid99": 0.01}),
)
AUPRO_KEYS = tuple(key for _, limits in AUPRO_RULES for key in limits)
METRIC_KEYS = IMAGE_KEYS + PIXEL_KEYS + AUPRO_KEYS

NO_VALIDATION = "no validation image"


@dataclass(frozen=True)
class MetricsResult:
    """`values` holds every key of `METRIC_KEYS` in that order, and those of `VALIDATION_KEYS` where validation images
    were scored; `reasons` says why a value is None.
    """

    values: dict[str, float | None]
    reasons: dict[str, str] = field(default_factory=dict)


def all_metrics(
    labels: ArrayLike,
    image_scores: ArrayLike,
    masks: ImageStack,
    maps: ImageStack,
    *,
    aupro_maps: ImageStack | None = None,
    validation_scores: ArrayLike | None = None,
    empty: Empty = np.empty,
) -> MetricsResult:
    """Every metric of one category; what is undefined is None with a reason instead of an error.

    labels 0 or 1 (N,); image_scores real (N,); masks bool and maps float, (N, H, W) or N arrays (H, W) of any
    sizes. `aupro_maps` replaces `maps` for the AUPRO values, for methods that scale the two differently (CFM,
    arXiv 2312.04521, and those built on it). `validation_scores` (V,), of good images that are not tested, give the
    threshold of `i_fpr_val` and `i_tpr_val`. `empty` makes the array of all normal pixels, as numpy.empty does. An
    image whose mask vanished keeps its label. Raises ValueError when counts or shapes differ, labels or masks hold
    other values than 0 and 1, or scores or maps are not finite.

    >>> masks, maps = np.array([[[0, 0]], [[0, 1]]]), np.array([[[0.1, 0.2]], [[0.3, 0.9]]])
    >>> result = all_metrics([0, 1], [0.2, 0.9], masks, maps)
    >>> result.values["i_auroc"], result.values["aupro_30"], result.reasons
    (1.0, 1.0, {})
    >>> all_metrics([0], [0.2], np.zeros((1, 1, 2)), np.ones((1, 1, 2))).reasons["i_auroc"]
    'no anomalous test image'
    """
    flags, scores = read_labels_and_scores(labels, image_scores)
    if len(flags) != len(masks):
        raise ValueError(f"labels and masks must have one length, got {len(flags)} and {len(masks)}")
    pixels = rank_pixels(masks, maps, empty)
    aupro_pixels = pixels if aupro_maps is None else rank_pixels(masks, aupro_maps, empty)
    values = {
        **_image_values(flags, scores),
        **_validation_values(flags, scores, validation_scores),
        **_pixel_values(pixels),
        **_aupro_values(aupro_pixels),
    }
    image_reason, pixel_reason = missing_image_class(flags), pixels.undefined
    keys = METRIC_KEYS if validation_scores is None else METRIC_KEYS + VALIDATION_KEYS
    scored = validation_scores is not None and np.asarray(validation_scores).size > 0
    validation_reason = image_reason or (None if scored else NO_VALIDATION)
    reasons = (
        dict.fromkeys(IMAGE_KEYS, image_reason)
        | dict.fromkeys(VALIDATION_KEYS, validation_reason)
        | dict.fromkeys(PIXEL_KEYS + AUPRO_KEYS, pixel_reason)
    )
    return MetricsResult(
        values={key: values.get(key) for key in keys},
        reasons={key: reason for key, reason in reasons.items() if reason and key in keys},
    )


def _image_values(flags: BoolArray, scores: AnyArray) -> dict[str, float]:
    if missing_image_class(flags):
        return {}
    points = operating_points(np.sort(scores[~flags]), np.sort(scores[flags]))
    fpr95 = false_positive_rate_at(points, 0.95)
    return dict(zip(IMAGE_KEYS, (*_ranking_values(points), fpr95), strict=True))


def _validation_values(flags: BoolArray, scores: AnyArray, validation: ArrayLike | None) -> dict[str, float]:
    if validation is None or not np.asarray(validation).size or missing_image_class(flags):
        return {}
    alarms = scores > threshold_at_fpr(validation)
    return dict(zip(VALIDATION_KEYS, (float(alarms[~flags].mean()), float(alarms[flags].mean())), strict=True))


def _pixel_values(pixels: RankedPixels) -> dict[str, float]:
    if pixels.undefined:
        return {}
    fpr95 = false_positive_rate_at(pixels.points, 0.95)
    return dict(zip(PIXEL_KEYS, (*_ranking_values(pixels.points), fpr95), strict=True))


def _ranking_values(points: OperatingPoints) -> tuple[float, float, float]:
    return area_under_roc(points), area_under_precision(points), best_f1(points)


def _aupro_values(pixels: RankedPixels) -> dict[str, float]:
    if pixels.undefined:
        return {}
    values: dict[str, float] = {}
    for thresholds, limits in AUPRO_RULES:
        curve = exact_curve(pixels) if thresholds is None else grid_curve(pixels, thresholds)
        values.update(zip(limits, normalised_areas(curve, list(limits.values())), strict=True))
    return values

"""ROC area, average precision, largest F1, and the false-positive rate at a wanted hit rate.

All are exact: every distinct score is a threshold and equal scores are taken together.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from mmad_cli.metrics.arrays import ImageStack, read_labels_and_scores
from mmad_cli.metrics.ranking import OperatingPoints, operating_points, rank_pixels, require_both_classes


def image_auroc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve of image scores.

    It is the chance that an anomalous image scores above a normal one, ties counting half. labels (N,) 0 or
    1, scores (N,) real, larger = more anomalous. Result in [0, 1]. Raises ValueError when shapes differ, a
    score is not finite or only one class is there. Source: Fawcett (2006), section 7.

    >>> image_auroc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
    0.75
    """
    return area_under_roc(_points(labels, scores))


def pixel_auroc(masks: ImageStack, maps: ImageStack) -> float:
    """Area under the ROC curve over all pixels of all images, normal images included.

    masks bool and maps float, (N, H, W) or N arrays (H, W) of any sizes. Result in [0, 1]. Raises ValueError
    on unequal shapes, non-finite maps, or when there is no defect or no normal pixel.

    >>> pixel_auroc(np.array([[[0, 0, 1, 1]]]), np.array([[[0.1, 0.4, 0.35, 0.8]]]))
    0.75
    """
    pixels = rank_pixels(masks, maps)
    require_both_classes(pixels)
    return area_under_roc(pixels.points)


def average_precision(labels: ArrayLike, scores: ArrayLike) -> float:
    """Precision at each threshold weighted by the recall gained there, without interpolation.

    labels and scores of one shape (any), as in `image_auroc`, with the same errors. Result in (0, 1].
    Source: Manning, Raghavan, Schuetze, "Introduction to Information Retrieval", section 8.4.

    >>> round(average_precision([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]), 4)
    0.8333
    """
    return area_under_precision(_points(labels, scores))


def f1_max(labels: ArrayLike, scores: ArrayLike) -> float:
    """Largest F1 score over all thresholds, F1 = 2 TP / (2 TP + FP + FN).

    labels and scores of one shape (any), as in `image_auroc`, with the same errors. Result in (0, 1].

    >>> f1_max([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
    0.8
    """
    return best_f1(_points(labels, scores))


def fpr_at_tpr(labels: ArrayLike, scores: ArrayLike, tpr: float = 0.95) -> float:
    """Smallest false-positive rate of a threshold that finds at least the fraction `tpr` of the positives.

    labels and scores of one shape (any), as in `image_auroc`, with the same errors; `tpr` in (0, 1].
    Thresholds are scores that occur: nothing is interpolated. Result in [0, 1].

    >>> fpr_at_tpr([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
    0.5
    """
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr must be in (0, 1], got {tpr}")
    return false_positive_rate_at(_points(labels, scores), tpr)


def threshold_at_fpr(normal_scores: ArrayLike, fpr: float = 0.005) -> float:
    """Lowest threshold among good scores (N,) that at most the fraction `fpr` of them exceeds; an alarm is above it.

    Of fewer than 1 / fpr scores it is the largest. Raises ValueError without scores, for scores that are not finite
    and for `fpr` outside [0, 1).

    >>> threshold_at_fpr([0.1, 0.4, 0.2, 0.3], 0.25)
    0.3
    """
    values = np.sort(np.asarray(normal_scores, dtype=np.float64).ravel())
    if not values.size or not np.isfinite(values).all():
        raise ValueError(f"normal_scores must hold finite scores, got {values.size} of them")
    if not 0 <= fpr < 1:
        raise ValueError(f"fpr must be in [0, 1), got {fpr}")
    # 0.1 * 10 must allow one of ten in spite of rounding
    return float(values[values.size - 1 - int(fpr * values.size + 1e-9)])


def area_under_roc(points: OperatingPoints) -> float:
    """ROC area of counted points: the Mann-Whitney statistic over the number of pairs, in integers."""
    gained = np.diff(points.true_positives, prepend=0)
    beaten_twice = 2 * points.n_negatives - points.false_positives - points.false_positives_above
    return int(gained @ beaten_twice) / (2 * points.n_positives * points.n_negatives)


def area_under_precision(points: OperatingPoints) -> float:
    """Average precision of counted points; recall changes at positive scores only."""
    gained = np.diff(points.true_positives, prepend=0)
    precision = points.true_positives / (points.true_positives + points.false_positives)
    # Dividing last keeps a perfect ranking at exactly 1
    return float(gained @ precision) / points.n_positives


def best_f1(points: OperatingPoints) -> float:
    """Largest F1 of counted points; a threshold between two positive scores only adds false positives."""
    found = points.true_positives
    return float(np.max(2 * found / (found + points.false_positives + points.n_positives)))


def false_positive_rate_at(points: OperatingPoints, tpr: float) -> float:
    """False-positive rate of the first counted point whose hit rate is at least `tpr`."""
    first = int(np.argmax(points.true_positives / points.n_positives >= tpr))
    return int(points.false_positives[first]) / points.n_negatives


def _points(labels: ArrayLike, scores: ArrayLike) -> OperatingPoints:
    flags, values = read_labels_and_scores(labels, scores)
    negatives, positives = np.sort(values[~flags]), np.sort(values[flags])
    if not positives.size or not negatives.size:
        raise ValueError(f"labels must hold both classes, got {negatives.size} normal and {positives.size} anomalous")
    return operating_points(negatives, positives)

"""ROC, precision-recall and per-region-overlap curves as short lists of points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmad_cli.types import BoolArray, FloatArray

if TYPE_CHECKING:
    from mmad_cli.metrics.ranking import OperatingPoints

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]

POINTS = 360
_DECIMALS = 5
# False-positive rates below this look alike on every axis of the report
_SMALLEST_RATE = 1e-3


def roc_curve(points: OperatingPoints) -> Curve:
    """False- and true-positive rate, both rising from (0, 0) to (1, 1); equal scores make one slanted piece.

    Source: Fawcett, "An introduction to ROC analysis" (2006), algorithm 1.
    """
    found = points.true_positives / points.n_positives
    before = np.concatenate([[0.0], found[:-1]])
    rate = np.stack([points.false_positives_above, points.false_positives], axis=1) / points.n_negatives
    height = np.stack([before, found], axis=1)
    return np.concatenate([[0.0], rate.ravel(), [1.0]]), np.concatenate([[0.0], height.ravel(), [1.0]])


def precision_recall_curve(points: OperatingPoints) -> Curve:
    """Recall and precision as the steps whose area is the average precision.

    Source: Manning, Raghavan, Schuetze, "Introduction to Information Retrieval", section 8.4.
    """
    recall = points.true_positives / points.n_positives
    precision = points.true_positives / (points.true_positives + points.false_positives)
    before = np.concatenate([[0.0], recall[:-1]])
    return np.stack([before, recall], axis=1).ravel(), np.repeat(precision, 2)


def thin(curve: Curve, count: int = POINTS) -> Curve:
    """At most `count` of a curve's points, close together where it moves, and where x is small.

    x (K,) not falling and not negative, y (K,). The first and the last point stay.
    """
    x, y = curve
    if len(x) <= count:
        return curve
    moved = np.abs(np.diff(x)) + np.abs(np.diff(y)) + np.abs(np.diff(np.log10(x + _SMALLEST_RATE))) / 3
    way = np.concatenate([[0.0], np.cumsum(moved)])
    chosen = np.unique(np.searchsorted(way, np.linspace(0.0, way[-1], count - 1)))
    chosen = np.unique(np.append(np.minimum(chosen, len(x) - 1), len(x) - 1))
    return x[chosen], y[chosen]


def image_curves(labels: Sequence[int], scores: Sequence[float]) -> dict[str, Any]:
    """ROC and precision-recall curve of the image scores, or `{"reason": ...}` where a class is missing."""
    from mmad_cli.metrics.ranking import missing_image_class, operating_points

    flags, values = np.asarray(labels, dtype=np.bool_), np.asarray(scores, dtype=np.float64)
    reason = missing_image_class(flags)
    if reason:
        return {"reason": reason}
    points = operating_points(np.sort(values[~flags]), np.sort(values[flags]))
    return {"roc": _plain(roc_curve(points)), "pr": _plain(precision_recall_curve(points))}


def pixel_curves(
    masks: Sequence[BoolArray], maps: Sequence[FloatArray], aupro_maps: Sequence[FloatArray] | None = None
) -> dict[str, Any]:
    """ROC, precision-recall and per-region-overlap curve of all pixels, or `{"reason": ...}`.

    masks bool and maps float, N arrays (H, W). `aupro_maps` replaces the maps for the overlap curve. `aupro_30` is
    the area below that curve up to 30 % divided by 0.3, to hold against the recorded one.
    """
    from mmad_cli.metrics.pro import exact_curve, normalised_areas
    from mmad_cli.metrics.ranking import rank_pixels

    pixels = rank_pixels(masks, maps)
    if pixels.undefined:
        return {"reason": pixels.undefined}
    overlap = exact_curve(pixels if aupro_maps is None else rank_pixels(masks, aupro_maps))
    return {
        "roc": _plain(roc_curve(pixels.points)),
        "pr": _plain(precision_recall_curve(pixels.points)),
        "pro": _plain(overlap),
        "aupro_30": normalised_areas(overlap, [0.3])[0],
    }


def _plain(curve: Curve) -> list[list[float]]:
    x, y = thin(curve)
    return [np.round(x, _DECIMALS).tolist(), np.round(y, _DECIMALS).tolist()]


def best_threshold(labels: Sequence[int], scores: Sequence[float]) -> float | None:
    """The score from which on an image counts as anomalous where F1 is largest; None without both classes.

    Halfway to the next lower score, so that the threshold is no score itself.
    """
    flags, values = np.asarray(labels, dtype=np.bool_), np.asarray(scores, dtype=np.float64)
    if not flags.any() or flags.all():
        return None
    steps = np.unique(values)
    called = values[None, :] >= steps[:, None]
    found = (called & flags).sum(axis=1)
    f1 = 2 * found / (called.sum(axis=1) + flags.sum())
    best = int(np.argmax(f1))
    return float(steps[best] if best == 0 else (steps[best - 1] + steps[best]) / 2)

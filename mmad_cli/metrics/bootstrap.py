"""How much a metric depends on which test images there happen to be: bootstrap intervals.

Test images are drawn anew, with replacement, as often as there are: so many good ones among the good, so many
anomalous ones among the anomalous. Each draw gives the metric another value; the middle 95 % of these values are the
interval. Drawing within the classes keeps every draw defined and the share of anomalous images, on which precision
depends, as it is.

A draw is a vector of weights: how often each image was drawn. All draws are computed at once, on counts that are
sorted once, so that 1000 draws of 110 images take milliseconds.

Sources: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13 (percentile interval); Robin et
al., "pROC", BMC Bioinformatics 12:77 (2011) (drawing within the classes).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmad_cli.metrics.arrays import ImageStack, read_images, read_labels, read_labels_and_scores
from mmad_cli.metrics.ranking import label_regions
from mmad_cli.metrics.summary import AUPRO_RULES

Floats = NDArray[np.float64]
Weights = NDArray[np.float64]
Draws = dict[str, Floats]

# Of draws that are computed at once: bounds the memory of the intermediate curves
_CELLS_AT_ONCE = 4_000_000

# Of the pixel curves. Half of them lie where at most 5 % of the normal pixels are above
_THRESHOLDS = 1000

# The published grids begin at the highest normal pixel, and which one that is depends on the images that are drawn
_HIGHEST_OF_IMAGES = 300


def draw_weights(labels: ArrayLike, draws: int = 1000, seed: int = 0) -> Weights:
    """How often each image is drawn, float64 (draws, N), whole numbers; rows add up to N.

    labels (N,) 0 or 1. Drawn with replacement within the good and within the anomalous images. Raises ValueError when
    draws is below 1 or a label is not 0 or 1.

    >>> draw_weights([0, 1, 1], draws=2).sum(axis=1)
    array([3., 3.])
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    flags = read_labels(labels)
    generator = np.random.default_rng(seed)
    weights = np.zeros((draws, len(flags)))
    for members in (np.flatnonzero(~flags), np.flatnonzero(flags)):
        if members.size:
            share = np.full(members.size, 1 / members.size)
            weights[:, members] = generator.multinomial(members.size, share, size=draws)
    return weights


def image_draws(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike) -> Draws:
    """The image metrics of every draw: `i_auroc`, `i_ap`, `i_f1max`, `i_fpr95`, float64 (B,) each.

    labels (N,) 0 or 1, scores (N,) real, weights (B, N) not negative, as of `draw_weights`. The values are those of
    `mmad_cli.metrics.image_auroc` and its siblings on the images repeated as the weights say. Raises ValueError when
    shapes differ, a score is not finite, or a draw lacks one of the classes.

    >>> image_draws([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8], [[1, 1, 1, 1], [2, 0, 1, 1]])["i_auroc"]
    array([0.75, 1.  ])
    """
    flags, values = read_labels_and_scores(labels, scores)
    table = _read_weights(weights, len(flags))
    order = np.argsort(-values, kind="stable")
    ranked = values[order]
    # Equal scores are taken together: only the last of each group is an operating point
    ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True)) if len(ranked) else np.empty(0, np.int64)
    parts = []
    for rows in _in_blocks(table, len(flags)):
        drawn = rows[:, order]
        hits = np.cumsum(drawn * flags[order], axis=1)[:, ends]
        alarms = np.cumsum(drawn * ~flags[order], axis=1)[:, ends]
        parts.append(_image_values(hits, alarms))
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _image_values(hits: Floats, alarms: Floats) -> Draws:
    """Metrics from true and false positives (B, K) at falling thresholds."""
    positives, negatives = hits[:, -1], alarms[:, -1]
    if not (positives.all() and negatives.all()):
        raise ValueError("weights must leave at least one image of each class in every draw")
    gained = np.diff(hits, axis=1, prepend=0)
    # 0 of 0 where no image of the highest scores was drawn; nothing is gained there
    precision = hits / np.maximum(hits + alarms, 1e-300)
    enough = np.argmax(hits >= 0.95 * positives[:, None] * (1 - 1e-12), axis=1)
    return {
        **_roc(hits, alarms),
        "i_ap": (gained * precision).sum(axis=1) / positives,
        "i_f1max": (2 * hits / (hits + alarms + positives[:, None])).max(axis=1),
        "i_fpr95": np.take_along_axis(alarms, enough[:, None], axis=1)[:, 0] / negatives,
    }


def _roc(hits: Floats, alarms: Floats) -> Draws:
    """Area under the ROC curve, ties counting half."""
    gained = np.diff(hits, axis=1, prepend=0)
    before = np.concatenate([np.zeros((len(alarms), 1)), alarms[:, :-1]], axis=1)
    negatives = alarms[:, -1:]
    area = (gained * (negatives - (alarms + before) / 2)).sum(axis=1)
    return {"i_auroc": area / (hits[:, -1] * negatives[:, 0])}


@dataclass(frozen=True)
class PixelCounts:
    """What the pixel curves of a category need, per image (N) and falling threshold (K), float64.

    `normal` and `defect` (N, K): pixels of the class that score above the threshold. `overlap` (N, K): the fraction
    above, added over the regions of the image. `regions` (N,): their number. The first threshold has nothing above
    it, the last one everything.
    """

    normal: Floats
    defect: Floats
    overlap: Floats
    regions: Floats

    @property
    def labels(self) -> NDArray[np.bool_]:
        """Images with a defect pixel, bool (N,)."""
        return self.regions > 0


def count_pixels(masks: ImageStack, maps: ImageStack, thresholds: int = _THRESHOLDS) -> PixelCounts:
    """Counts of all images at common thresholds, which are ranks of all normal pixels, closer where few are above.

    masks bool and maps float, (N, H, W) or N arrays (H, W) of any sizes. Raises ValueError on unequal shapes, maps
    that are not finite, or when there is no defect or no normal pixel.
    """
    images = read_images(masks, maps)
    by_image = [scores[~mask] for mask, scores in images]
    normal = np.sort(np.concatenate(by_image or [np.empty(0)]))
    if not normal.size or not any(mask.any() for mask, _ in images):
        raise ValueError("masks must hold normal and defect pixels")
    highest = sorted((scores.max() for scores in by_image if scores.size), reverse=True)[:_HIGHEST_OF_IMAGES]
    cuts = _thresholds(normal, highest, thresholds)
    counted = [_count_image(mask, scores, cuts) for mask, scores in images]
    return PixelCounts(*(np.array(column, dtype=np.float64) for column in zip(*counted, strict=True)))


def _thresholds(normal: Floats, highest: Sequence[float], count: int) -> Floats:
    """Falling thresholds, from one with no normal pixel above to one with all pixels above."""
    low = np.geomspace(min(0.5 / len(normal), 0.025), 0.05, count // 2, endpoint=False)
    rates = np.append(low, np.linspace(0.05, 1.0, count - count // 2))
    ranks = len(normal) - 1 - np.minimum((rates * len(normal)).astype(np.int64), len(normal) - 1)
    inner = np.unique(np.append(normal[ranks], highest))[::-1]
    return np.concatenate([[np.inf], inner, [-np.inf]])


def _count_image(mask: NDArray[np.bool_], scores: Floats, cuts: Floats) -> tuple[Floats, Floats, Floats, int]:
    regions, found = label_regions(mask)
    overlap = np.zeros(len(cuts))
    for number in range(1, found + 1):
        overlap += _above(scores[regions == number], cuts) / np.count_nonzero(regions == number)
    return _above(scores[~mask], cuts), _above(scores[mask], cuts), overlap, found


def _above(scores: Floats, cuts: Floats) -> Floats:
    return np.asarray(len(scores) - np.searchsorted(np.sort(scores), cuts, side="right"), dtype=np.float64)


def pixel_draws(counts: PixelCounts, weights: ArrayLike) -> Draws:
    """P-AUROC, P-FPR95 and all AUPRO values of every draw, float64 (B,) each.

    weights (B, N) not negative. The curves are drawn through the thresholds of the counts, with straight lines
    between them; the published grids are read off them at the rates of their thresholds. Precision is not among them:
    it would need closer thresholds. Raises ValueError when shapes differ or a draw has no normal or no defect pixel.
    """
    table = _read_weights(weights, len(counts.regions))
    parts = []
    for rows in _in_blocks(table, counts.normal.shape[1]):
        alarms, hits = rows @ counts.normal, rows @ counts.defect
        regions = rows @ counts.regions
        if not (alarms[:, -1].all() and hits[:, -1].all()):
            raise ValueError("weights must leave normal and defect pixels in every draw")
        rate, overlap = alarms / alarms[:, -1:], (rows @ counts.overlap) / regions[:, None]
        found = hits / hits[:, -1:]
        ranking = {"p_auroc": _roc(hits, alarms)["i_auroc"], "p_fpr95": _rate_at(rate, found, 0.95)}
        parts.append({**ranking, **_aupro_values(rate, overlap)})
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _rate_at(rate: Floats, height: Floats, level: float) -> Floats:
    """Where each curve (B, K), which rises from 0 to 1, reaches the level; straight lines between its points."""
    after = np.argmax(height >= level * (1 - 1e-12), axis=1)[:, None]
    x0, x1 = (np.take_along_axis(rate, at, axis=1)[:, 0] for at in (after - 1, after))
    y0, y1 = (np.take_along_axis(height, at, axis=1)[:, 0] for at in (after - 1, after))
    return np.asarray(x0 + (x1 - x0) * (level - y0) / (y1 - y0))


def _aupro_values(rate: Floats, overlap: Floats) -> Draws:
    found = {}
    for grid, limits in AUPRO_RULES:
        x, y = (rate, overlap) if grid is None else _on_grid(rate, overlap, grid)
        found.update({key: np.minimum(_area(x, y, limit) / limit, 1.0) for key, limit in limits.items()})
    return found


def _on_grid(rate: Floats, overlap: Floats, thresholds: int) -> tuple[Floats, Floats]:
    """The curve at the rates of equally spaced ranks, from 0 to 1."""
    x = np.linspace(0, 1, thresholds)
    y = np.stack([_highest_at(rates, heights, x) for rates, heights in zip(rate, overlap, strict=True)])
    return np.broadcast_to(x, y.shape), y


def _highest_at(rate: Floats, height: Floats, x: Floats) -> Floats:
    """The curve at x; at the end of a vertical piece, of several heights the highest."""
    last = np.searchsorted(rate, x, side="right") - 1
    following = np.minimum(last + 1, len(rate) - 1)
    width = rate[following] - rate[last]
    part = np.divide(x - rate[last], width, out=np.zeros_like(x), where=width > 0)
    return np.asarray(height[last] + part * (height[following] - height[last]))


def _area(x: Floats, y: Floats, limit: float) -> Floats:
    """Area under each curve (B, K) up to the limit, the last piece cut by a straight line."""
    left, right = np.minimum(x[:, :-1], limit), np.minimum(x[:, 1:], limit)
    width = x[:, 1:] - x[:, :-1]
    slope = np.divide(y[:, 1:] - y[:, :-1], width, out=np.zeros_like(width), where=width > 0)
    middle = y[:, :-1] + slope * ((left + right) / 2 - x[:, :-1])
    return np.asarray(((right - left) * middle).sum(axis=1))


def percentile_interval(draws: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """The middle part of the draws (B,) that holds the fraction `confidence`: lower and upper end.

    Raises ValueError when there is no draw or confidence is not between 0 and 1.

    >>> percentile_interval(np.arange(101) / 100, 0.9)
    (0.05, 0.95)
    """
    values = np.asarray(draws, dtype=np.float64).ravel()
    if not values.size:
        raise ValueError("draws must not be empty")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _read_weights(weights: ArrayLike, images: int) -> Weights:
    table = np.asarray(weights, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] != images or not len(table):
        raise ValueError(f"weights must be (B, {images}) with at least one draw, got {table.shape}")
    if (table < 0).any():
        raise ValueError("weights must not be negative")
    return table


def _in_blocks(table: Weights, columns: int) -> Iterator[Weights]:
    size = max(1, _CELLS_AT_ONCE // max(1, columns))
    for start in range(0, len(table), size):
        yield table[start : start + size]

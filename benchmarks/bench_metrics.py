"""Metrics against the forms in which published codes compute them, in one process on the same synthetic maps.

Slow forms run on a part of the maps where a note says so, and their time is scaled up in proportion. One core.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from benchmarks.turns import NO_BAR, Bar, Row, in_turns, row, turns_of
from mmad_cli.metrics import all_metrics, aupro, aupro_exact, aupro_grid, pixel_auroc

LIMITS = (0.3, 0.1, 0.05, 0.01)
SIZE = 224
EIGHT = np.ones((3, 3), dtype=bool)


def synthetic_category(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Masks bool and maps float32 (count, 224, 224); four of five images have one to four defects."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, SIZE, SIZE), dtype=bool)
    for index in range(count * 4 // 5):
        for _ in range(1 + index % 4):
            row, column = rng.integers(20, SIZE - 20, 2)
            radius = rng.integers(3, 14)
            masks[index, row - radius : row + radius, column - radius : column + radius] = True
    coarse = rng.random((count, 28, 28), dtype=np.float32)
    maps = np.stack([ndimage.zoom(image, SIZE / 28, order=1) for image in coarse])
    return masks, (maps + 0.25 * masks + 1e-3 * rng.random(maps.shape)).astype(np.float32)


def area_to(rate: np.ndarray, height: np.ndarray, limit: float) -> float:
    inside = rate <= limit
    x = np.append(rate[inside], limit)
    y = np.append(height[inside], np.interp(limit, rate, height))
    return float(np.trapezoid(y, x)) / limit


def label_loop(masks: np.ndarray, maps: np.ndarray, limit: float = 0.3, steps: int = 100) -> float:
    """For each of 100 score levels: binarise all maps, label every mask, and look at each region."""
    rates, overlaps = [0.0], [0.0]
    for level in np.linspace(maps.max(), maps.min(), steps):
        binary = maps >= level
        found = []
        for mask, hits in zip(masks, binary, strict=True):
            labels, regions = ndimage.label(mask, structure=EIGHT)
            for region in range(1, regions + 1):
                pixels = labels == region
                found.append((hits & pixels).sum() / pixels.sum())
        rates.append((binary & ~masks).sum() / (~masks).sum())
        overlaps.append(np.mean(found))
    return area_to(np.array(rates), np.array(overlaps), limit)


def script_curve(masks: np.ndarray, maps: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """As the MVTec evaluation script: sorted scores of each region, searched for each threshold in turn."""
    regions, normal = [], []
    for mask, scores in zip(masks, maps, strict=True):
        labels, count = ndimage.label(mask, structure=EIGHT)
        normal.append(scores[labels == 0])
        regions += [np.sort(scores[labels == region]) for region in range(1, count + 1)]
    ordered = np.sort(np.concatenate(normal))
    rates, overlaps = [1.0], [1.0]
    for rank in np.linspace(0, len(ordered) - 1, steps).astype(int):
        threshold = ordered[rank]
        overlaps.append(
            np.mean([1 - np.searchsorted(scores, threshold, side="right") / len(scores) for scores in regions])
        )
        rates.append(1 - (rank + 1) / len(ordered))
    return np.array(rates[::-1]), np.array(overlaps[::-1])


def pixel_auroc_of_lists(masks: np.ndarray, maps: np.ndarray) -> float:
    """Pixels gathered in Python lists, as several training loops do."""
    labels: list[int] = []
    scores: list[float] = []
    for mask, image in zip(masks, maps, strict=True):
        labels.extend(mask.ravel().astype(int).tolist())
        scores.extend(image.ravel().tolist())
    return float(roc_auc_score(labels, scores))


def separate_metrics(masks: np.ndarray, maps: np.ndarray) -> list[float]:
    """The values of `all_metrics` but for the exact AUPRO: scikit-learn for the rankings, the script for the grids."""
    labels, pixels = masks.ravel(), maps.ravel()
    values = [float(roc_auc_score(labels, pixels)), float(average_precision_score(labels, pixels))]
    precision, recall, _ = precision_recall_curve(labels, pixels)
    values.append(float(np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12))))
    values.append(area_to(*script_curve(masks, maps, 100), 0.3))
    # The published function makes its curve again for every limit
    return values + [area_to(*script_curve(masks, maps, 99), limit) for limit in LIMITS]


def our_metrics(masks: np.ndarray, maps: np.ndarray) -> list[float]:
    values = all_metrics(masks.any(axis=(1, 2)), maps.max(axis=(1, 2)), masks, maps).values
    keys = ("p_auroc", "p_ap", "p_f1max", "aupro_30_grid100")
    return [values[key] for key in keys] + [values[f"aupro_{n}_grid99"] for n in ("30", "10", "05", "01")]


Form = Callable[[np.ndarray, np.ndarray], Any]


def compare(
    name: str,
    data: tuple[np.ndarray, np.ndarray],
    published: Form,
    ours: Form,
    tolerance: float,
    turns: int,
    bar: Bar = NO_BAR,
    part: int = 1,
) -> Row:
    """Both forms on the same maps, the published one on one image in `part`; their values must agree."""
    masks, maps = data
    few = masks[::part], maps[::part]
    both = in_turns(lambda: published(*few), lambda: ours(masks, maps), turns, scale=len(masks) / len(few[0]))
    values = both.result if part == 1 else ours(*few)
    difference = float(np.max(np.abs(np.asarray(values) - np.asarray(both.theirs))))
    scaled = f"; published form scaled from {len(few[0])} maps" if part > 1 else ""
    return row(
        name,
        both.ours,
        both.published,
        bar=bar,
        holds=difference <= tolerance,
        note=f"values {difference:.0e} apart, {tolerance:g} allowed{scaled}",
    )


def run(quick: bool = False) -> list[Row]:
    """AUPRO and AUROC alone, then all metrics of a category."""
    small, large = (16, 20) if quick else (100, 132)
    hundred, category = synthetic_category(small), synthetic_category(large)
    turns, faster = turns_of(quick), Bar(ratio=1)
    return [
        compare(
            f"exact AUPRO, {small} maps / label loop",
            hundred, label_loop, lambda m, s: aupro(m, s), 0.01, turns, Bar(ratio=18), part=10,
        ),
        compare(
            f"AUPRO on 100 thresholds, {small} maps / MVTec script",
            hundred, lambda m, s: area_to(*script_curve(m, s, 100), 0.3), lambda m, s: aupro(m, s, 0.3, 100), 1e-9,
            turns, faster,
        ),
        compare(
            f"exact AUPRO at four limits, {large} maps / MVTec script on 3000 thresholds",
            category,
            lambda m, s: [area_to(*script_curve(m, s, 3000), limit) for limit in LIMITS],
            lambda m, s: aupro_exact(m, s, LIMITS), 0.01, turns, Bar(seconds=0.6), part=6,
        ),
        compare(
            f"AUPRO on 99 thresholds at four limits, {large} maps / MVTec script",
            category,
            lambda m, s: [area_to(*script_curve(m, s, 99), limit) for limit in LIMITS],
            lambda m, s: aupro_grid(m, s, LIMITS, 99), 1e-9, turns, faster,
        ),
        compare(
            f"P-AUROC, {small} maps / scikit-learn",
            hundred, lambda m, s: roc_auc_score(m.ravel(), s.ravel()), pixel_auroc, 1e-9, turns, faster,
        ),
        compare(
            f"P-AUROC, {small} maps / Python lists",
            hundred, pixel_auroc_of_lists, pixel_auroc, 1e-9, turns, faster, part=10,
        ),
        compare(
            f"all metrics of a category, {large} maps / one by one",
            category, separate_metrics, our_metrics, 1e-9, turns, Bar(seconds=3),
        ),
    ]  # fmt: skip

"""Metrics against the forms in which published codes compute them, in one process on the same synthetic maps.

The slow forms run on a part of the maps where the table says so, and their time is scaled up in proportion.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

# Before numpy: one core for both sides
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

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


def seconds(call: Callable[[], Any], repeats: int = 1) -> tuple[float, Any]:
    """Median wall-clock time and the result."""
    times, result = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
    return float(np.median(times)), result


def row(
    name: str,
    data: tuple[np.ndarray, np.ndarray],
    repo: Callable[..., Any],
    ours: Callable[..., Any],
    tolerance: float,
    bar: str,
    passes: Callable[[float, float], bool],
    part: int = 1,
) -> dict[str, Any]:
    """Time both forms; the repo form on one image in `part`. Raises RuntimeError where their values differ."""
    masks, maps = data
    few = masks[::part], maps[::part]
    repo_seconds, theirs = seconds(lambda: repo(*few))
    ours_seconds, values = seconds(lambda: ours(masks, maps), repeats=3)
    if part > 1:
        values = ours(*few)
    difference = float(np.max(np.abs(np.asarray(values) - np.asarray(theirs))))
    if difference > tolerance:
        raise RuntimeError(f"{name}: the two forms differ by {difference:.2g}, more than {tolerance:.2g}")
    scaled = repo_seconds * len(masks) / len(few[0])
    return {
        "name": name + (f" (repo form on {len(few[0])} maps, scaled)" if part > 1 else ""),
        "repo_seconds": scaled,
        "ours_seconds": ours_seconds,
        "ratio": scaled / ours_seconds,
        "bar": bar,
        "ok": passes(ours_seconds, scaled / ours_seconds),
    }


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Rows with name, repo_seconds, ours_seconds, ratio, bar, ok."""
    small, large = (16, 20) if quick else (100, 132)
    hundred, category = synthetic_category(small), synthetic_category(large)
    return [
        row(
            f"exact AUPRO, {small} maps, against a label loop",
            hundred, label_loop, lambda m, s: aupro(m, s), 0.01,
            ">= 18x", lambda _, ratio: ratio >= 18, part=4,
        ),
        row(
            f"AUPRO on 100 thresholds, {small} maps, against the MVTec script",
            hundred, lambda m, s: area_to(*script_curve(m, s, 100), 0.3), lambda m, s: aupro(m, s, 0.3, 100), 1e-9,
            "> 1x", lambda _, ratio: ratio > 1,
        ),
        row(
            f"exact AUPRO at four limits, {large} maps, against the MVTec script on 3000 thresholds",
            category,
            lambda m, s: [area_to(*script_curve(m, s, 3000), limit) for limit in LIMITS],
            lambda m, s: aupro_exact(m, s, LIMITS), 0.01,
            "<= 0.6 s", lambda ours, _: ours <= 0.6, part=4,
        ),
        row(
            f"AUPRO on 99 thresholds at four limits, {large} maps",
            category,
            lambda m, s: [area_to(*script_curve(m, s, 99), limit) for limit in LIMITS],
            lambda m, s: aupro_grid(m, s, LIMITS, 99), 1e-9,
            "> 1x", lambda _, ratio: ratio > 1,
        ),
        row(
            f"P-AUROC, {small} maps, against scikit-learn",
            hundred, lambda m, s: roc_auc_score(m.ravel(), s.ravel()), pixel_auroc, 1e-9,
            "> 1x", lambda _, ratio: ratio > 1,
        ),
        row(
            f"P-AUROC, {small} maps, against Python lists",
            hundred, pixel_auroc_of_lists, pixel_auroc, 1e-9,
            "> 1x", lambda _, ratio: ratio > 1, part=4,
        ),
        row(
            f"all metrics of a category, {large} maps, against one by one",
            category, separate_metrics, our_metrics, 1e-9,
            "<= 3 s", lambda ours, _: ours <= 3,
        ),
    ]  # fmt: skip

"""Area under the per-region-overlap curve (AUPRO), exact and by the published grids of thresholds.

Per-region overlap: the fraction of a ground-truth region's pixels that score above a threshold, averaged over
the 8-connected regions of all masks, each region counting once whatever its size. The curve draws it over the
false-positive rate of the pixels outside all regions. Source: Bergmann et al., "The MVTec Anomaly Detection
Dataset", IJCV 129 (2021), section 5.2; Bergmann et al., "The MVTec 3D-AD Dataset" (arXiv 2112.09045), sec. 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmad_cli.metrics.arrays import ImageStack
from mmad_cli.metrics.ranking import RankedPixels, rank_pixels, require_both_classes

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


def aupro(masks: ImageStack, maps: ImageStack, limit: float = 0.3, grid: int | None = None) -> float:
    """Area under the per-region-overlap curve up to the false-positive rate `limit`, divided by `limit`.

    masks bool and maps float, (N, H, W) or N arrays (H, W) of any sizes. `limit` in (0, 1]. `grid=None` uses
    every distinct score as a threshold; a number uses that many thresholds at equally spaced ranks of the
    normal pixels: 100 as in the MVTec 3D-AD evaluation, BTF and M3DM, 99 as in CFM, MAFR and CMDR-IAD. Result
    in [0, 1]. Raises ValueError on unequal shapes, non-finite maps, a limit or grid out of range, or when
    there is no defect or no normal pixel.

    >>> mask = np.array([[[1, 0, 0, 0, 0, 1, 1, 0]]])
    >>> scores = np.array([[[0.9, 0.1, 0.2, 0.3, 0.0, 0.8, 0.1, 0.7]]])
    >>> aupro(mask, scores, limit=1.0)
    0.825
    >>> aupro(mask, mask.astype(float))
    1.0
    """
    if grid is None:
        return aupro_exact(masks, maps, [limit])[0]
    return aupro_grid(masks, maps, [limit], grid)[0]


def aupro_exact(masks: ImageStack, maps: ImageStack, limits: Sequence[float]) -> list[float]:
    """`aupro` with every distinct score as a threshold, at several limits from one sort.

    >>> mask = np.array([[[1, 0, 0, 0]]])
    >>> aupro_exact(mask, np.ones((1, 1, 4)), [1.0, 0.5])  # a constant map: half the limit, by chance
    [0.5, 0.25]
    """
    pixels = rank_pixels(masks, maps)
    require_both_classes(pixels)
    return normalised_areas(exact_curve(pixels), limits)


def aupro_grid(masks: ImageStack, maps: ImageStack, limits: Sequence[float], thresholds: int) -> list[float]:
    """`aupro` with a grid of thresholds, at several limits from one curve."""
    pixels = rank_pixels(masks, maps)
    require_both_classes(pixels)
    return normalised_areas(grid_curve(pixels, thresholds), limits)


def pro_curve(masks: ImageStack, maps: ImageStack, grid: int | None = None) -> Curve:
    """False-positive rate and per-region overlap, float64 (K,) each.

    Both rise, from rate 0 to the point (1, 1). Arguments and errors as in `aupro`. With `grid` K = grid + 1;
    exact curves start at (0, 0).

    >>> pro_curve(np.array([[[1, 0, 1, 0]]]), np.array([[[0.9, 0.5, 0.5, 0.1]]]))
    (array([0. , 0. , 0.5, 1. ]), array([0. , 0.5, 1. , 1. ]))
    """
    pixels = rank_pixels(masks, maps)
    require_both_classes(pixels)
    return exact_curve(pixels) if grid is None else grid_curve(pixels, grid)


def exact_curve(pixels: RankedPixels) -> Curve:
    """Curve through every distinct score, as corner points of straight pieces.

    Normal pixels between two defect scores move the curve to the right, a group of equal scores that holds
    both moves it along one slanted line (the ROC convention for ties).
    """
    points = pixels.points
    overlap = pixels.overlap_above[points.n_positives - points.true_positives]
    before = np.concatenate([[0.0], overlap[:-1]])
    pairs = np.stack([points.false_positives_above, points.false_positives], axis=1)
    rate = np.concatenate([[0.0], pairs.ravel() / points.n_negatives, [1.0]])
    height = np.concatenate([[0.0], np.stack([before, overlap], axis=1).ravel(), [1.0]])
    moved = np.concatenate([[True], (np.diff(rate) != 0) | (np.diff(height) != 0)])
    return rate[moved], height[moved]


def grid_curve(pixels: RankedPixels, thresholds: int) -> Curve:
    """Curve of the published evaluation scripts: thresholds at equally spaced ranks.

    Of the n sorted normal scores, ranks linspace(0, n - 1, thresholds) cut to integers are taken. The rate of
    rank r is 1 - (r + 1) / n whatever ties there are, the overlap counts scores strictly above the score at
    that rank, and the point (1, 1) is added. Source: evaluation script of MVTec 3D-AD (arXiv 2112.09045); CFM
    (arXiv 2312.04521) with 99 thresholds.
    """
    if thresholds < 2:
        raise ValueError(f"grid must be None or at least 2 thresholds, got {thresholds}")
    count = len(pixels.normal)
    ranks = np.linspace(0, count - 1, thresholds).astype(np.int64)[::-1]
    below = np.searchsorted(pixels.defect, pixels.normal[ranks], side="right")
    rate = 1.0 - (ranks + 1) / count
    return np.append(rate, 1.0), np.append(pixels.overlap_above[below], 1.0)


def normalised_areas(curve: Curve, limits: Sequence[float]) -> list[float]:
    """Area under a curve up to each limit in (0, 1], divided by that limit. Raises ValueError on others."""
    for limit in limits:
        if not 0 < limit <= 1:
            raise ValueError(f"limit must be in (0, 1], got {limit}")
    bounds = np.asarray(limits, dtype=np.float64)
    # Overlap never exceeds 1; only the rounding of many added trapezoids can
    areas = np.minimum(trapezoid_areas(*curve, bounds) / bounds, 1.0)
    return [float(area) for area in areas]


def trapezoid_areas(x: ArrayLike, y: ArrayLike, limits: ArrayLike) -> NDArray[np.float64]:
    """Area under straight pieces from x[0] up to each limit, the last piece cut by linear interpolation.

    x (K,) not falling, y (K,), limits (L,) with x[0] <= limit; beyond x[-1] the curve adds nothing. Float64
    (L,).

    >>> trapezoid_areas([0.0, 0.5, 1.0], [0.0, 1.0, 1.0], [0.25, 1.0])
    array([0.0625, 0.75  ])
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    ends = np.minimum(np.asarray(limits, dtype=np.float64), x[-1])
    area = np.concatenate([[0.0], np.cumsum(np.diff(x) * (y[1:] + y[:-1]) / 2)])
    last = np.searchsorted(x, ends, side="right") - 1
    # On a vertical piece nothing is left to cut, so what np.interp makes of equal x does not matter
    width = ends - x[last]
    areas: NDArray[np.float64] = area[last] + width * (y[last] + np.interp(ends, x, y)) / 2
    return areas

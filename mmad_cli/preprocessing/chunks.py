"""From a list of points to small organised clouds: chunks, marks and split of the polyurethane cutting set.

As released with CMDR-IAD (arXiv 2603.03939). There are no labels by people: an Isolation Forest marks points of whole
scans, and a chunk is anomalous where enough of its points are marked.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from mmad_cli.types import FloatArray, IndexArray

CHUNK_POINTS = 9216
# `low` of the released levels; `high` is 0.00015
CONTAMINATION = 1e-4
ANOMALOUS_SHARE = 0.0025
TEST_SHARE = 0.1
TREES = 200
NEIGHBOURS = 30
SEED = 42

_SMALLEST_RANGE = 1e-12


def isolated_points(
    points: FloatArray, contamination: float = CONTAMINATION, trees: int = TREES, seed: int = SEED
) -> IndexArray:
    """Sorted indices int64 of the points (n, 3) that an Isolation Forest isolates soonest (Liu et al., ICDM 2008).

    contamination: the share of points to mark, 0 to 0.5; the limit is that percentile of the scores. Gives what
    scikit-learn's IsolationForest marks as -1 with these arguments, and scores the points once instead of twice. Raises
    ValueError for points of another shape, none, or a contamination out of range.
    """
    _check_marking(points, contamination)
    from sklearn.ensemble import IsolationForest

    forest = IsolationForest(n_estimators=trees, max_samples="auto", contamination="auto", random_state=seed)
    scores = forest.fit(points).score_samples(points)
    limit = np.percentile(scores, 100 * contamination)
    return np.flatnonzero(scores - limit < 0).astype(np.int64)


def outlying_points(
    points: FloatArray, contamination: float = CONTAMINATION, neighbours: int = NEIGHBOURS
) -> IndexArray:
    """Sorted indices int64 of the points (n, 3) with the largest local outlier factor (Breunig et al., SIGMOD 2000).

    What scikit-learn's LocalOutlierFactor marks as -1 with these arguments; the released code offers it beside the
    Isolation Forest. Raises ValueError as `isolated_points` does.
    """
    _check_marking(points, contamination)
    from sklearn.neighbors import LocalOutlierFactor

    factor = LocalOutlierFactor(n_neighbors=neighbours, contamination=contamination)
    return np.flatnonzero(factor.fit_predict(points) == -1).astype(np.int64)


def _check_marking(points: FloatArray, contamination: float) -> None:
    if points.ndim != 2 or points.shape[1] != 3 or not len(points):
        raise ValueError(f"points: should be (n, 3) with n above 0, got {points.shape}")
    if not 0 < contamination <= 0.5:
        raise ValueError(f"contamination: should be above 0 and at most 0.5, got {contamination}")


def normalised_grid(points: FloatArray) -> FloatArray:
    """Organised cloud float32 (s, s, 3) of s x s points (n, 3) in their order, each coordinate brought to [-1, 1].

    2 (p - min) / (max - min) - 1 per coordinate; a range of 0 counts as 1e-12. Neighbours on the grid are neighbours in
    the order of acquisition, not in space. Raises ValueError where n is no square number above 0.
    """
    side = math.isqrt(len(points))
    if points.ndim != 2 or points.shape[1] != 3 or not side or side * side != len(points):
        raise ValueError(f"points: should be (n, 3) with n a square number, got {points.shape}")
    exact = points.astype(np.float64)
    low, high = exact.min(axis=0), exact.max(axis=0)
    extent = np.where(high > low, high - low, _SMALLEST_RANGE)
    return np.asarray((2 * (exact - low) / extent - 1).reshape(side, side, 3), dtype=np.float32)


def drawn_positions(count: int, share: float = TEST_SHARE, seed: int = SEED) -> IndexArray:
    """Sorted positions int64 (ceil(share * count),) that go to the test split, of `count` in all.

    The draw of scikit-learn's train_test_split. Raises ValueError for a negative count or a share outside of 0 to 1.
    """
    if count < 0:
        raise ValueError(f"count: should be at least 0, got {count}")
    if not 0 < share < 1:
        raise ValueError(f"share: should be between 0 and 1, got {share}")
    drawn: NDArray[np.int64] = np.random.RandomState(seed).permutation(count)[: math.ceil(share * count)]
    return np.sort(drawn)

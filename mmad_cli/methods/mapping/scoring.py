"""From per-pixel errors to maps and scores: repeated box means and the scalings of CFM and what is built on it."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mmad_cli.methods.anomaly_map import bilinear_matrix
from mmad_cli.methods.base import MAP_SIZE, Prediction
from mmad_cli.types import FloatArray

# five 5 x 5 means, then three 7 x 7 means: the variance of a Gaussian of 4.69 pixels
SMOOTHING = (5, 5, 5, 5, 5, 7, 7, 7)


@lru_cache(maxsize=32)
def box_matrix(size: int, windows: tuple[int, ...]) -> NDArray[np.float64]:
    """Successive means over windows of odd length along one axis, zeros beyond the border: (size, size), read-only.

    Raises ValueError for a window that is even or not positive.
    """
    matrix = np.eye(size)
    for window in windows:
        if window < 1 or window % 2 == 0:
            raise ValueError(f"windows: must be odd and positive, got {window}")
        offset = np.abs(np.arange(size)[:, None] - np.arange(size)[None, :])
        matrix = (offset <= window // 2) @ matrix / window
    matrix.setflags(write=False)
    return matrix


def smooth(errors: NDArray[np.floating], windows: tuple[int, ...] = SMOOTHING) -> NDArray[np.float64]:
    """Successive box means of a map (H, W) with zeros beyond the border; the divisor is always the whole window.

    All passes together are one matrix per axis, so this costs two products whatever their number, and a pixel that no
    window reaches is exactly zero. Source: CFM (arXiv 2312.04521), inference.
    """
    if errors.ndim != 2:
        raise ValueError(f"errors: should be of shape (H, W), got {errors.shape}")
    rows, columns = (box_matrix(size, windows) for size in errors.shape)
    return np.asarray(rows @ errors.astype(np.float64) @ columns.T)


def at_map_size(errors: NDArray[np.floating], size: int = MAP_SIZE) -> NDArray[np.floating]:
    """Errors (side, side) brought to `size` bilinearly with half-pixel centres."""
    if errors.shape[0] == size:
        return errors
    matrix = bilinear_matrix(errors.shape[0], size).astype(np.float64)
    return np.asarray(matrix @ errors @ matrix.T)


def scaled(smoothed: NDArray[np.float64]) -> Prediction:
    """Map and image score of one sample from its smoothed errors (H, W), non-negative.

    With m+ their mean over non-zero pixels and m over all: the map is smoothed / sqrt(m), AUPRO reads smoothed / m+
    (`aupro_scale` leads from one to the other), the score is max / sqrt(m+). Errors that are zero everywhere make a
    map of zeros with score 0. Source: CFM (arXiv 2312.04521), evaluation.
    """
    reached = np.count_nonzero(smoothed)
    if not reached:
        return Prediction(np.zeros(smoothed.shape, dtype=np.float32), 0.0)
    total = float(smoothed.sum())
    mean, mean_reached = total / smoothed.size, total / reached
    anomaly_map: FloatArray = (smoothed / np.sqrt(mean)).astype(np.float32)
    return Prediction(
        anomaly_map, float(smoothed.max() / np.sqrt(mean_reached)), aupro_scale=float(np.sqrt(mean) / mean_reached)
    )

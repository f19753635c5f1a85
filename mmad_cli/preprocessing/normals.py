"""Surface normals of an organised cloud, from windows of pixels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mmad_cli.preprocessing.resize import valid_pixels
from mmad_cli.types import FloatArray

NORMAL_WINDOW = 5
FEWEST_NEIGHBOURS = 3

_PRODUCTS = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))


def organised_normals(xyz: FloatArray, window: int = NORMAL_WINDOW) -> FloatArray:
    """Unit surface normals float32 (H, W, 3) of an organised cloud (H, W, 3), turned towards the camera.

    The direction of least spread of the valid points in a window of pixels about each valid pixel; normal . point < 0,
    with the camera at the origin. (0, 0, 0) at invalid pixels and where fewer than three points lie in the window.
    Sums over windows are differences of running sums, so the cost does not depend on the window. Raises ValueError
    for an even window. Source: Hoppe et al., "Surface reconstruction from unorganized points", SIGGRAPH 1992,
    section 3.1, with the window as the neighbourhood.
    """
    if window < 3 or window % 2 == 0:
        raise ValueError(f"window: should be odd and at least 3, got {window}")
    valid = valid_pixels(xyz)
    normals = np.zeros(xyz.shape, dtype=np.float32)
    if not valid.any():
        return normals
    # about the middle of the cloud, so that little is lost when squares of coordinates are subtracted
    points = np.where(valid[..., None], xyz - xyz[valid].mean(axis=0), 0).astype(np.float64)
    count = _window_sums(valid.astype(np.float64), window)
    usable = valid & (count >= FEWEST_NEIGHBOURS)
    n = count[usable]
    mean = [_window_sums(points[..., i], window)[usable] / n for i in range(3)]
    spread = np.empty((len(n), 3, 3))
    for i, j in _PRODUCTS:
        second = _window_sums(points[..., i] * points[..., j], window)[usable] / n
        spread[:, i, j] = spread[:, j, i] = second - mean[i] * mean[j]
    direction = np.linalg.eigh(spread)[1][:, :, 0]
    away = (direction * xyz[usable]).sum(axis=1) > 0
    normals[usable] = np.where(away[:, None], -direction, direction)
    return normals


def _window_sums(image: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Sums over windows about every pixel of (H, W), zeros outside."""
    half = window // 2
    padded = np.pad(image, ((half + 1, half), (half + 1, half)))
    sums = padded.cumsum(axis=0).cumsum(axis=1)
    out: NDArray[np.float64] = (
        sums[window:, window:] - sums[:-window, window:] - sums[window:, :-window] + sums[:-window, :-window]
    )
    return out

"""From per-pixel features to the rows of a patch grid.

Averaging over windows is linear and separable: along one axis it is a product with a small matrix. So a 3 x 3
average followed by adaptive averaging of a (C, H, W) map is two matrix products with a (P, H) and a (P, W)
matrix, and a map that is mostly zeros (a scattered point cloud) needs no dense intermediate maps.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmad_cli.types import FloatArray


def adaptive_bins(size: int, out: int) -> list[tuple[int, int]]:
    """Half-open input ranges of adaptive average pooling from `size` to `out` cells.

    Output cell i averages inputs floor(i size / out) to ceil((i + 1) size / out) - 1, as PyTorch's adaptive
    pooling does; ranges overlap when `out` does not divide `size`, and repeat cells when `out` exceeds it.
    """
    _check_positive(size=size, out=out)
    return [(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]


@lru_cache(maxsize=64)
def adaptive_matrix(size: int, out: int) -> NDArray[np.float64]:
    """Adaptive average pooling along one axis as a matrix (out, size); read-only."""
    matrix = np.zeros((out, size))
    for row, (begin, end) in enumerate(adaptive_bins(size, out)):
        matrix[row, begin:end] = 1.0 / (end - begin)
    matrix.setflags(write=False)
    return matrix


@lru_cache(maxsize=64)
def patch_matrix(size: int, out: int) -> NDArray[np.float64]:
    """Unpadded average of 3 neighbours, then adaptive averaging to `out` cells: a read-only matrix (out, size).

    Raises ValueError when `size` is below 3.
    """
    if size < 3:
        raise ValueError(f"size must be at least 3 for an unpadded 3 x 3 average, got {size}")
    cells = np.arange(size - 2)
    window = np.zeros((size - 2, size))
    for offset in range(3):
        window[cells, cells + offset] = 1 / 3
    matrix: NDArray[np.float64] = adaptive_matrix(size - 2, out) @ window
    matrix.setflags(write=False)
    return matrix


def scatter_to_grid(points: NDArray[np.floating], pixel: NDArray[np.integer], size: int) -> FloatArray:
    """Per-point features on the pixel grid; pixels without a point are zero.

    points (n, C), pixel (n,) flat indices size * y + x without repeats. Returns float32 (C, size, size).
    Raises ValueError when the two do not belong together or an index is outside the grid.
    """
    _check_points(points, pixel, size)
    grid = np.zeros((size * size, points.shape[1]), dtype=np.float32)
    grid[pixel] = points
    return np.ascontiguousarray(grid.T).reshape(points.shape[1], size, size)


def average_3x3(feature_map: NDArray[np.floating]) -> FloatArray:
    """Average over 3 x 3 neighbours, stride 1, no padding: (C, H, W) to float32 (C, H - 2, W - 2)."""
    _check_map(feature_map)
    if min(feature_map.shape[1:]) < 3:
        raise ValueError(f"feature_map must be at least 3 x 3, got shape {feature_map.shape}")
    rows = feature_map[:, :-2] + feature_map[:, 1:-1] + feature_map[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    return np.asarray(total / 9.0, dtype=np.float32)


def adaptive_average(feature_map: NDArray[np.floating], out: int) -> FloatArray:
    """Adaptive average pooling of (C, H, W) to float32 (C, out, out); bins as in `adaptive_bins`."""
    _check_map(feature_map)
    _, height, width = feature_map.shape
    rows = _as_float32(adaptive_matrix(height, out)) @ _as_float32(feature_map)
    return np.asarray(rows @ _as_float32(adaptive_matrix(width, out)).T, dtype=np.float32)


def patches_from_map(feature_map: NDArray[np.floating], grid: int) -> FloatArray:
    """Patch rows of a feature map: `average_3x3`, then `adaptive_average` to `grid`, flattened row-major.

    feature_map (C, H, W) with H, W >= 3. Returns float32 (grid * grid, C); row grid * y + x is the patch (y,
    x). Source: BTF (arXiv 2203.05550) and M3DM (CVPR 2023), patch features of memory banks.
    """
    _check_map(feature_map)
    channels, height, width = feature_map.shape
    rows = _as_float32(patch_matrix(height, grid)) @ _as_float32(feature_map)
    pooled = rows @ _as_float32(patch_matrix(width, grid)).T
    return np.ascontiguousarray(pooled.reshape(channels, grid * grid).T)


def patches_from_points(points: NDArray[np.floating], pixel: NDArray[np.integer], size: int, grid: int) -> FloatArray:
    """`patches_from_map` of `scatter_to_grid` in one sparse product: empty pixels take part as zeros.

    points (n, C), pixel (n,) flat indices size * y + x without repeats. Returns float32 (grid * grid, C); a
    patch without points under it is exactly zero.
    """
    _check_points(points, pixel, size)
    return np.asarray(pooling_operator(pixel, size, grid) @ _as_float32(points), dtype=np.float32)


def pooling_operator(pixel: NDArray[np.integer], size: int, grid: int) -> Any:
    """Scattering and pooling as a SciPy CSC matrix float64 (grid * grid, n): patch rows = matrix @ point features.

    pixel (n,) flat indices size * y + x without repeats; empty pixels take part as zeros.
    """
    return _patch_operator(size, grid)[:, np.asarray(pixel)]


@lru_cache(maxsize=8)
def _patch_operator(size: int, grid: int) -> Any:
    """Pooling of a whole (size, size) image as a sparse CSC matrix (grid * grid, size * size)."""
    from scipy.sparse import csc_matrix, kron

    axis = csc_matrix(patch_matrix(size, grid))
    return kron(axis, axis, format="csc")


def _as_float32(array: NDArray[np.floating]) -> FloatArray:
    return np.asarray(array, dtype=np.float32)


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _check_map(feature_map: NDArray[np.floating]) -> None:
    if feature_map.ndim != 3:
        raise ValueError(f"feature_map must have shape (C, H, W), got {feature_map.shape}")


def _check_points(points: NDArray[np.floating], pixel: NDArray[np.integer], size: int) -> None:
    if points.ndim != 2 or pixel.shape != (len(points),):
        raise ValueError(f"points must be (n, C) with pixel (n,), got shapes {points.shape} and {pixel.shape}")
    if len(pixel) and not (int(pixel.min()) >= 0 and int(pixel.max()) < size * size):
        raise ValueError(f"pixel must lie in 0..{size * size - 1}, got {pixel.min()}..{pixel.max()}")

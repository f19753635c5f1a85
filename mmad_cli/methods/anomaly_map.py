"""From patch distances to an anomaly map: bilinear upsampling and the blurs of the published codes."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mmad_cli.methods.base import MAP_SIZE
from mmad_cli.types import FloatArray

BLUR_RADIUS = 4
BLUR_SIGMA = 4.0


@lru_cache(maxsize=32)
def bilinear_matrix(size: int, out: int) -> FloatArray:
    """Linear interpolation along one axis as a matrix (out, size), half-pixel centres, border repeated;
    read-only.

    Output cell i reads position (i + 0.5) size / out - 0.5, clamped at 0, which is what PyTorch calls
    bilinear with `align_corners` off. Raises ValueError when a size is below 1.
    """
    if size < 1 or out < 1:
        raise ValueError(f"size and out must be at least 1, got {size} and {out}")
    position = np.maximum((np.arange(out) + 0.5) * size / out - 0.5, 0.0)
    low = np.minimum(position.astype(np.int64), size - 1)
    high = np.minimum(low + 1, size - 1)
    matrix = np.zeros((out, size), dtype=np.float64)
    np.add.at(matrix, (np.arange(out), low), 1.0 - (position - low))
    np.add.at(matrix, (np.arange(out), high), position - low)
    result = matrix.astype(np.float32)
    result.setflags(write=False)
    return result


def upsample(distances: NDArray[np.floating], grid: int, size: int = MAP_SIZE) -> FloatArray:
    """Patch distances as a map at network size, bilinear with half-pixel centres (`align_corners` off).

    distances (grid * grid,) row-major, any unit. Returns float32 (size, size).
    Raises ValueError when the number of distances is not grid * grid.
    """
    if distances.shape != (grid * grid,):
        raise ValueError(f"distances must have shape ({grid * grid},), got {distances.shape}")
    matrix = bilinear_matrix(grid, size)
    patch_map = np.asarray(distances, dtype=np.float32).reshape(grid, grid)
    return np.asarray(matrix @ patch_map @ matrix.T, dtype=np.float32)


def blur_pillow8(anomaly_map: FloatArray) -> FloatArray:
    """The blur of BTF and M3DM: through an 8-bit image scaled to the map's own maximum m, Pillow Gaussian
    radius 4.

    anomaly_map (H, W), non-negative. u = trunc(255 map / m); result = blur(u) / 255 * m, so at most 256
    levels per map. A map that is zero everywhere stays zero (the published code divides by zero there).
    Raises ValueError for negative or non-finite values, which 8 bits cannot hold.
    """
    from PIL import Image, ImageFilter

    _check_map(anomaly_map)
    maximum = np.float32(anomaly_map.max())
    if maximum == 0:
        return np.zeros_like(anomaly_map, dtype=np.float32)
    scaled = ((anomaly_map / maximum) * np.float32(255)).astype(np.uint8)
    blurred = np.asarray(Image.fromarray(scaled).filter(ImageFilter.GaussianBlur(radius=BLUR_RADIUS)))
    return np.asarray(blurred.astype(np.float32) / np.float32(255) * maximum, dtype=np.float32)


def blur_float(anomaly_map: FloatArray, sigma: float = BLUR_SIGMA) -> FloatArray:
    """Separable Gaussian in float32, cut off at 4 sigma, border mirrored (edge pixel repeated).

    anomaly_map (H, W), sigma in pixels. What PatchCore (arXiv 2106.08265) computes with SciPy.
    Raises ValueError for a sigma that is not positive.
    """
    from scipy.ndimage import gaussian_filter

    if not sigma > 0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    _check_map(anomaly_map)
    blurred = gaussian_filter(np.asarray(anomaly_map, dtype=np.float32), sigma, mode="reflect", truncate=4.0)
    return np.asarray(blurred, dtype=np.float32)


def _check_map(anomaly_map: FloatArray) -> None:
    if anomaly_map.ndim != 2:
        raise ValueError(f"anomaly_map must have shape (H, W), got {anomaly_map.shape}")
    if not np.isfinite(anomaly_map).all() or anomaly_map.min() < 0:
        raise ValueError("anomaly_map must be finite and non-negative; it holds other values")

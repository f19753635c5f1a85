"""The table under an object: a plane through the border of the scan (M3DM, arXiv 2303.00601, released script)."""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from mmad_cli.open3d_import import import_open3d
from mmad_cli.preprocessing.resize import valid_pixels
from mmad_cli.types import BoolArray, FloatArray

# Open3D draws from one generator per process: seeding and drawing must not interleave
_ONE_AT_A_TIME = threading.Lock()


def edge_points(xyz: FloatArray, edge: int = 10) -> FloatArray:
    """Valid points float32 (n, 3) of the first and last `edge` rows and columns of xyz (H, W, 3).

    Order: top, bottom, left, right; the corners are in there twice, as in the published script.
    """
    strips = (xyz[:edge], xyz[-edge:], xyz[:, :edge], xyz[:, -edge:])
    points = np.concatenate([strip.reshape(-1, 3) for strip in strips])
    return points[valid_pixels(points)]


def fit_plane(
    points: FloatArray, distance: float = 0.004, samples: int = 50, iterations: int = 1000, seed: int = 0
) -> NDArray[np.float64] | None:
    """Plane (a, b, c, d) with unit normal, a x + b y + c z + d = 0, float64 (4,), by RANSAC (Open3D), or None.

    points float32 (n, 3) in metres, of which at least `samples` are drawn per trial; `distance` in metres decides
    what an inlier is. The same points and seed give the same plane. None when no plane was found. Raises ValueError
    for fewer points than `samples`.
    """
    if len(points) < samples:
        raise ValueError(f"points: should be at least {samples} to fit a plane, got {len(points)}")
    open3d = import_open3d()
    cloud = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(points.astype(np.float64)))
    with _ONE_AT_A_TIME, open3d.utility.VerbosityContextManager(open3d.utility.VerbosityLevel.Error):
        open3d.utility.random.seed(seed)
        model, _ = cloud.segment_plane(distance, samples, iterations)
    plane = np.asarray(model, dtype=np.float64)
    return plane if np.isfinite(plane).all() and plane[:3].any() else None


def near_plane(xyz: FloatArray, plane: NDArray[np.float64], distance: float = 0.005) -> BoolArray:
    """Pixels bool (H, W) with |a x + b y + c z + d| < distance, metres; missing points are at |d| as published."""
    a, b, c, d = plane
    return np.asarray(np.abs(a * xyz[..., 0] + b * xyz[..., 1] + c * xyz[..., 2] + d) < distance)

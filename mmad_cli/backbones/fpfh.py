"""Fast point feature histograms of a cleaned scan, as BTF uses them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from mmad_cli.backbones.base import Features, float32
from mmad_cli.errors import DataError
from mmad_cli.open3d_import import import_open3d

if TYPE_CHECKING:
    from mmad_cli.backbones.specs import FeatureSpec, FpfhParams
    from mmad_cli.types import Sample

Float64 = NDArray[np.float64]

BINS = 33


def point_normals(points: NDArray[Any], radius: float = 0.1, neighbours: int = 30) -> Float64:
    """Unit normals of a cloud, not oriented: the smallest principal axis of each neighbourhood.

    points: (n, 3) in metres, n >= 3. The neighbourhood is the `neighbours` nearest points within `radius` metres,
    the point itself among them (Open3D's hybrid search). Returns (n, 3) float64. Raises ValueError for a wrong shape.
    """
    open3d = import_open3d()
    cloud = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(_as_points(points)))
    cloud.estimate_normals(open3d.geometry.KDTreeSearchParamHybrid(radius=radius, max_nn=neighbours))
    return np.asarray(cloud.normals).copy()


def point_histograms(
    points: NDArray[Any], normals: NDArray[Any], radius: float = 0.25, neighbours: int = 100
) -> Float64:
    """FPFH of each point (Rusu et al., "Fast Point Feature Histograms (FPFH) for 3D Registration", ICRA 2009).

    points, normals: (n, 3) in metres and unit length. Neighbourhoods as in `point_normals`. Returns (n, 33) float64:
    three angles x 11 bins, each angle's bins summing to 200. Raises ValueError for wrong shapes.
    """
    cloud, directions = _as_points(points), _as_points(normals, "normals")
    if cloud.shape != directions.shape:
        raise ValueError(f"normals: expected the shape of points, {cloud.shape}, got {directions.shape}")
    extent = float(np.linalg.norm(np.ptp(cloud, axis=0))) if len(cloud) else 0.0
    if extent <= radius:
        # no point lies outside the radius of any other: the search needs no radius, and the faster one will do
        return _histograms_nearest(cloud, directions, neighbours)
    return _histograms_hybrid(cloud, directions, radius, neighbours)


def _histograms_hybrid(points: Float64, normals: Float64, radius: float, neighbours: int) -> Float64:
    open3d = import_open3d()
    cloud = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(points))
    cloud.normals = open3d.utility.Vector3dVector(normals)
    search = open3d.geometry.KDTreeSearchParamHybrid(radius=radius, max_nn=neighbours)
    feature = open3d.pipelines.registration.compute_fpfh_feature(cloud, search)
    return np.ascontiguousarray(np.asarray(feature.data).T)


def _histograms_nearest(points: Float64, normals: Float64, neighbours: int) -> Float64:
    open3d = import_open3d()
    cloud = open3d.t.geometry.PointCloud(open3d.core.Tensor(points))
    cloud.point.normals = open3d.core.Tensor(normals)
    feature = open3d.t.pipelines.registration.compute_fpfh_feature(cloud, max_nn=neighbours)
    return np.asarray(feature.numpy()).copy()


def _as_points(array: NDArray[Any], name: str = "points") -> Float64:
    if array.ndim != 2 or array.shape[1] != 3:
        raise ValueError(f"{name}: expected shape (n, 3), got {array.shape}")
    return np.ascontiguousarray(array, dtype=np.float64)


class FpfhBackbone:
    """FPFH at the valid points of the cloud at network size, in raster order."""

    batch_size = 1

    def __init__(self, spec: FeatureSpec) -> None:
        self.spec = spec
        self._settings = cast("FpfhParams", spec.settings)

    def extract(self, samples: Sequence[Sample]) -> list[Features]:
        """`points` float32 (n, 33), `pixel` int32 (n,) per sample; DataError for a sample with too few points."""
        return [self._one(sample) for sample in samples]

    def _one(self, sample: Sample) -> Features:
        from mmad_cli.preprocessing.resize import to_network_size, valid_pixels

        settings = self._settings
        xyz = to_network_size(sample, size=settings.size, xyz_resize=settings.xyz_resize).xyz
        pixel = np.flatnonzero(valid_pixels(xyz))
        if len(pixel) < settings.normal_neighbours:
            raise DataError(
                f"{sample.id}: {len(pixel)} valid 3D points are left at {settings.size} x {settings.size}, FPFH needs "
                f"at least {settings.normal_neighbours}; check the scan, or preprocess it with another protocol"
            )
        points = xyz.reshape(-1, 3)[pixel]
        normals = point_normals(points, settings.normal_radius, settings.normal_neighbours)
        histograms = point_histograms(points, normals, settings.feature_radius, settings.feature_neighbours)
        return {"points": float32(histograms), "pixel": pixel.astype(np.int32)}

"""Groups of points: farthest point sampling of centres, and the nearest neighbours of each centre.

Both follow the rules of the CUDA operators that the published codes call (pointnet2_ops, KNN_CUDA), so the same
points are chosen; distances are direct differences in float32 and ties go to the smallest index.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmad_cli.devices import elements_that_fit
from mmad_cli.types import FloatArray, IndexArray

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

# squared norm in square metres up to which farthest point sampling takes a point for padding
ORIGIN_RADIUS_SQUARED = 1e-3

_START_DISTANCE = 1e10
# steps of farthest point sampling between two rounds of parking, and how far below the expected last distance
_PARKING_INTERVAL = 64
_PARKING_MARGIN = 0.6
# neighbours asked for beyond the wanted ones, so that rounding to float32 cannot push one out
_SPARE = 16
# the relative error of a squared distance in float32 is below 3e-7
_ROUNDING = 1e-6
# pairs of centre and point at a time on a device, 8 bytes each
_DEVICE_PAIRS = 1 << 25


def farthest_points(
    points: NDArray[np.floating[Any]], count: int, skip_origin: bool = True, device: str = "cpu", start: int = 0
) -> IndexArray:
    """Indices int64 (count,) of farthest point sampling in order of choice; the first is point `start`.

    Each next point has the largest squared distance to those chosen so far; of equal ones the smallest index.
    points: (N, 3) in metres, N >= 1. skip_origin: points with x^2 + y^2 + z^2 <= 1e-3 are never chosen after the
    first, as in the CUDA operator, for which they are padding. When no distinct point is left, indices repeat.
    Raises ValueError for a wrong shape or count. Source: Qi et al., PointNet++ (arXiv 1706.02413), section 3.2;
    M3DM (arXiv 2303.00601) samples 1024 centres.
    """
    return farthest_points_of([points], count, skip_origin, device, [start])[0]


def farthest_points_of(
    clouds: Sequence[NDArray[np.floating[Any]]],
    count: int,
    skip_origin: bool = True,
    device: str = "cpu",
    starts: Sequence[int] | None = None,
) -> list[IndexArray]:
    """`farthest_points` of several clouds, each from its own start (0 by default); on a GPU in one loop.

    There a step is a handful of kernels that take about as long for many clouds as for one. The same points are chosen
    whichever clouds come together. Raises ValueError as `farthest_points`.
    """
    ready = [_as_points(points, "points") for points in clouds]
    first = [0] * len(ready) if starts is None else list(starts)
    if count < 1:
        raise ValueError(f"count: should be at least 1, got {count}")
    for cloud, start in zip(ready, first, strict=True):
        if not 0 <= start < len(cloud):
            raise ValueError(f"start: should lie in 0..{len(cloud) - 1}, got {start}")
        if len(cloud) < count:
            _log.warning("%d centres of %d points: some repeat", count, len(cloud))
    if device != "cpu":
        return _farthest_points_torch(ready, count, skip_origin, device, first)
    return [_farthest_points_numpy(cloud, count, skip_origin, start) for cloud, start in zip(ready, first, strict=True)]


def _farthest_points_numpy(cloud: FloatArray, count: int, skip_origin: bool, start: int) -> IndexArray:
    """The loop, on the points that can still be chosen.

    A distance never grows, so a point below the distance of the last choice is never chosen. That distance is not
    known before the end: points well below what it should be (on a surface squared distances fall as 1 / step) are
    parked, and come back, brought up to date, if the largest distance does fall below them.
    """
    axes = np.ascontiguousarray(cloud.T)
    active = _Points(np.arange(len(cloud)), axes, _start_distances(axes, skip_origin))
    parked: list[tuple[int, _Points]] = []
    bound, may_park = -np.inf, True
    chosen = np.full(count, start, dtype=np.int64)
    for step in range(1, count):
        active.approach(cloud[chosen[step - 1]])
        best = active.distance.argmax()
        if active.distance[best] < bound:
            active = _with_parked(active, parked, cloud[chosen[:step]])
            best = active.distance.argmax()
            bound, may_park = -np.inf, False
        chosen[step] = active.index[best]
        if may_park and step % _PARKING_INTERVAL == 0 and active.distance[best] > 0:
            # never lower than before, or points parked earlier could be the farthest unnoticed
            bound = max(bound, _PARKING_MARGIN * float(active.distance[best]) * step / count)
            below = active.distance < bound
            parked.append((step, active.part(np.flatnonzero(below))))
            active = active.part(np.flatnonzero(~below))
    return chosen


class _Points:
    """Points with their squared distance to the chosen ones: index (n,) ascending, axes (3, n), distance (n,)."""

    def __init__(self, index: IndexArray, axes: FloatArray, distance: FloatArray) -> None:
        self.index, self.axes, self.distance = index, axes, distance
        self._difference = np.empty_like(axes)

    def approach(self, point: FloatArray) -> None:
        """Take one more chosen point (3,) into account."""
        difference = self._difference
        np.subtract(self.axes, point[:, None], out=difference)
        np.multiply(difference, difference, out=difference)
        # left to right, as the operator adds them: another order rounds differently
        np.add(difference[0], difference[1], out=difference[0])
        np.add(difference[0], difference[2], out=difference[0])
        np.minimum(self.distance, difference[0], out=self.distance)

    def part(self, which: IndexArray) -> _Points:
        """Those at positions `which`."""
        return _Points(self.index[which], self.axes.take(which, axis=1), self.distance[which])


def _with_parked(active: _Points, parked: list[tuple[int, _Points]], chosen: FloatArray) -> _Points:
    """All points again, each having seen every chosen point (n, 3); a part parked at step i has seen the first i."""
    for step, points in parked:
        for point in chosen[step:]:
            points.approach(point)
    every = [active, *(points for _, points in parked)]
    index = np.concatenate([points.index for points in every])
    axes = np.concatenate([points.axes for points in every], axis=1)
    joined = _Points(index, axes, np.concatenate([points.distance for points in every]))
    return joined.part(np.argsort(index))


def _farthest_points_torch(
    clouds: Sequence[FloatArray], count: int, skip_origin: bool, device: str, starts: Sequence[int]
) -> list[IndexArray]:
    """The same on a GPU, for all clouds in one loop; no choice leaves it before the end, so nothing waits for the host.

    Shorter clouds are filled up with points that are never the farthest: of equal distances the first one counts, and
    the filling comes last.
    """
    import torch

    if not clouds:
        return []
    axes = np.zeros((len(clouds), 3, max(map(len, clouds))), dtype=np.float32)
    start_distance = np.full((axes.shape[0], axes.shape[2]), -1, dtype=np.float32)
    for number, cloud in enumerate(clouds):
        axes[number, :, : len(cloud)] = cloud.T
        start_distance[number, : len(cloud)] = _start_distances(cloud.T, skip_origin)
    with torch.inference_mode():
        points, distance = torch.from_numpy(axes).to(device), torch.from_numpy(start_distance).to(device)
        chosen = torch.empty((count, len(clouds)), dtype=torch.int64, device=device)
        chosen[0] = torch.tensor(starts, device=device)
        square, total = torch.empty_like(points), torch.empty_like(distance)
        for step in range(1, count):
            last = points.gather(2, chosen[step - 1][:, None, None].expand(-1, 3, 1))
            torch.sub(points, last, out=square).square_()
            # left to right, as the operator adds them
            torch.add(square[:, 0], square[:, 1], out=total).add_(square[:, 2])
            torch.minimum(distance, total, out=distance)
            torch.argmax(distance, dim=1, out=chosen[step])
        return list(np.ascontiguousarray(chosen.T.cpu().numpy()))


def _start_distances(axes: FloatArray, skip_origin: bool) -> FloatArray:
    distance = np.full(axes.shape[1], _START_DISTANCE, dtype=np.float32)
    if skip_origin:
        squared_norm = axes[0] * axes[0] + axes[1] * axes[1] + axes[2] * axes[2]
        # compared in float64, since the bound has no exact float32 value; below zero they can never be the farthest
        distance[squared_norm.astype(np.float64) <= ORIGIN_RADIUS_SQUARED] = -1
    return distance


def group_neighbours(
    points: NDArray[np.floating[Any]],
    centres: NDArray[np.floating[Any]],
    count: int = 128,
    device: str = "cpu",
    workers: int = 1,
) -> IndexArray:
    """Indices int64 (G, count) of the nearest points of each centre, ascending; ties to the smaller index.

    points (N, 3), centres (G, 3) in metres; workers: threads of the search on a CPU. Exact: ranked by squared
    differences in float32 as the published operator does. Raises ValueError for wrong shapes and when there are
    fewer points than `count`.
    """
    cloud, middle = _as_points(points, "points"), _as_points(centres, "centres")
    if not 1 <= count <= len(cloud):
        raise ValueError(f"points: should be at least as many as the group size of {count}, got {len(cloud)}")
    if device != "cpu":
        return _neighbours_torch(cloud, middle, count, device)
    return _neighbours_tree(cloud, middle, count, workers)


def _neighbours_tree(cloud: FloatArray, centres: FloatArray, count: int, workers: int) -> IndexArray:
    from scipy.spatial import cKDTree

    asked = min(count + _SPARE, len(cloud))
    tree = cKDTree(cloud, balanced_tree=False, compact_nodes=False)
    reached, candidates = tree.query(centres, k=np.arange(1, asked + 1), workers=workers)
    keys = _ranking_keys(_squared_differences(cloud[candidates], centres[:, None]), candidates)
    keys.sort(axis=1)
    result = _index_of(keys[:, :count])
    if asked < len(cloud):
        # the tree ranks in float64: a row is settled when what lies beyond its candidates is farther in float32 too
        limit = _distance_of(keys[:, count - 1]).astype(np.float64) * (1 + _ROUNDING)
        for row in np.flatnonzero(reached[:, -1] ** 2 <= limit):
            every = np.arange(len(cloud))
            all_keys = _ranking_keys(_squared_differences(cloud, centres[row]), every)
            result[row] = _index_of(np.sort(np.partition(all_keys, count - 1)[:count]))
    return result


def _neighbours_torch(cloud: FloatArray, centres: FloatArray, count: int, device: str) -> IndexArray:
    """The same on a GPU, in tiles of centres against all points."""
    import torch

    with torch.inference_mode():
        points = torch.from_numpy(cloud).to(device)
        index = torch.arange(len(cloud), device=device)
        tile = max(1, elements_that_fit(device, _DEVICE_PAIRS, 8) // len(cloud))
        tiles = torch.split(torch.from_numpy(centres).to(device), tile)
        found = torch.cat([_nearest_on_device(points, index, middle, count) for middle in tiles])
        return np.asarray(found.cpu().numpy())


def _nearest_on_device(points: torch.Tensor, index: torch.Tensor, centres: torch.Tensor, count: int) -> torch.Tensor:
    import torch

    distance = (points[None, :, 0] - centres[:, None, 0]).square_()
    for axis in (1, 2):
        distance += (points[None, :, axis] - centres[:, None, axis]).square_()
    # bits of a float32 that is not negative rank as the number does; the index below them settles ties
    keys = (distance.view(torch.int32).to(torch.int64) << 32) | index
    return keys.topk(count, dim=1, largest=False, sorted=True).values & 0xFFFFFFFF


def _squared_differences(a: FloatArray, b: FloatArray) -> FloatArray:
    """Squared distances over the last axis in float32, added left to right."""
    difference = a - b
    np.multiply(difference, difference, out=difference)
    return np.asarray(difference[..., 0] + difference[..., 1] + difference[..., 2])


def _ranking_keys(squared: FloatArray, index: NDArray[np.integer[Any]]) -> IndexArray:
    """Integers that rank by distance, then by index: the bits of a float32 >= 0 rank as the number does."""
    return np.asarray((squared.view(np.int32).astype(np.int64) << 32) | index)


def _index_of(keys: IndexArray) -> IndexArray:
    return np.asarray(keys & 0xFFFFFFFF)


def _distance_of(keys: IndexArray) -> FloatArray:
    return (keys >> 32).astype(np.int32).view(np.float32)


def _as_points(array: NDArray[np.floating[Any]], name: str) -> FloatArray:
    if array.ndim != 2 or array.shape[1] != 3 or not len(array):
        raise ValueError(f"{name}: should be of shape (n, 3) with n >= 1, got {array.shape}")
    return np.ascontiguousarray(array, dtype=np.float32)

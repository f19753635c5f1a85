"""Which points belong to the object: the largest cluster of DBSCAN (Ester et al., KDD 1996), and how to find it fast.

On a scan almost every point has hundreds of neighbours within DBSCAN's radius, and collecting them is what takes
seconds. A grid whose cells are so small that all points of neighbouring cells are within the radius answers nearly
every question without looking at points: which points are core points, and which hang together. Only what the grid
leaves open is computed from distances, so the result is that of DBSCAN, in about a hundredth of the time.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from mmad_cli.open3d_import import import_open3d
from mmad_cli.types import BoolArray, FloatArray, IndexArray

NOISE = -1

# cells further apart than this on any axis hold no two points within the radius: 2 * sqrt(3) = 3.46 cells
_REACH_CELLS = 4
_LARGEST_KEY = 2**62


def largest_component(points: FloatArray, eps: float = 0.006, min_points: int = 30) -> BoolArray:
    """Points bool (n,) of the most frequent label of `density_labels` on points (n, 3); eps in metres.

    Noise takes part in the vote as in the published scripts of M3DM and CFM: a cloud that is mostly noise keeps its
    noise. Of equally frequent labels the smallest is kept.
    """
    return _most_frequent(density_labels(points, eps, min_points))


def largest_cluster(points: FloatArray, eps: float = 0.006, min_points: int = 30) -> BoolArray:
    """As `largest_component` with the labels of Open3D's DBSCAN, as the published scripts compute them."""
    if len(points) == 0:
        return np.zeros(0, dtype=bool)
    open3d = import_open3d()
    cloud = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(points.astype(np.float64)))
    return _most_frequent(np.asarray(cloud.cluster_dbscan(eps=eps, min_points=min_points), dtype=np.int64))


def density_labels(points: FloatArray, eps: float = 0.006, min_points: int = 30) -> IndexArray:
    """DBSCAN's label int64 (n,) of every point (n, 3): clusters 0, 1, ... by their first core point, noise -1.

    A core point has at least `min_points` points, itself included, closer than `eps` (metres). Core points closer
    than `eps` share a cluster; any other point closer than `eps` to a core point joins the first such cluster.

    Raises ValueError where points are not finite (n, 3), eps is not above 0 or min_points is below 1.
    """
    if points.ndim != 2 or points.shape[1] != 3 or not np.isfinite(points).all():
        raise ValueError(f"points: should be finite (n, 3), got {points.shape}")
    if not eps > 0:
        raise ValueError(f"eps: should be above 0, got {eps}")
    if min_points < 1:
        raise ValueError(f"min_points: should be at least 1, got {min_points}")
    if len(points) == 0:
        return np.zeros(0, dtype=np.int64)
    exact = points.astype(np.float64)
    grid = _Grid(exact, eps)
    core, neighbours = _core_points(exact, grid, eps, min_points)
    labels = np.full(len(points), NOISE, dtype=np.int64)
    labels[core] = _core_labels(exact, grid, core, eps)
    for index, near in neighbours.items():
        reached = labels[[other for other in near if core[other]]]
        if not core[index] and len(reached):
            labels[index] = reached.min()
    return labels


class _Grid:
    """Points sorted into cubes; points of cubes that touch are always closer than `eps`.

    cells float64 (v, 3): whole coordinates of the occupied cubes; cell_of_point (n,); members (v,).
    """

    def __init__(self, points: NDArray[np.float64], eps: float) -> None:
        from scipy.spatial import cKDTree

        # a little smaller than 1 / (2 sqrt 3): two touching cubes have a diagonal just below eps
        self.side = eps / (2 * math.sqrt(3)) * (1 - 1e-6)
        place = np.floor(points / self.side)
        place -= place.min(axis=0)
        extent = place.max(axis=0) + 1
        if np.prod(extent) < _LARGEST_KEY:
            strides = np.array([extent[1] * extent[2], extent[2], 1]).astype(np.int64)
            _, first, inverse, members = np.unique(
                place.astype(np.int64) @ strides, return_index=True, return_inverse=True, return_counts=True
            )
            self.cells: NDArray[np.float64] = place[first]
        else:
            self.cells, inverse, members = np.unique(place, axis=0, return_inverse=True, return_counts=True)
        self.cell_of_point: IndexArray = inverse.reshape(-1)
        self.members: IndexArray = members
        self.tree = cKDTree(self.cells)
        self.touching: IndexArray = self.tree.query_pairs(1.5, p=np.inf, output_type="ndarray")

    def sure_neighbours(self) -> IndexArray:
        """Points (v,) that are certainly closer than eps to every point of a cube, the point itself included."""
        count = len(self.members)
        one, other = self.touching.T
        around = np.bincount(one, self.members[other], count) + np.bincount(other, self.members[one], count)
        return self.members + around.astype(np.int64)


def _core_points(
    points: NDArray[np.float64], grid: _Grid, eps: float, min_points: int
) -> tuple[BoolArray, dict[int, list[int]]]:
    """Core points bool (n,), and the neighbours of the points that the grid could not decide."""
    from scipy.spatial import cKDTree

    core = (grid.sure_neighbours() >= min_points)[grid.cell_of_point]
    open_points = np.flatnonzero(~core)
    if len(open_points) == 0:
        return core, {}
    # few questions: a tree that is quick to build
    tree = cKDTree(points, leafsize=64, compact_nodes=False, balanced_tree=False)
    lists = tree.query_ball_point(points[open_points], eps)
    core[open_points] = [len(near) >= min_points for near in lists]
    return core, dict(zip(open_points.tolist(), lists, strict=True))


def _core_labels(points: NDArray[np.float64], grid: _Grid, core: BoolArray, eps: float) -> IndexArray:
    """Cluster (c,) of every core point, numbered in the order of their first core point."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = len(grid.members)
    has_core = np.bincount(grid.cell_of_point[core], minlength=count) > 0
    one, other = grid.touching[has_core[grid.touching].all(axis=1)].T
    graph = coo_array((np.ones(len(one), dtype=bool), (one, other)), shape=(count, count))
    component = connected_components(graph, directed=False)[1].astype(np.int64)
    _join_across_gaps(points, grid, core, has_core, component, eps)
    _, first, cluster = np.unique(component[grid.cell_of_point[core]], return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[cluster]


def _join_across_gaps(
    points: NDArray[np.float64],
    grid: _Grid,
    core: BoolArray,
    has_core: BoolArray,
    component: IndexArray,
    eps: float,
) -> None:
    """Give one number in `component` (v,) to components with core points closer than eps in cubes that do not touch."""
    from scipy.spatial import cKDTree
    from scipy.spatial.distance import cdist

    names, sizes = np.unique(component[has_core], return_counts=True)
    if len(names) < 2:
        return
    small = np.flatnonzero(has_core & (component != names[np.argmax(sizes)]))
    found = cKDTree(grid.cells[small]).sparse_distance_matrix(
        grid.tree, _REACH_CELLS + 0.5, p=np.inf, output_type="ndarray"
    )
    one, other = small[found["i"]], found["j"]
    # the smallest distance that two points of these cubes can have
    gap = grid.side * np.linalg.norm(np.maximum(np.abs(grid.cells[one] - grid.cells[other]) - 1, 0), axis=1)
    wanted = has_core[other] & (component[one] != component[other]) & (gap < eps)
    by_cell = np.flatnonzero(core)
    by_cell = by_cell[np.argsort(grid.cell_of_point[by_cell], kind="stable")]
    starts = np.searchsorted(grid.cell_of_point[by_cell], np.arange(len(has_core) + 1))
    for a, b in zip(one[wanted].tolist(), other[wanted].tolist(), strict=True):
        if component[a] == component[b]:
            continue
        of_a, of_b = by_cell[starts[a] : starts[a + 1]], by_cell[starts[b] : starts[b + 1]]
        if cdist(points[of_a], points[of_b]).min() < eps:
            component[component == component[b]] = component[a]


def _most_frequent(labels: IndexArray) -> BoolArray:
    if len(labels) == 0:
        return np.zeros(0, dtype=bool)
    names, counts = np.unique(labels, return_counts=True)
    return np.asarray(labels == names[np.argmax(counts)])

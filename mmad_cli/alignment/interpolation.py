"""From point groups to points, pixels and patches: point feature alignment of M3DM (arXiv 2303.00601, section 3).

Interpolation to points, scattering onto the pixel grid, averaging and pooling are all linear in the group features.
Their product is one small sparse matrix that depends on geometry only, so features of a patch grid come from one
product (grid * grid, groups) x (groups, C) and no per-pixel feature ever exists.

Finding the nearest centres has a form for a GPU. Building the sparse matrix has none: it takes a few milliseconds, and
what it makes is read on the CPU, or on the device by one sparse product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmad_cli.alignment.pooling import pooling_operator
from mmad_cli.devices import elements_that_fit
from mmad_cli.types import BoolArray, FloatArray, IndexArray

if TYPE_CHECKING:
    import torch

DistanceForm = Literal["direct", "expanded"]

EPSILON = 1e-8
NEIGHBOURS = 3
# centres examined per point, in turn, until rounding cannot have hidden a nearer one; the last turn takes all
_CANDIDATES = (4, 8, 32)
# points at a time that are compared with all centres
_TIED_ROWS = 1024
# pairs of point and centre at a time on a device, 16 bytes each at most
_DEVICE_PAIRS = 1 << 24
# distances in float64 that are as near as this to each other are compared again in one order of operations
_SAME = 1e-12
# eight roundings to float32, each relative to at most |a|^2 + |b|^2
_EXPANSION_ERROR = 5e-7


def nearest_centres(
    points: NDArray[np.floating[Any]],
    centres: NDArray[np.floating[Any]],
    form: DistanceForm = "direct",
    workers: int = 1,
    device: str = "cpu",
) -> tuple[IndexArray, NDArray[np.float64]]:
    """The three nearest centres of each point and their inverse-distance weights.

    points (P, 3), centres (G, 3) in metres, G >= 3; workers: threads of the search on a CPU. Returns indices int64
    (P, 3), ascending by distance, and weights float64 (P, 3) that sum to 1: 1 / (d + 1e-8) with d the *squared*
    distance. Every device gives the same.

    form: `direct` differences in float64; of equal ones the smaller index. `expanded` is the published float32 formula
    |a|^2 + |b|^2 - 2ab, whose cancellation (1e-8 to 1e-7 for coordinates near 0.5) exceeds the 1e-8 close to a centre:
    weights are wild there and can be negative, and the third centre may be another one. Of centres at equal rounded
    distances those are taken that PyTorch's sort, which is not stable, puts first. Where it gives no finite weights,
    `direct` stands in.

    Raises ValueError for wrong shapes, fewer than three centres, or another form. Source: PointNet++ (arXiv
    1706.02413), equation 2, with p = 2 and k = 3; M3DM.
    """
    if form not in ("direct", "expanded"):
        raise ValueError(f"form: should be 'direct' or 'expanded', got {form!r}")
    cloud, middle = _as_points(points, "points"), _as_points(centres, "centres")
    if len(middle) < NEIGHBOURS:
        raise ValueError(f"centres: should be at least {NEIGHBOURS}, got {len(middle)}")
    if form == "direct":
        indices, exact = _nearest_direct(cloud, middle, workers, device)
        return indices, inverse_distance_weights(exact)
    if device == "cpu":
        indices, squared, tied = _expanded_by_tree(cloud, middle, workers)
    else:
        indices, squared, tied = _expanded_on_device(cloud, middle, device)
    indices = _with_ties_settled(cloud, middle, indices, squared, tied)
    weights = inverse_distance_weights(squared)
    broken = np.flatnonzero(~np.isfinite(weights).all(axis=1))
    if len(broken):
        indices[broken], weights[broken] = nearest_centres(cloud[broken], middle, "direct", workers, device)
    return indices, weights


def inverse_distance_weights(squared: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Weights float64 (P, k) that sum to 1 per row: 1 / (d + 1e-8) of squared distances (P, k), in their precision."""
    # as the published code does: in the distances' own precision, where 1e-8 is rounded too
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        inverse = 1 / (squared + squared.dtype.type(EPSILON))
        return np.asarray(inverse / inverse.sum(axis=1, keepdims=True), dtype=np.float64)


def idw_operator(indices: NDArray[np.integer[Any]], weights: NDArray[np.floating[Any]], n_centres: int) -> Any:
    """Interpolation as a SciPy CSR matrix (P, n_centres): one row per point, `weights` (P, k) at `indices` (P, k).

    A centre may stand twice in a row: its weights add up. Raises ValueError when shapes or indices do not fit.
    """
    from scipy.sparse import csr_matrix

    _check_neighbours(indices, weights, n_centres)
    rows, count = indices.shape
    offsets = np.arange(0, rows * count + 1, count, dtype=np.int32)
    parts = (weights.astype(np.float64).ravel(), indices.astype(np.int32).ravel(), offsets)
    return csr_matrix(parts, shape=(rows, n_centres))


def pooled_operator(
    indices: NDArray[np.integer[Any]],
    weights: NDArray[np.floating[Any]],
    pixel: NDArray[np.integer[Any]],
    n_centres: int,
    grid: int = 56,
    size: int = 224,
) -> Any:
    """Group features to patch features: a SciPy CSC matrix A float32 (grid * grid, n_centres), patches = A @ tokens.

    Interpolation to the points by `weights` (P, 3) at `indices` (P, 3), scattering to `pixel` (P,) = size * y + x
    (empty pixels are zeros and take part), an unpadded 3 x 3 average, adaptive averaging to `grid`. Row grid * y + x
    belongs to patch (y, x); a patch without points under it has an empty row, so its feature is exactly zero.
    Raises ValueError when the parts do not fit. Source: M3DM (arXiv 2303.00601), point feature alignment.
    """
    operator = idw_operator(indices, weights, n_centres)
    if pixel.shape != (len(indices),):
        raise ValueError(f"pixel: should be of shape ({len(indices)},), one per row of indices, got {pixel.shape}")
    return (pooling_operator(pixel, size, grid) @ operator).astype(np.float32)


def _tree_search(cloud: FloatArray, centres: FloatArray, count: int, workers: int) -> IndexArray:
    from scipy.spatial import cKDTree

    return np.asarray(cKDTree(centres).query(cloud, k=count, workers=workers)[1], dtype=np.int64)


def _nearest_direct(
    cloud: FloatArray, centres: FloatArray, workers: int, device: str
) -> tuple[IndexArray, NDArray[np.float64]]:
    """Indices (P, 3) by distance in float64, then by index, and the squared distances."""
    count = min(NEIGHBOURS + 1, len(centres))
    if device == "cpu":
        candidates = _tree_search(cloud, centres, count, workers)
    else:
        candidates = _smallest_on_device(_direct_matrix, cloud, centres, count, device)[0]
    squared = _direct(cloud, centres, candidates)
    indices, nearest = np.ascontiguousarray(candidates[:, :NEIGHBOURS]), squared[:, :NEIGHBOURS]
    # where two are as near, one left out may be too; the search adds up in another order, so nearly equal ones count
    close = np.flatnonzero((squared[:, 1:] <= squared[:, :-1] * (1 + _SAME)).any(axis=1))
    every = np.arange(len(centres))[None]
    for rows in _pieces(close):
        distances = _direct(cloud[rows], centres, every)
        indices[rows] = np.argsort(distances, axis=1, kind="stable")[:, :NEIGHBOURS]
        nearest[rows] = np.take_along_axis(distances, indices[rows], axis=1)
    return indices, nearest


def _expanded_by_tree(cloud: FloatArray, centres: FloatArray, workers: int) -> tuple[IndexArray, FloatArray, BoolArray]:
    """Indices and rounded squared distances (P, 3) of the nearest, ascending; whether one left out is as near (P,)."""
    indices = np.empty((len(cloud), NEIGHBOURS), dtype=np.int64)
    squared = np.empty((len(cloud), NEIGHBOURS), dtype=np.float32)
    scale = float((centres.astype(np.float64) ** 2).sum(axis=1).max())
    tied = np.zeros(len(cloud), dtype=bool)
    open_rows = np.arange(len(cloud))
    for count in (*(count for count in _CANDIDATES if count < len(centres)), len(centres)):
        points = cloud[open_rows]
        candidates = _tree_search(points, centres, count, workers)
        distances = _expanded(points, centres, candidates)
        indices[open_rows], squared[open_rows], tied[open_rows] = _smallest(candidates, distances)
        # a centre beyond the candidates is at least as far as the last of them, less the error
        reached = _direct(points, centres, candidates[:, -1:])[:, 0]
        error = _EXPANSION_ERROR * (scale + (points.astype(np.float64) ** 2).sum(axis=1))
        open_rows = open_rows[reached - error <= squared[open_rows, -1]]
        if not len(open_rows):
            break
    return indices, squared, tied


def _expanded_on_device(
    cloud: FloatArray, centres: FloatArray, device: str
) -> tuple[IndexArray, FloatArray, BoolArray]:
    """The same from the rounded distances to all centres."""
    count = min(NEIGHBOURS + 1, len(centres))
    candidates, squared = _smallest_on_device(_expanded_matrix, cloud, centres, count, device)
    return _smallest(candidates, squared.astype(np.float32, copy=False))


def _with_ties_settled(
    cloud: FloatArray, centres: FloatArray, indices: IndexArray, squared: FloatArray, tied: BoolArray
) -> IndexArray:
    """Indices (P, 3) with equal rounded distances in order: as the published sort has them where more than three are
    as near, else by true distance, then by index.
    """
    equal = np.flatnonzero((squared[:, 1:] == squared[:, :-1]).any(axis=1) & ~tied)
    true = _direct(cloud[equal], centres, indices[equal])
    order = np.lexsort((indices[equal], true, squared[equal]), axis=1)
    indices[equal] = np.take_along_axis(indices[equal], order, axis=1)
    for rows in _pieces(np.flatnonzero(tied)):
        indices[rows] = _first_of_sort(cloud[rows], centres)
    return indices


def _pieces(rows: IndexArray) -> list[IndexArray]:
    return [rows[i : i + _TIED_ROWS] for i in range(0, len(rows), _TIED_ROWS)]


def _smallest_on_device(
    matrix: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    cloud: FloatArray,
    centres: FloatArray,
    count: int,
    device: str,
) -> tuple[IndexArray, NDArray[np.floating[Any]]]:
    """Indices and values (P, count) of the smallest entries of each row of matrix(points, centres), ascending.

    Points in tiles, so that the whole matrix never exists. Of equal entries any.
    """
    import torch

    with torch.inference_mode():
        middle = torch.from_numpy(centres).to(device)
        tile = max(1, elements_that_fit(device, _DEVICE_PAIRS, 16) // len(centres))
        tiles = torch.split(torch.from_numpy(cloud).to(device), tile)
        found = [matrix(points, middle).topk(count, dim=1, largest=False, sorted=True) for points in tiles]
        values, indices = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
        return indices, values


def _direct_matrix(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Squared distances float64 (P, G) by differences."""
    points, centres = points.double(), centres.double()
    squared = (points[:, None, 0] - centres[None, :, 0]).square_()
    for axis in (1, 2):
        squared += (points[:, None, axis] - centres[None, :, axis]).square_()
    return squared


def _expanded_matrix(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Squared distances float32 (P, G) as `_expanded` rounds them, bit for bit."""
    # in float64 a product of two float32 is exact, so whether the device fuses it with the sum makes no difference
    a, b = points.double(), centres.double()
    product = (a[:, None, 0] * b[None, :, 0]).float()
    for axis in (1, 2):
        product = (a[:, None, axis] * b[None, :, axis]).add_(product).float()
    norms = [x[:, 0] * x[:, 0] + x[:, 1] * x[:, 1] + x[:, 2] * x[:, 2] for x in (points, centres)]
    return product.mul_(-2).add_(norms[0][:, None]).add_(norms[1][None])


def _direct(cloud: FloatArray, centres: FloatArray, indices: IndexArray) -> NDArray[np.float64]:
    difference = cloud.astype(np.float64)[:, None] - centres.astype(np.float64)[indices]
    return np.asarray(np.einsum("pka,pka->pk", difference, difference))


def _expanded(cloud: FloatArray, centres: FloatArray, indices: IndexArray) -> FloatArray:
    """Squared distances float32 (P, k) in the published order of operations: -2ab, + |a|^2, + |b|^2."""
    product = _rounded_product(cloud.T.astype(np.float64)[:, :, None], centres.T.astype(np.float64)[:, indices])
    return np.asarray(np.float32(-2) * product + _squared_norms(cloud)[:, None] + _squared_norms(centres)[indices])


def _rounded_product(a: NDArray[np.float64], b: NDArray[np.float64]) -> FloatArray:
    """Inner products float32 over the first of their axes, which has 3 entries.

    Near a centre the rounding is all that is left, so they are accumulated as matrix products do, by fused
    multiply-add: a product of two float32 is exact in float64, and only the sum is rounded.
    """
    product: FloatArray = (a[0] * b[0]).astype(np.float32)
    for axis in (1, 2):
        product = (a[axis] * b[axis] + product).astype(np.float32)
    return product


def _squared_norms(points: FloatArray) -> FloatArray:
    return np.asarray(points[:, 0] ** 2 + points[:, 1] ** 2 + points[:, 2] ** 2)


def _smallest(candidates: IndexArray, distances: FloatArray) -> tuple[IndexArray, FloatArray, BoolArray]:
    """The three smallest of each row, and whether the third of them has an equal that is left out."""
    order = np.argsort(distances, axis=1, kind="stable")[:, : NEIGHBOURS + 1]
    ascending = np.take_along_axis(distances, order, axis=1)
    tied = (ascending[:, NEIGHBOURS - 1 : NEIGHBOURS] == ascending[:, NEIGHBOURS:]).any(axis=1)
    return np.take_along_axis(candidates, order[:, :NEIGHBOURS], axis=1), ascending[:, :NEIGHBOURS], tied


def _first_of_sort(cloud: FloatArray, centres: FloatArray) -> IndexArray:
    """Indices (P, 3) of the smallest rounded distances as the published sort of all centres orders equal ones."""
    import torch

    product = _rounded_product(cloud.T.astype(np.float64)[:, :, None], centres.T.astype(np.float64)[:, None, :])
    squared = np.float32(-2) * product + _squared_norms(cloud)[:, None] + _squared_norms(centres)
    order = torch.from_numpy(squared).sort(dim=1).indices
    return np.asarray(order[:, :NEIGHBOURS].numpy(), dtype=np.int64)


def _as_points(array: NDArray[np.floating[Any]], name: str) -> FloatArray:
    if array.ndim != 2 or array.shape[1] != 3:
        raise ValueError(f"{name}: should be of shape (n, 3), got {array.shape}")
    return np.ascontiguousarray(array, dtype=np.float32)


def _check_neighbours(indices: NDArray[np.integer[Any]], weights: NDArray[np.floating[Any]], n_centres: int) -> None:
    if indices.ndim != 2 or indices.shape != weights.shape:
        raise ValueError(f"weights: should have the shape (P, k) of indices, {indices.shape}, got {weights.shape}")
    if indices.size and not (int(indices.min()) >= 0 and int(indices.max()) < n_centres):
        raise ValueError(f"indices: should lie in 0..{n_centres - 1}, got {indices.min()}..{indices.max()}")

"""Greedy k-centre selection of memory bank rows, exact and without one pass over the bank per pick.

The textbook loop (Gonzalez 1985; Sener & Savarese 2018, algorithm 1) updates the distance of every row after every
pick and is bound by memory bandwidth. The distance of a row to the picks never grows, so an old value is an upper
bound. Here only the rows with the largest bounds are brought up to date, against all picks that they have not seen,
in one matrix product; picks are then made among them for as long as the best one is not below the largest bound of
all other rows. Every pick is therefore the farthest row of the whole bank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmad_cli.devices import elements_that_fit, shared_tensor
from mmad_cli.types import IndexArray

Progress = Callable[[int, int], None]
CoresetDtype = Literal["float32", "float16"]
Rows = NDArray[Any] | Tensor

# Below this many channels a product in double precision costs no more than the minimum over its result.
_FEW_CHANNELS = 64
# Largest absolute error of a squared distance, relative to the squared distance of the pick, that still keeps the
# order of the picks within 1e-4 of the distance.
_ORDER_TOLERANCE = 1e-4
# Squared distances this far below the squared norms are rounding even in double precision: evaluate them directly.
_DOUBLE_NOISE = 1e-12
# A distance of half precision arithmetic lies within this factor of the true one: two roundings of 2^-11 each.
_HALF_ERROR = 1.1e-3
_HALF_TINY = 1e-6
_PROGRESS_SECONDS = 0.5


def greedy_coreset(
    rows: Rows,
    count: int,
    start: int = 0,
    device: str | torch.device = "cpu",
    dtype: CoresetDtype = "float32",
    progress: Progress | None = None,
) -> IndexArray:
    """Indices of `count` rows by greedy k-centre selection, in order of choice.

    The first pick is `start`; every other one is the row that is farthest (Euclidean) from the picks before it, the
    smallest index among equals (in float32, rows that tie up to rounding may come in either order). When every row
    coincides with a pick, the remaining picks are row 0, as an arg-max over zeros gives it in the published codes.

    `dtype="float32"` selects by exact distances: each pick's distance to the earlier picks is the largest there is,
    within 1e-4. `dtype="float16"` reproduces the arithmetic published with BTF and M3DM: the distances to the first
    pick in the precision of the rows, then rows and distances rounded to half precision, every further distance the
    half precision norm of half precision differences.

    Parameters: rows (N, C), array or tensor of real numbers; count between 1 and N; start a row index; device where
    the products are computed (rows on the host are copied there once); progress is called with (done, total) at most
    twice a second. Returns int64 (count,). Working memory on the CPU is the picked rows and blocks of a few MB.

    Raises ValueError for rows that are not 2-D, empty or not finite (or beyond the range of half precision), and for
    a count, start or dtype out of range.

    Source: Gonzalez, Clustering to minimize the maximum intercluster distance, 1985; Roth et al., Towards total
    recall in industrial anomaly detection (PatchCore), CVPR 2022, algorithm 1.
    """
    table = _table(rows, device)
    _check_count(count, table.shape[0])
    if not 0 <= start < table.shape[0]:
        raise ValueError(f"start: must be a row index in [0, {table.shape[0]}), got {start}")
    measure = _measure(table, count, dtype)
    search = _LazyGreedy(measure, measure.first_values(start), count, progress)
    search.begin_with(start)
    return search.run()


def approximate_greedy_coreset(
    rows: Rows,
    count: int,
    n_starts: int = 10,
    seed: int | np.random.RandomState | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> IndexArray:
    """Indices of `count` rows by the approximate greedy selection of PatchCore, in order of choice.

    The distance of a row to the picks begins as its mean distance to `n_starts` random rows, which are not
    themselves picked; from there the selection is greedy as in `greedy_coreset`, in float32.

    Parameters: rows (N, C); count between 1 and N; n_starts at least 1 (at most N are used); seed an int or a NumPy
    random state that the start rows are drawn from. Returns int64 (count,). Raises ValueError as `greedy_coreset`.

    Source: Roth et al., CVPR 2022, and the sampler of its published code.
    """
    table = _table(rows, device)
    _check_count(count, table.shape[0])
    if n_starts < 1:
        raise ValueError(f"n_starts: must be at least 1, got {n_starts}")
    stream = seed if isinstance(seed, np.random.RandomState) else np.random.RandomState(seed)
    starts = stream.choice(table.shape[0], min(n_starts, table.shape[0]), replace=False)
    mean = torch.stack([_squared_distances(table, int(s)).sqrt_() for s in starts]).mean(0)
    measure = _Euclidean(table, count)
    return _LazyGreedy(measure, mean.square_().to(measure.products.dtype), count, progress).run()


def random_coreset(n_rows: int, count: int, seed: int | np.random.RandomState | None = None) -> IndexArray:
    """`count` different row indices drawn uniformly, int64 (count,), in order of draw.

    Raises ValueError when count is not in [1, n_rows].
    """
    _check_count(count, n_rows)
    stream = seed if isinstance(seed, np.random.RandomState) else np.random.RandomState(seed)
    return stream.permutation(n_rows)[:count].astype(np.int64)


def covering_radius(rows: Rows, picks: IndexArray, k_grid: IndexArray) -> NDArray[np.float64]:
    """Largest distance of any row to the first k picks, for every k of `k_grid`.

    Parameters: rows (N, C); picks (M,) row indices in order of choice; k_grid (K,) ascending numbers in [1, M].
    Returns float64 (K,), computed in double precision. Raises ValueError for k outside [1, M].
    """
    grid = np.asarray(k_grid, dtype=np.int64)
    picks = np.asarray(picks, dtype=np.int64)
    if grid.size and (grid.min() < 1 or grid.max() > len(picks)):
        raise ValueError(f"k_grid: must lie in [1, {len(picks)}], got {grid.min()} to {grid.max()}")
    radius, _ = _radius_and_pick_distance(rows, picks)
    return radius[grid]


def greedy_certificate(rows: Rows, picks: IndexArray) -> float:
    """How far the worst pick is from being the farthest row: 0 for a perfect greedy selection.

    For every pick but the first: (largest distance of any row to the earlier picks - distance of the pick to them)
    divided by the former; the maximum over all picks. Computed in double precision.

    Parameters: rows (N, C); picks (M,) row indices in order of choice. Returns a number in [0, 1].
    """
    radius, own = _radius_and_pick_distance(rows, np.asarray(picks, dtype=np.int64))
    before = radius[1:-1]
    gap = np.where(before > 0, (before - own[1:]) / np.where(before > 0, before, 1.0), 0.0)
    return float(gap.max(initial=0.0))


def _radius_and_pick_distance(
    rows: Rows, picks: IndexArray, block: int = 64
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Covering radius after k = 0..M picks (M + 1,), and the distance of every pick to those before it (M,)."""
    table = _table(rows, "cpu")
    mean = table.to(torch.float64).mean(0)
    current = torch.full((table.shape[0],), torch.inf, dtype=torch.float64)
    radius, own = [np.inf], []
    for begin in range(0, len(picks), block):
        some = torch.from_numpy(picks[begin : begin + block])
        distances = _double_distances(table, table[some], mean)
        distances[some, torch.arange(len(some))] = 0.0
        running = torch.cat([current[:, None], distances], 1).cummin(1).values
        own.append(running[some, torch.arange(len(some))].numpy())
        radius.extend(running[:, 1:].amax(0).tolist())
        current = running[:, -1].clone()
    return np.array(radius), np.concatenate(own)


def _double_distances(table: Tensor, centres: Tensor, mean: Tensor, tile: int = 16384) -> Tensor:
    """Euclidean distances (N, M) in double precision, tiny ones by direct differences."""
    centres = centres.to(torch.float64) - mean
    out = torch.empty((table.shape[0], centres.shape[0]), dtype=torch.float64)
    for begin in range(0, table.shape[0], tile):
        part = table[begin : begin + tile].to(torch.float64) - mean
        norms = part.square().sum(1)[:, None] + centres.square().sum(1)
        squared = torch.addmm(norms, part, centres.T, alpha=-2.0)
        near = (squared <= 1e-8 * norms).nonzero()
        for a, b in _spans(len(near), 4096):
            some = near[a:b]
            difference = part[some[:, 0]] - centres[some[:, 1]]
            squared[some[:, 0], some[:, 1]] = difference.square().sum(1)
        out[begin : begin + tile] = squared.clamp_(min=0).sqrt_()
    return out


def _table(rows: Rows, device: str | torch.device) -> Tensor:
    """The rows as a contiguous floating point tensor on the device, without a copy where that is possible."""
    tensor = rows.detach() if isinstance(rows, Tensor) else shared_tensor(np.asarray(rows))
    if tensor.ndim != 2 or tensor.shape[0] == 0 or tensor.shape[1] == 0:
        raise ValueError(f"rows: must be a non-empty (N, C) matrix, got shape {tuple(tensor.shape)}")
    if tensor.is_complex():
        raise ValueError(f"rows: must be real, got {tensor.dtype}")
    if not tensor.is_floating_point():
        tensor = tensor.to(torch.float32)
    return tensor.to(device).contiguous()


def _check_count(count: int, n_rows: int) -> None:
    if not 1 <= count <= n_rows:
        raise ValueError(f"count: must be between 1 and the number of rows {n_rows}, got {count}")


def _squared_distances(table: Tensor, row: int) -> Tensor:
    """Squared Euclidean distance of all rows to one of them, by differences in float64."""
    origin = table[row].to(torch.float64)
    out = torch.empty(table.shape[0], dtype=torch.float64, device=table.device)
    # One buffer for all tiles: fresh ones would fragment the heap.
    buffer = torch.empty((_tile_rows(table), table.shape[1]), dtype=torch.float64, device=table.device)
    for a, b in _spans(table.shape[0], len(buffer)):
        tile = buffer[: b - a].copy_(table[a:b]).sub_(origin)
        torch.sum(tile.square_(), 1, out=out[a:b])
    return _finite(out)


def _finite(distances: Tensor) -> Tensor:
    if not bool(torch.isfinite(distances).all()):
        raise ValueError("rows: must be finite, got NaN or infinite values")
    return distances


def _spans(n: int, step: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(begin + step, n)) for begin in range(0, n, step))


def _row_tiles(table: Tensor) -> Iterator[tuple[int, int]]:
    return _spans(table.shape[0], _tile_rows(table))


def _tile_rows(table: Tensor) -> int:
    return max(1, min(table.shape[0], _tile_elements(table) // (4 * table.shape[1])))


def _tile_elements(table: Tensor) -> int:
    """Elements of a temporary array of at most 8 bytes each; on a GPU fewer where little memory is free."""
    return 1 << 20 if table.device.type == "cpu" else elements_that_fit(table.device, 1 << 26, 8)


class _Measure(Protocol):
    """Distances on one monotone scale ("value": squared distance, or distance in half precision)."""

    table: Tensor

    def first_values(self, start: int) -> Tensor:
        """Values (N,) of all rows with respect to the first pick."""

    def add_picks(self, indices: Tensor) -> None:
        """Append picked rows (p,) to those that `refresh` measures against."""

    def refresh(self, candidates: Tensor, values: Tensor, seen: Tensor, begin: int) -> Tensor:
        """Smallest value of every candidate (K,) against all picks; `seen` (K,) says how many it has counted."""

    def prepare(self, candidates: Tensor, values: Tensor) -> Callable[[NDArray[Any], int], None]:
        """For candidates (T,) of these values (T,), a function that lowers values to the distance from the j-th."""

    def resolution(self) -> float:
        """Value below which rounding would disturb the order of the last candidates; asks for `refine`."""

    def refine(self, bounds: Tensor) -> Tensor:
        """Go over to higher precision; returns upper bounds that hold there, to be refreshed from pick 0 on."""


def _measure(table: Tensor, count: int, dtype: str) -> _Measure:
    if dtype == "float32":
        return _Euclidean(table, count)
    if dtype == "float16":
        return _Half(table, count)
    raise ValueError(f"dtype: must be 'float32' or 'float16', got {dtype!r}")


class _Products:
    """Squared distances by matrix products of the rows [x, 1] with [-2 p, |p|^2]; |x|^2 is added to the result."""

    def __init__(self, table: Tensor, count: int, dtype: torch.dtype) -> None:
        self.table = table
        self.dtype = dtype
        # Centring keeps the norms, and with them the cancellation, small. Double precision does without, so that
        # ties between coarse values (float16 features) stay exact.
        self.shift = table.mean(0, dtype=torch.float32) if dtype == torch.float32 else None
        self.centres = torch.empty((count, table.shape[1] + 1), dtype=dtype, device=table.device)
        self.indices = torch.empty(count, dtype=torch.int64, device=table.device)
        self.n_picks = 0
        self.scratch = torch.empty(_tile_elements(table), dtype=dtype, device=table.device)
        self._rows = self.scratch.new_empty((0, table.shape[1] + 1))
        self._square = self.scratch.new_empty(0)
        self._part = table.new_empty((_tile_rows(table), table.shape[1]))
        self._part_squared = self.scratch.new_empty(self._part.shape)

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [x, 1] (k, C + 1), valid until the next call, and their squared norms (k,)."""
        if len(indices) > len(self._rows):
            self._rows = self.scratch.new_empty((len(indices), self.table.shape[1] + 1))
        out, norms = self._rows[: len(indices)], self.scratch.new_empty(len(indices))
        out[:, -1] = 1.0
        for a, b in _spans(len(indices), len(self._part)):
            part, squared = out[a:b, :-1], self._part_squared[: b - a]
            part.copy_(torch.index_select(self.table, 0, indices[a:b], out=self._part[: b - a]))
            if self.shift is not None:
                part.sub_(self.shift)
            torch.sum(torch.square(part, out=squared), 1, out=norms[a:b])
        return out, norms

    def add(self, indices: Tensor) -> None:
        for a, b in _spans(len(indices), 2048):
            rows, norms = self.gather(indices[a:b])
            end = self.n_picks + b - a
            self.centres[self.n_picks : end] = rows.mul_(-2.0)
            self.centres[self.n_picks : end, -1] = norms
            self.indices[self.n_picks : end] = indices[a:b]
            self.n_picks = end

    def against(self, rows: Tensor, begin: int, end: int) -> Tensor:
        """|x - p|^2 - |x|^2 of rows (k, C + 1) and picks begin to end, (k, end - begin), in shared scratch memory."""
        out = self.scratch[: len(rows) * (end - begin)].view(len(rows), end - begin)
        return torch.mm(rows, self.centres[begin:end].T, out=out)

    def blocks(self, seen: Tensor, begin: int) -> list[tuple[int, int, int]]:
        """(first pick, last pick, number of rows) of the products that rows (ascending `seen`) still need."""
        width = max(1, len(self.scratch) // max(1, len(seen)))
        edges = [*range(begin, self.n_picks, width), self.n_picks]
        ends = torch.tensor(edges[1:], device=seen.device, dtype=seen.dtype)
        rows = torch.searchsorted(seen, ends).tolist()
        return [(a, b, k) for (a, b), k in zip(pairwise(edges), rows, strict=True) if k > 0]

    def pairwise(self, rows: Tensor, norms: Tensor) -> Tensor:
        """Squared distances (T, T) among gathered rows, valid until the next call."""
        n, inner = len(rows), rows[:, :-1]
        if n * n > len(self._square):
            self._square = self.scratch.new_empty(n * n)
        out = self._square[: n * n].view(n, n)
        torch.mm(inner, inner.T, out=out)
        return out.mul_(-2.0).add_(norms[:, None]).add_(norms).clamp_(min=0)


class _Euclidean:
    """Value = squared Euclidean distance, in float32 for as long as that is accurate enough, then float64."""

    def __init__(self, table: Tensor, count: int) -> None:
        self.table = table
        self.count = count
        few = table.shape[1] <= _FEW_CHANNELS
        reduced = table.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
        self.products = _Products(table, count, torch.float64 if few or reduced else torch.float32)
        self.largest_norm = 0.0

    @property
    def _noise(self) -> float:
        """Error of a squared distance by products relative to the squared norms."""
        return float(torch.finfo(self.products.dtype).eps * (4 + self.table.shape[1] ** 0.5))

    def first_values(self, start: int) -> Tensor:
        return _squared_distances(self.table, start).to(self.products.dtype)

    def add_picks(self, indices: Tensor) -> None:
        self.products.add(indices)

    def refresh(self, candidates: Tensor, values: Tensor, seen: Tensor, begin: int) -> Tensor:
        rows, norms = self.products.gather(candidates)
        out = values.clone()
        for first, last, k in self.products.blocks(seen, begin):
            smallest = self.products.against(rows[:k], first, last).amin(1).add_(norms[:k])
            torch.minimum(out[:k], smallest, out=out[:k])
        self.largest_norm = float(norms.max())
        if self.products.dtype == torch.float64:
            self._evaluate_tiny(rows, norms, out, begin)
        return out.clamp_(min=0)

    def _evaluate_tiny(self, rows: Tensor, norms: Tensor, values: Tensor, begin: int) -> None:
        """Replace values that are rounding by the direct distance to the nearest pick: copies get exactly 0."""
        tiny = ((values <= _DOUBLE_NOISE * norms) & (values != 0)).nonzero().squeeze(1)
        width = self.products.n_picks - begin
        step = max(1, len(self.products.scratch) // max(1, width))
        for a, b in _spans(len(tiny) if width else 0, step):
            some = tiny[a:b]
            nearest = self.products.against(rows[some], begin, self.products.n_picks).argmin(1) + begin
            picked = self.products.centres[nearest, :-1].mul(-0.5)
            values[some] = (rows[some, :-1] - picked).square_().sum(1)

    def prepare(self, candidates: Tensor, values: Tensor) -> Callable[[NDArray[Any], int], None]:
        rows, norms = self.products.gather(candidates)
        squared = self.products.pairwise(rows, norms).fill_diagonal_(0)
        matrix = squared.cpu().numpy()
        if self.products.dtype == torch.float32 or not self._has_tiny(squared, norms):
            return lambda values, j: _lower(values, matrix[j])
        host, limits = rows[:, :-1].cpu().numpy().copy(), (_DOUBLE_NOISE * norms).cpu().numpy()

        def lower(values: NDArray[Any], j: int) -> None:
            tiny = np.flatnonzero(matrix[j] <= limits)
            matrix[j, tiny] = np.square(host[tiny] - host[j]).sum(1)
            np.minimum(values, matrix[j], out=values)

        return lower

    @staticmethod
    def _has_tiny(squared: Tensor, norms: Tensor) -> bool:
        return bool((squared <= _DOUBLE_NOISE * norms).sum() > len(norms))

    def resolution(self) -> float:
        double = self.products.dtype == torch.float64
        return 0.0 if double else self._noise * self.largest_norm / _ORDER_TOLERANCE

    def refine(self, bounds: Tensor) -> Tensor:
        margin = torch.empty_like(bounds)
        for a, b in _row_tiles(self.table):
            norms = self.products.gather(torch.arange(a, b, device=bounds.device))[1]
            margin[a:b] = norms * (4 * self._noise)
        picked = self.products.indices[: self.products.n_picks]
        self.products = _Products(self.table, self.count, torch.float64)
        self.products.add(picked)
        raised = bounds.to(torch.float64) + margin
        raised[picked] = 0.0
        return raised


def _lower(values: NDArray[Any], others: NDArray[Any]) -> None:
    np.minimum(values, others, out=values)


class _Half:
    """Value = distance in the half precision arithmetic of the published code.

    Products tell which pairs can matter, within the rounding of half precision; only those are evaluated.
    """

    def __init__(self, table: Tensor, count: int) -> None:
        self.source = table
        self.table = table.to(torch.float16)
        if not bool(torch.isfinite(self.table).all()):
            raise ValueError("rows: values beyond the range of float16 (65504), use dtype='float32'")
        few = table.shape[1] <= _FEW_CHANNELS
        self.products = _Products(self.table, count, torch.float64 if few else torch.float32)
        self._noise = torch.finfo(self.products.dtype).eps * (4 + table.shape[1] ** 0.5)

    def first_values(self, start: int) -> Tensor:
        dtype = torch.promote_types(self.source.dtype, torch.float32)
        origin = self.source[start].to(dtype)
        out = torch.empty(len(self.source), dtype=dtype, device=self.source.device)
        buffer = out.new_empty((_tile_rows(self.source), self.source.shape[1]))
        for a, b in _spans(len(out), len(buffer)):
            tile = buffer[: b - a].copy_(self.source[a:b]).sub_(origin)
            torch.linalg.vector_norm(tile, dim=1, out=out[a:b])
        return _finite(out).to(torch.float16).to(torch.float32)

    def add_picks(self, indices: Tensor) -> None:
        self.products.add(indices)

    def refresh(self, candidates: Tensor, values: Tensor, seen: Tensor, begin: int) -> Tensor:
        rows, norms = self.products.gather(candidates)
        out = values.clone()
        for first, last, k in self.products.blocks(seen, begin):
            excess = self.products.against(rows[:k], first, last)
            limit = self._limit(out[:k], norms[:k], excess.amin(1) + norms[:k])
            pairs = (excess <= (limit - norms[:k])[:, None]).nonzero()
            for a, b in _spans(len(pairs), _tile_rows(self.table)):
                some = pairs[a:b]
                pick = self.products.indices[some[:, 1] + first]
                exact = _half_distances(self.table[candidates[some[:, 0]]], self.table[pick])
                out.scatter_reduce_(0, some[:, 0], exact, "amin")
        return out

    def _limit(self, values: Tensor, norms: Tensor, smallest: Tensor) -> Tensor:
        """Squared distance above which a pick cannot lower the value in half precision, (k,)."""
        noise = 4 * self._noise * norms
        nearest = smallest.add(noise).clamp_(min=0).sqrt_().mul_(1 + 2.2 * _HALF_ERROR)
        bound = values.to(nearest.dtype) * (1 + _HALF_ERROR)
        return torch.minimum(nearest, bound).add_(_HALF_TINY).square_().add_(noise)

    def prepare(self, candidates: Tensor, values: Tensor) -> Callable[[NDArray[Any], int], None]:
        rows, norms = self.products.gather(candidates)
        squared = self.products.pairwise(rows, norms).sub_(8 * self._noise * norms)
        matrix = self._pairs_within(squared, candidates, values).cpu().numpy()
        return lambda values, j: _lower(values, matrix[j])

    def _pairs_within(self, squared: Tensor, candidates: Tensor, values: Tensor) -> Tensor:
        """Distances among candidates (T, T), infinite where they cannot lower a value, which only gets smaller.

        All at once, though few of them are asked for: a device has many pairs done sooner than a few per pick.
        """
        limit = values.to(squared.dtype).mul(1 + _HALF_ERROR).add_(_HALF_TINY).square_()
        exact = torch.full(squared.shape, torch.inf, dtype=torch.float32, device=squared.device)
        for first, last in _spans(len(squared), max(1, _tile_elements(self.table) // (4 * len(squared)))):
            pairs = (squared[first:last] <= limit).nonzero()
            for a, b in _spans(len(pairs), _tile_rows(self.table)):
                one, other = pairs[a:b, 0] + first, pairs[a:b, 1]
                exact[one, other] = _half_distances(self.table[candidates[other]], self.table[candidates[one]])
        return exact.fill_diagonal_(0.0)

    def resolution(self) -> float:
        return 0.0

    def refine(self, bounds: Tensor) -> Tensor:
        return bounds


def _half_distances(left: Tensor, right: Tensor) -> Tensor:
    """Norm of the rounded difference, rounded to half precision, returned as float32."""
    norm: Tensor = torch.linalg.vector_norm(left - right, dim=1)
    return norm.to(torch.float32)


@dataclass
class _Block:
    """Some rows (ascending positions), the largest value outside them and the first position outside that has it.

    The first position is -1 where it is not known; then no row inside comes before it.
    """

    positions: Tensor
    floor: float
    first_at_floor: int


def _top(values: Tensor, size: int) -> _Block:
    """The `size` largest entries, of equals those that come first."""
    n = len(values)
    if size >= n:
        return _Block(torch.arange(n, device=values.device), -np.inf, n)
    best, positions = torch.topk(values, size + 1)
    last, floor = best[-2:].tolist()
    if last > floor:
        return _Block(positions[:-1].sort().values, floor, -1)
    above = (values > floor).nonzero().squeeze(1)
    equal = (values == floor).nonzero().squeeze(1)
    room = size - len(above)
    return _Block(torch.cat([above, equal[:room]]).sort().values, floor, int(equal[room]))


class _LazyGreedy:
    """The selection loop: bring the most promising rows up to date, pick among the best of them, repeat."""

    def __init__(self, measure: _Measure, bounds: Tensor, count: int, progress: Progress | None) -> None:
        self.measure = measure
        self.bounds = bounds
        self.count = count
        self.progress = progress
        self.picks: list[int] = []
        self.seen = torch.zeros(len(bounds), dtype=torch.int32, device=bounds.device)
        cpu = bounds.device.type == "cpu"
        self.n_refresh, self.n_choose = (1024, 256) if cpu else (8192, 1024)
        # The products among the chosen rows stay small beside the table.
        beside = int((measure.table.numel() * 4 / 5 / bounds.element_size()) ** 0.5)
        self.most_refresh = max(2048, min(len(bounds) // 10, 8192)) if cpu else 65536
        self.most_choose = max(512, min(beside, 2048))
        self._reported = time.monotonic()

    def begin_with(self, row: int) -> None:
        """Make a given row the first pick; its distances are the bounds already."""
        self._add([row])

    def run(self) -> IndexArray:
        """All picks, int64 (count,)."""
        while len(self.picks) < self.count:
            if not self._round():
                self.picks.extend([0] * (self.count - len(self.picks)))
            self._report()
        return np.array(self.picks, dtype=np.int64)

    def _round(self) -> bool:
        """Make as many picks as can be proven; False when every row coincides with a pick."""
        outer = _top(self.bounds, self.n_refresh)
        values = self._refresh(outer.positions)
        best = float(values.max())
        if best < self.measure.resolution():
            self.bounds = self.measure.refine(self.bounds)
            self.seen.zero_()
            return True
        inner = _top(values, self.n_choose)
        chosen = outer.positions[inner.positions]
        floor = max(outer.floor, inner.floor)
        first = [outer.first_at_floor] if outer.floor == floor else []
        if inner.floor == floor:
            at = inner.first_at_floor
            first.append(int(outer.positions[at]) if 0 <= at < len(values) else at)
        if best <= 0 and floor <= 0:
            return False
        made = self._choose(chosen, values[inner.positions], floor, min(first)) if best >= floor else 0
        self._adapt(made, stale=outer.floor >= inner.floor)
        return True

    def _refresh(self, rows: Tensor) -> Tensor:
        """Values of the rows (K,) against all picks."""
        seen, order = self.seen[rows].sort()
        candidates = rows[order]
        fresh = self.measure.refresh(candidates, self.bounds[candidates], seen, int(seen[0]))
        self.bounds[candidates] = fresh
        self.seen[candidates] = len(self.picks)
        return self.bounds[rows]

    def _choose(self, rows: Tensor, values: Tensor, floor: float, first_at_floor: int) -> int:
        """Greedy picks among rows (T,) while no other row can be farther; the number made."""
        index, current = rows.cpu().numpy(), values.cpu().numpy().copy()
        lower = self.measure.prepare(rows, values)
        made: list[int] = []
        room = self.count - len(self.picks)
        least = max(floor, self.measure.resolution())
        while len(made) < room:
            j = int(current.argmax())
            best, row = current[j], int(index[j])
            if best <= 0 or best < least or (best == floor and row > first_at_floor):
                break
            made.append(row)
            lower(current, j)
        self._add(made)
        self.bounds[rows] = torch.from_numpy(current).to(self.bounds.device)
        self.seen[rows] = len(self.picks)
        return len(made)

    def _add(self, rows: list[int]) -> None:
        self.picks.extend(rows)
        if rows:
            self.measure.add_picks(torch.tensor(rows, device=self.bounds.device))

    def _adapt(self, made: int, stale: bool) -> None:
        """Refresh more rows when stale bounds ended the round, choose among more when fresh ones did."""
        if made > self.n_choose // 4:
            self.n_choose = min(self.n_choose * 2, self.most_choose)
        elif made < self.n_choose // 16:
            self.n_choose = max(self.n_choose // 2, 64)
        if stale:
            self.n_refresh = min(self.n_refresh * 2, self.most_refresh)
        elif self.n_refresh > 4 * self.n_choose:
            self.n_refresh = max(self.n_refresh // 2, 256)

    def _report(self) -> None:
        now = time.monotonic()
        if self.progress and (now - self._reported >= _PROGRESS_SECONDS or len(self.picks) == self.count):
            self._reported = now
            self.progress(len(self.picks), self.count)

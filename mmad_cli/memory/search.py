"""Exact nearest-neighbour search in a memory bank."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mmad_cli.devices import elements_that_fit, free_memory, is_out_of_memory, or_on_cpu, shared_tensor
from mmad_cli.memory.expansion import expanded_distances, expanded_distances_on_device, squared_norms
from mmad_cli.memory.limit import fits, tile_elements
from mmad_cli.types import FloatArray, IndexArray

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)

_QUERY_TILE = 4096
_TILE_ELEMENTS = 1 << 24
# products of queries and rows at a time on a GPU, and what FAISS may use for its own
_GPU_PRODUCTS = 1 << 27
_FAISS_TEMPORARY = 1 << 28
# of the free memory, for rows that distances are evaluated with, and differences to them at a time
_ROWS_SHARE = 1 / 4
_DEVICE_ELEMENTS = 1 << 26
# differences at a time on a CPU
_CACHED_ELEMENTS = 1 << 18
# Rounding in the products may swap close neighbours; these many more are looked at again by differences.
_EXTRA = 4
# of numbers in the queries from which on FAISS takes matrix products
_FEW_NUMBERS = 1024
_CORE_TYPE = "OPENBLAS_CORETYPE"


class FlatIndex:
    """Exact Euclidean search over bank rows (M, C).

    The neighbours are found by matrix products: with FAISS (IndexFlatL2) on the CPU and on a GPU that FAISS sees,
    with PyTorch in tiles on a GPU that it does not see or was not built for. Their distances are then evaluated again
    by differences, so that an exact hit has distance exactly 0. Both sides are centred first, which keeps the
    cancellation in the products small. `backend` "faiss" or "torch" forces one. When a GPU has no memory for the rows
    or for a search, a notice says so and the CPU takes over for good; `device` tells where the searches run.

    Raises ValueError for rows that are not 2-D, empty or not finite, and for an unknown backend.
    """

    def __init__(
        self, rows: NDArray[Any], device: str = "cpu", backend: Literal["auto", "faiss", "torch"] = "auto"
    ) -> None:
        # a mapped bank stays mapped
        mapped = isinstance(rows, np.memmap) and rows.dtype == np.float32 and rows.flags.c_contiguous
        self.rows: FloatArray = rows if mapped else np.ascontiguousarray(rows, dtype=np.float32)
        if self.rows.ndim != 2 or self.rows.size == 0:
            raise ValueError(f"rows: must be a non-empty (M, C) matrix, got shape {np.shape(rows)}")
        self.shift: FloatArray = self.rows.mean(0, dtype=np.float64).astype(np.float32)
        if not np.isfinite(self.shift).all():
            raise ValueError("rows: must be finite, got NaN or infinite values")
        self.device, self._backend = device, backend
        self._searcher: _Searcher | None = None
        self._device_rows: Tensor | None = None
        or_on_cpu(self._searcher_on, device, self._task)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def n_channels(self) -> int:
        """Width of the rows."""
        return int(self.rows.shape[1])

    @cached_property
    def squared_norms(self) -> FloatArray:
        """Squared lengths of the rows, float32 (M,)."""
        return squared_norms(self.rows)

    def nearest(self, queries: NDArray[Any], k: int = 1) -> tuple[FloatArray, IndexArray]:
        """Distances (n, k), float32, L2 and not squared, and row indices (n, k), int64, nearest first.

        queries (n, C) on the scale of the rows; k between 1 and M. Of equal distances among the neighbours found, the
        smaller index comes first. Raises ValueError for another width or k.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.n_channels:
            raise ValueError(f"queries: must have shape (n, {self.n_channels}), got {queries.shape}")
        if not 1 <= k <= len(self):
            raise ValueError(f"k: must be between 1 and the number of rows {len(self)}, got {k}")
        tiles = [self._nearest(queries[i : i + _QUERY_TILE], k) for i in range(0, len(queries), _QUERY_TILE)]
        if not tiles:
            return np.empty((0, k), np.float32), np.empty((0, k), np.int64)
        return np.concatenate([d for d, _ in tiles]), np.concatenate([i for _, i in tiles])

    def distances_to(self, queries: NDArray[Any], indices: IndexArray) -> FloatArray:
        """L2 distances (n, k) of queries (n, C) to the rows with the given indices (n, k), by differences."""
        queries = np.ascontiguousarray(queries, dtype=np.float32)

        def distances(device: str) -> FloatArray:
            rows = self._rows_on(device)
            if rows is None:
                return _distances(self.rows, queries, indices)
            return _distances_on_device(rows, queries, indices)

        return or_on_cpu(distances, self.device, self._task)

    def expanded_distances_to(
        self, queries: FloatArray, which: IndexArray, indices: IndexArray, query_norms: FloatArray
    ) -> FloatArray:
        """Distances float32 (p,) of queries[which] to rows[indices], p pairs, as `expanded_distances` rounds them.

        query_norms (n,): `squared_norms` of all queries (n, C).
        """
        norms = query_norms[which], self.squared_norms[indices]

        def distances(device: str) -> FloatArray:
            rows = self._rows_on(device)
            if rows is None:
                return expanded_distances(queries[which], self.rows[indices], *norms)
            return expanded_distances_on_device(queries, rows, which, indices, *norms)

        return or_on_cpu(distances, self.device, self._task)

    def _rows_on(self, device: str) -> Tensor | None:
        """The rows on a GPU, beside those of the search, where there is room for them; None on the CPU."""
        if device == "cpu" or self.device == "cpu":
            return None
        import torch

        if self._device_rows is None:
            free = free_memory(device)
            if free is not None and self.rows.nbytes > _ROWS_SHARE * free:
                return None
            self._device_rows = torch.empty(self.rows.shape, device=device)
            for i, tile in _tiles(self.rows):
                self._device_rows[i : i + len(tile)] = shared_tensor(tile)
        return self._device_rows

    def _nearest(self, queries: FloatArray, k: int) -> tuple[FloatArray, IndexArray]:
        shifted, count = queries - self.shift, min(k + _EXTRA, len(self))
        found = or_on_cpu(lambda device: self._searcher_on(device).search(shifted, count), self.device, self._task)
        distances = self.distances_to(queries, found)
        order = np.lexsort((found, distances), axis=1)[:, :k]
        return np.take_along_axis(distances, order, 1), np.take_along_axis(found, order, 1)

    def _searcher_on(self, device: str) -> _Searcher:
        if self._searcher is None or device != self.device:
            # the old one first, so that its memory is free
            self._searcher = self._device_rows = None
            self._searcher = _make_searcher(self.rows, self.shift, device, self._backend)
            self.device = device
        return self._searcher

    @property
    def _task(self) -> str:
        return f"search among {len(self)} x {self.n_channels} rows"


def _distances(rows: FloatArray, queries: FloatArray, indices: IndexArray) -> FloatArray:
    """`FlatIndex.distances_to` on the CPU."""
    # small enough for a cache: fresh memory costs more than the arithmetic
    elements = min(_CACHED_ELEMENTS, tile_elements())
    step = max(1, elements // (rows.shape[1] * max(1, indices.shape[1])))
    out = np.empty(indices.shape, dtype=np.float32)
    for i in range(0, len(queries), step):
        difference = rows[indices[i : i + step]] - queries[i : i + step, None]
        out[i : i + step] = np.sqrt(np.einsum("nkc,nkc->nk", difference, difference))
    return out


def _distances_on_device(rows: Tensor, queries: FloatArray, indices: IndexArray) -> FloatArray:
    """The same for rows on a device."""
    import torch

    step = max(1, elements_that_fit(rows.device, _DEVICE_ELEMENTS, 4) // (rows.shape[1] * max(1, indices.shape[1])))
    given, wanted = shared_tensor(queries).to(rows.device), torch.from_numpy(indices).to(rows.device)
    found = [
        (rows[index] - query[:, None]).square_().sum(2).sqrt_()
        for query, index in zip(torch.split(given, step), torch.split(wanted, step), strict=True)
    ]
    return np.asarray(torch.cat(found).cpu().numpy())


def _tiles(rows: FloatArray) -> Iterator[tuple[int, FloatArray]]:
    """Position and rows of tiles that are small beside the whole."""
    step = max(1, _TILE_ELEMENTS // rows.shape[1])
    return ((i, rows[i : i + step]) for i in range(0, len(rows), step))


class _Searcher(Protocol):
    """Finds rows nearest to queries, both shifted."""

    def search(self, queries: FloatArray, k: int) -> IndexArray:
        """Indices int64 (n, k) of the nearest rows of queries (n, C), nearest first up to rounding."""


def import_faiss() -> Any:
    """The faiss module, with its matrix products told which processor this is.

    The wheels bring an OpenBLAS that takes processors newer than itself for very old ones and is then five times
    slower; naming the kind while the library loads avoids that. A value that the user has set is left alone.

    Newer versions also take matrix products only from 128 000 numbers in the queries on, which is several times too
    late for banks of any size; a few queries are enough.
    """
    kind = _processor_kind()
    if "faiss" in sys.modules:
        return sys.modules["faiss"]
    named = kind is not None and _CORE_TYPE not in os.environ
    if kind is not None and named:
        os.environ[_CORE_TYPE] = kind
    try:
        faiss = importlib.import_module("faiss")
    finally:
        if named:
            # numpy and scipy have newer copies that know better
            del os.environ[_CORE_TYPE]
    # older versions count queries here, not numbers, and begin at 20
    faiss.cvar.distance_compute_blas_threshold = min(faiss.cvar.distance_compute_blas_threshold, _FEW_NUMBERS)
    return faiss


def _processor_kind() -> str | None:
    """OpenBLAS' name for an x86-64 processor with AVX-512 or AVX2; None for others."""
    try:
        flags = set(next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if "flags" in line).split())
    except (OSError, StopIteration):
        return None
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        return "SKYLAKEX"
    return "HASWELL" if {"avx2", "fma"} <= flags else None


class _FaissSearcher:
    def __init__(self, rows: FloatArray, shift: FloatArray, gpu: int | None) -> None:
        faiss = import_faiss()
        index: Any = faiss.IndexFlatL2(rows.shape[1])
        if gpu is not None:
            config = faiss.GpuIndexFlatConfig()
            config.device = gpu
            resources = faiss.StandardGpuResources()
            # FAISS takes up to 1.5 GB for itself at once, for every bank
            resources.setTempMemory(4 * elements_that_fit(f"cuda:{gpu}", _FAISS_TEMPORARY, 4))
            index = faiss.GpuIndexFlatL2(resources, rows.shape[1], config)
        for _, tile in _tiles(rows):
            index.add(tile - shift)
        self.index = index

    def search(self, queries: FloatArray, k: int) -> IndexArray:
        found: IndexArray = self.index.search(queries, k)[1]
        return found


class _TiledFaissSearcher:
    """FAISS over tiles of rows that stay where they are: no second copy of the bank is made."""

    def __init__(self, rows: FloatArray, shift: FloatArray) -> None:
        self.rows, self.shift = rows, shift

    def search(self, queries: FloatArray, k: int) -> IndexArray:
        faiss = import_faiss()
        step = max(k, tile_elements() // self.rows.shape[1])
        best = np.full((len(queries), k), np.inf, np.float32)
        index = np.zeros((len(queries), k), np.int64)
        for begin in range(0, len(self.rows), step):
            rows = np.ascontiguousarray(self.rows[begin : begin + step] - self.shift)
            values, at = faiss.knn(queries, rows, min(k, len(rows)))
            both, where = np.concatenate([best, values], 1), np.concatenate([index, at + begin], 1)
            order = np.argsort(both, axis=1, kind="stable")[:, :k]
            best, index = np.take_along_axis(both, order, 1), np.take_along_axis(where, order, 1)
        return index


class _TorchSearcher:
    def __init__(self, rows: FloatArray, shift: FloatArray, device: str) -> None:
        import torch

        self.device = device
        if device == "cpu":
            self.query_tile, self.row_tile = 1024, 4096
        else:
            self.query_tile, self.row_tile = 4096, elements_that_fit(device, _GPU_PRODUCTS, 4) // 4096
        self.rows = torch.empty(rows.shape, device=device)
        self.norms = torch.empty(len(rows), device=device)
        for i, tile in _tiles(rows):
            part = slice(i, i + len(tile))
            self.norms[part] = self.rows[part].copy_(torch.from_numpy(tile - shift)).square().sum(1)
        self.scratch = torch.empty(self.query_tile * min(self.row_tile, len(rows)), device=device)

    def search(self, queries: FloatArray, k: int) -> IndexArray:
        import torch

        tiles = torch.from_numpy(queries).to(self.device)
        step = self.query_tile
        found = [self._search_tile(tiles[i : i + step], k) for i in range(0, len(tiles), step)]
        indices: IndexArray = torch.cat(found).cpu().numpy()
        return indices

    def _search_tile(self, queries: Tensor, k: int) -> Tensor:
        """Indices (n, k) of the smallest |b|^2 - 2 q.b, kept while going over tiles of rows."""
        import torch

        best = torch.full((len(queries), k), torch.inf, device=self.device)
        index = torch.zeros((len(queries), k), dtype=torch.int64, device=self.device)
        for begin in range(0, len(self.rows), self.row_tile):
            rows = self.rows[begin : begin + self.row_tile]
            out = self.scratch[: len(queries) * len(rows)].view(len(queries), len(rows))
            excess = torch.mm(queries, rows.T, out=out).mul_(-2.0).add_(self.norms[begin : begin + len(rows)])
            values, at = excess.topk(min(k, len(rows)), dim=1, largest=False)
            merged, both = torch.cat([best, values], 1), torch.cat([index, at + begin], 1)
            best, at = merged.topk(k, dim=1, largest=False)
            index = both.gather(1, at)
        return index


def _make_searcher(rows: FloatArray, shift: FloatArray, device: str, backend: str) -> _Searcher:
    if backend not in ("auto", "faiss", "torch"):
        raise ValueError(f"backend: must be 'auto', 'faiss' or 'torch', got {backend!r}")
    if backend == "torch":
        return _TorchSearcher(rows, shift, device)
    on_gpu = device.startswith("cuda")
    if not on_gpu and (isinstance(rows, np.memmap) or not fits(rows.nbytes)):
        return _TiledFaissSearcher(rows, shift)
    gpus = getattr(import_faiss(), "get_num_gpus", lambda: 0)() if on_gpu else 0
    if not gpus:
        wanted = backend == "faiss" or not on_gpu
        return _FaissSearcher(rows, shift, None) if wanted else _TorchSearcher(rows, shift, device)
    try:
        return _FaissSearcher(rows, shift, int(device.partition(":")[2] or 0))
    except RuntimeError as error:
        if backend == "faiss" or is_out_of_memory(error):
            raise
        _log.warning("FAISS does not run on this GPU (%s), going on without it", str(error).strip().partition("\n")[0])
    return _TorchSearcher(rows, shift, device)

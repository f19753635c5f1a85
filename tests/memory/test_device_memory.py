"""A GPU without enough memory: smaller tiles, then the CPU, with the same results. The GPU is made up.

`cpu:0` is a device that is not called `cpu`: everything takes the path of a GPU there.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mmad_cli.memory import (
    BankConfig,
    FlatIndex,
    MemoryBank,
    coreset,
    expansion,
    greedy_coreset,
    patch_distances,
    search,
)
from tests.pretended_cuda import pretended_cuda

GPU = "cpu:0"


def exhausted(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_bank_that_does_not_fit_is_searched_on_the_cpu(clustered, monkeypatch, caplog, backend):
    rows, queries = clustered(900, 30), clustered(50, 30, seed=1)
    make = search._make_searcher
    monkeypatch.setattr(search, "_make_searcher", lambda *a: exhausted() if a[2] == GPU else make(*a))
    index = FlatIndex(rows, GPU, backend)
    assert index.device == "cpu"
    assert "search among 900 x 30 rows: no memory left on cpu:0" in caplog.text
    expected = FlatIndex(rows, "cpu", backend).nearest(queries, 3)
    assert all(np.array_equal(a, b) for a, b in zip(index.nearest(queries, 3), expected, strict=True))


def test_memory_that_ends_in_a_search_changes_the_device_once(clustered, monkeypatch, caplog):
    rows, queries = clustered(900, 30), clustered(50, 30, seed=1)
    index = FlatIndex(rows, GPU, "torch")
    expected = index.nearest(queries, 3)
    assert index.device == GPU
    # what FAISS says
    error = RuntimeError("Error: 'err == cudaSuccess' failed: cudaMalloc error out of memory [2]")

    def fails(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(index._searcher, "search", fails)
    for _ in range(2):
        distances, indices = index.nearest(queries, 3)
        np.testing.assert_allclose(distances, expected[0], rtol=1e-6)
        assert np.array_equal(indices, expected[1])
    assert index.device == "cpu"
    assert caplog.text.count("no memory left") == 1


def test_other_errors_of_a_device_are_not_hidden(clustered, monkeypatch):
    index = FlatIndex(clustered(100, 8), GPU, "torch")

    def fails(*_: Any) -> Any:
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr(index._searcher, "search", fails)
    with pytest.raises(RuntimeError, match="device-side assert"):
        index.nearest(clustered(10, 8), 1)


def test_a_gpu_that_faiss_was_not_built_for_is_searched_without_faiss(clustered, monkeypatch, caplog):
    rows, queries = clustered(900, 30), clustered(50, 30, seed=1)
    expected = FlatIndex(rows).nearest(queries, 3)
    faiss = search.import_faiss()

    def resources() -> Any:
        raise RuntimeError("Error: no kernel image is available for execution on the device\nStack trace")

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
    monkeypatch.setattr(faiss, "StandardGpuResources", resources, raising=False)
    monkeypatch.setattr(faiss, "GpuIndexFlatConfig", SimpleNamespace, raising=False)
    with pretended_cuda():
        index = FlatIndex(rows, "cuda")
        found = index.nearest(queries, 3)
        assert index.device == "cuda"
        assert "FAISS does not run on this GPU (Error: no kernel image is available for execution on" in caplog.text
        assert "Stack trace" not in caplog.text
        with pytest.raises(RuntimeError, match="no kernel image"):
            FlatIndex(rows, "cuda", "faiss")
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    assert np.array_equal(found[1], expected[1])


MB = 1 << 20


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_selection_stays_within_the_memory_of_the_device(clustered, dtype):
    """Five times the rows is enough; a device without limits may take more for larger tiles."""
    rows = clustered(10_000, 256)
    peaks = []
    for free in (1 << 40, 50 * MB):
        with pretended_cuda(free) as device:
            before = device.used
            picks = greedy_coreset(rows, 100, device="cuda", dtype=dtype)
            peaks.append(device.peak - before)
        assert np.array_equal(picks, greedy_coreset(rows, 100, dtype=dtype))
    assert peaks[1] < 50 * MB < peaks[0]


@pytest.mark.parametrize(("free", "device"), [(1 << 40, "cuda"), (40 * MB, "cuda"), (12 * MB, "cpu")])
def test_a_search_stays_within_the_memory_of_the_device(clustered, free, device, caplog):
    rows, queries = clustered(10_000, 256), clustered(500, 256, seed=1)
    expected = FlatIndex(rows, "cpu", "torch").nearest(queries, 3)
    with pretended_cuda(free):
        index = FlatIndex(rows, "cuda", "torch")
        found = index.nearest(queries, 3)
    assert index.device == device
    assert ("no memory left on cuda" in caplog.text) == (device == "cpu")
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    assert np.array_equal(found[1], expected[1])


@pytest.mark.parametrize("kind", ["greedy", "approximate"])
def test_a_selection_without_memory_goes_on_on_the_cpu(clustered, monkeypatch, caplog, kind):
    """With the picks that the CPU makes: the random stream starts again where it was."""
    rows = clustered(800, 400)
    config = BankConfig(fraction=0.1, coreset=kind, projection="dense")

    def bank(device: str) -> MemoryBank:
        return MemoryBank(config).fit(lambda: iter([rows[:300], rows[300:]]), 800, 400, 7, device)

    expected = bank("cpu")
    name = {"greedy": "greedy_coreset", "approximate": "approximate_greedy_coreset"}[kind]
    select = getattr(coreset, name)

    def on_cpu_only(*arguments: Any) -> Any:
        if GPU in arguments:
            select(*arguments)
            exhausted()
        return select(*arguments)

    monkeypatch.setattr(coreset, name, on_cpu_only)
    found = bank(GPU)
    assert np.array_equal(found.picks_, expected.picks_)
    assert np.array_equal(found.rows_, expected.rows_)
    assert "selecting 80 of 800 rows: no memory left on cpu:0" in caplog.text


@pytest.mark.parametrize("room", [True, False])
def test_distances_are_evaluated_where_the_rows_fit(clustered, monkeypatch, room):
    """A second copy of the rows is for speed only."""
    rows, queries = clustered(900, 300), clustered(50, 300, seed=1)
    queries = np.concatenate([queries, rows[:20]])
    host = FlatIndex(rows)
    index = FlatIndex(rows, GPU, "torch")
    monkeypatch.setattr(search, "free_memory", lambda device: (8 if room else 3) * rows.nbytes)
    for ours, theirs in zip(index.nearest(queries, 3), host.nearest(queries, 3), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-6)
    # published rounding is met bit for bit
    for ours, theirs in zip(*(patch_distances(queries, one, "expanded") for one in (index, host)), strict=True):
        assert np.array_equal(ours, theirs)
    assert (index._device_rows is not None) == room


def test_small_tiles_change_no_choice(clustered, monkeypatch):
    """What a card with little free memory computes with."""
    rows, queries = clustered(3000, 100), clustered(70, 100, seed=1)
    expected = greedy_coreset(rows, 300)
    found = FlatIndex(rows, GPU, "torch").nearest(queries, 3)
    monkeypatch.setattr(coreset, "_tile_elements", lambda table: 1 << 14)
    monkeypatch.setattr(search, "elements_that_fit", lambda *_: 1 << 16)
    monkeypatch.setattr(search, "_TILE_ELEMENTS", 1 << 12)
    monkeypatch.setattr(expansion, "elements_that_fit", lambda *_: 1 << 12)
    assert np.array_equal(greedy_coreset(rows, 300), expected)
    index = FlatIndex(rows, GPU, "torch")
    assert index._searcher.row_tile == 16
    for a, b in zip(index.nearest(queries, 3), found, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(*(patch_distances(queries, one, "expanded") for one in (index, FlatIndex(rows))), strict=True):
        np.testing.assert_array_equal(a, b)

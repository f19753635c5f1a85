from __future__ import annotations

import numpy as np
import pytest
import torch

from mmad_cli.memory import FlatIndex, expanded_distances, expansion, patch_distances, reweighted_score
from mmad_cli.memory.expansion import expanded_distances_on_device, squared_norms

# eps of each published variant (section "scores" of its code) and the divisor of the two-bank variant
VARIANTS = {
    "single_s": (1e-5, 1.0),
    "single_point_s": (1e-5, 1.0),
    "single_fusion_s": (0.0, 1.0),
    "double_s": (0.0, 1000.0),
    "add_s": (0.0, 1.0),
    "triple_s": (0.0, 1.0),
}


def brute_force(queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    distances = np.linalg.norm(queries[:, None].astype(np.float64) - rows[None], axis=2)
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, 1), order


@pytest.mark.parametrize("backend", ["torch", "faiss"])
@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_search_equals_brute_force(clustered, backend, k, offset):
    rows, queries = clustered(5000, 48) + offset, clustered(300, 48, seed=1) + offset
    distances, indices = FlatIndex(rows, backend=backend).nearest(queries, k)
    expected, order = brute_force(queries, rows, k)
    assert distances.dtype == np.float32 and indices.dtype == np.int64 and distances.shape == (300, k)
    np.testing.assert_allclose(distances, expected, rtol=1e-5)
    assert (indices == order).mean() > 0.999
    assert (np.diff(distances, axis=1) >= 0).all()


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_exact_hits_are_zero_and_ties_take_the_smaller_index(clustered, backend):
    rows = clustered(600, 40) + 50
    rows = np.concatenate([rows, rows[:100]])
    distances, indices = FlatIndex(rows, backend=backend).nearest(rows, 2)
    assert (distances[:, 0] == 0).all()
    np.testing.assert_array_equal(indices[:100], np.stack([np.arange(100), np.arange(600, 700)], 1))


def test_search_crosses_tiles(clustered):
    rows = clustered(9000, 8)
    distances, indices = FlatIndex(rows).nearest(rows[::-1].copy(), 1)
    np.testing.assert_array_equal(indices[:, 0], np.arange(9000)[::-1])
    assert (distances == 0).all()


@pytest.mark.parametrize("bank", ["rgb", "xyz"])
@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_published_distances_and_neighbours(golden, bank, backend):
    case = golden[f"scoring_{bank}"]
    index = FlatIndex(case["bank"], backend=backend)
    distances, indices = patch_distances(case["patch"], index)
    np.testing.assert_allclose(distances, case["min_dist_f64"], atol=1e-4)
    np.testing.assert_allclose(distances, case["min_dist"], atol=1e-2)
    np.testing.assert_array_equal(indices, case["min_idx"])
    assert int(distances.argmax()) == case["s_idx"]
    assert indices[case["s_idx"]] == case["m_star_idx"]
    neighbours = index.nearest(case["bank"][case["m_star_idx"]][None], 3)[1][0]
    np.testing.assert_array_equal(neighbours, case["knn_of_m_star"])


@pytest.mark.parametrize("bank", ["rgb", "xyz"])
def test_published_distances_bit_for_bit(golden, bank):
    """Squares are equal to the last bit, noise at exact hits included; the published square root errs by one unit."""
    case = golden[f"scoring_{bank}"]
    distances, indices = patch_distances(case["patch"], FlatIndex(case["bank"]), "expanded")
    hits = case["min_dist_f64"] < 1e-3
    assert case["min_dist"][hits].max() > 3e-3
    np.testing.assert_array_equal(distances[hits], case["min_dist"][hits])
    np.testing.assert_array_max_ulp(distances, case["min_dist"], maxulp=1)
    np.testing.assert_array_equal(indices, case["min_idx"])


@pytest.mark.parametrize("channels", [1, 190, 191, 400])
@pytest.mark.parametrize("tile", [None, 600])
def test_expansion_on_a_device_is_the_same_to_the_last_bit(monkeypatch, torch_device, channels, tile):
    if tile:
        monkeypatch.setattr(expansion, "_DEVICE_ELEMENTS", tile)
    rng = np.random.default_rng(0)
    rows = 5 * rng.standard_normal((30, channels)).astype(np.float32)
    queries = np.concatenate([rows[:10], rows[:10] + np.float32(1e-3), rng.random((5, channels), dtype=np.float32)])
    queries.setflags(write=False)
    which, indices = rng.integers(0, len(queries), 80), rng.integers(0, len(rows), 80)
    which[:20], indices[:20] = np.arange(20), np.arange(20) % 10
    norms = [squared_norms(of)[at] for of, at in ((queries, which), (rows, indices))]
    on_device = torch.from_numpy(rows).to(torch_device)
    found = expanded_distances_on_device(queries, on_device, which, indices, *norms)
    expected = expanded_distances(queries[which], rows[indices])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
    assert (
        expanded_distances_on_device(queries, on_device, which[:0], indices[:0], norms[0][:0], norms[1][:0]).size == 0
    )


def test_expansion_adds_up_in_blocks():
    """Each product and sum in turn, rounded once; partial sums of 192 products."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((5, 400)).astype(np.float32)
    queries = rows + np.float32(1e-3) * rng.standard_normal((5, 400)).astype(np.float32)
    squares = []
    for a, b in zip(queries, rows, strict=True):
        norms = [np.float32(torch.from_numpy(x).pow(2).sum().item()) for x in (a, b)]
        factors = [(-2 * x, y) for x, y in zip(a, b, strict=True)] + [(norms[0], 1), (1, norms[1])]
        total = np.float32(0)
        for begin in range(0, len(factors), 192):
            part = np.float32(0)
            for x, y in factors[begin : begin + 192]:
                part = np.float32(float(x) * float(y) + float(part))
            total += part
        squares.append(max(total, np.float32(0)))
    distances = expanded_distances(queries, rows)
    np.testing.assert_array_equal(distances, np.sqrt(np.array(squares, np.float32)))
    assert (np.abs(distances - np.linalg.norm(queries - rows, axis=1)) > 1e-5).any()


def test_expansion_agrees_with_pytorch_but_for_rounding(clustered):
    """The order of PyTorch's own products depends on the processor."""
    rows, queries = clustered(600, 700), clustered(40, 700, seed=1)
    queries = np.concatenate([queries, rows[:40]])
    expected = torch.cdist(*map(torch.from_numpy, (queries, rows))).numpy().min(1)
    distances, indices = patch_distances(queries, FlatIndex(rows), "expanded")
    np.testing.assert_allclose(distances**2, expected**2, atol=4e-6 * float((rows**2).sum(1).max()))
    np.testing.assert_array_equal(indices[40:], np.arange(40))
    assert 0 < distances[40:].max() < 0.1


@pytest.mark.parametrize("seed", [1, 9])
def test_expansion_prefers_what_rounding_makes_smallest(seed):
    """Among rows that rounding cannot tell apart the smaller rounded distance wins, then the smaller index."""
    rng = np.random.default_rng(seed)
    row = 10 * rng.standard_normal(500).astype(np.float32)
    rows = np.concatenate([[row + 50], row + np.float32(1e-4) * rng.standard_normal((2, 500)).astype(np.float32)])
    rounded = expanded_distances(np.repeat(row[None], 3, 0), rows)
    distances, indices = patch_distances(row[None], FlatIndex(rows), "expanded")
    assert distances[0] == rounded.min() and indices[0] == rounded.argmin()
    assert indices[0] != np.linalg.norm(rows - row, axis=1).argmin()


@pytest.mark.parametrize("bank", ["rgb", "xyz"])
@pytest.mark.parametrize("form", ["exact", "stable"])
def test_published_scores(golden, bank, form):
    case = golden[f"scoring_{bank}"]
    index = FlatIndex(case["bank"])
    distances, indices = patch_distances(case["patch"], index)
    for variant in VARIANTS.keys() & case.keys():
        eps, scale = VARIANTS[variant]
        score = reweighted_score(case["patch"], index, distances, indices, eps, scale, form)
        assert score == pytest.approx(float(case[variant]), rel=1e-6), variant


def test_weight_lies_between_one_half_and_one(clustered):
    index = FlatIndex(clustered(800, 30))
    for seed in range(20):
        patches = clustered(40, 30, seed=seed) * (1 + seed)
        distances, indices = patch_distances(patches, index)
        weight = reweighted_score(patches, index, distances, indices) / distances.max()
        assert 0.5 - 1e-6 <= weight < 1


def test_stable_form_survives_large_distances():
    index = FlatIndex(np.array([[0.0], [1.0], [3.0]]))
    patches = np.array([[5000.0]])
    distances, indices = patch_distances(patches, index)
    score = reweighted_score(patches, index, distances, indices, form="stable")
    # d = 4999 and 5000 (m* = 3.0 is left out)
    weight = 1 - 1 / (np.exp(2.0) + np.exp(3.0))
    assert score == pytest.approx(weight * 4997)


def test_bank_of_one_row_has_no_reweighting():
    index = FlatIndex(np.array([[0.0, 0.0]]))
    patches = np.array([[3.0, 4.0]])
    assert reweighted_score(patches, index, *patch_distances(patches, index)) == pytest.approx(5.0)


def test_errors_name_the_argument():
    index = FlatIndex(np.zeros((3, 2)))
    with pytest.raises(ValueError, match="k"):
        index.nearest(np.zeros((1, 2)), 4)
    with pytest.raises(ValueError, match="queries"):
        index.nearest(np.zeros((1, 3)), 1)
    with pytest.raises(ValueError, match="rows"):
        FlatIndex(np.full((2, 2), np.nan))
    with pytest.raises(ValueError, match="backend"):
        FlatIndex(np.zeros((2, 2)), backend="annoy")
    with pytest.raises(ValueError, match="form"):
        reweighted_score(np.zeros((1, 2)), index, np.zeros(1), np.zeros(1, int), form="other")
    with pytest.raises(ValueError, match="form"):
        patch_distances(np.zeros((1, 2)), index, "other")
    with pytest.raises(ValueError, match="queries, rows"):
        expanded_distances(np.zeros((1, 2)), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="queries"):
        patch_distances(np.zeros((1, 3)), index, "expanded")
    assert expanded_distances(np.zeros((0, 2)), np.zeros((0, 2))).shape == (0,)
    with pytest.raises(ValueError, match="distances"):
        reweighted_score(np.zeros((1, 2)), index, np.zeros(2), np.zeros(1, int))
    assert index.nearest(np.zeros((0, 2)), 1)[0].shape == (0, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees(clustered):
    rows, queries = clustered(5000, 200), clustered(300, 200, seed=1)
    for backend in ("auto", "torch"):
        distances, _ = FlatIndex(rows, "cuda", backend).nearest(queries, 3)
        np.testing.assert_allclose(distances, brute_force(queries, rows, 3)[0], rtol=1e-5)

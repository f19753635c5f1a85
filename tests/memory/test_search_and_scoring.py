from __future__ import annotations

import numpy as np
import pytest
import torch

from mmad_cli.memory import FlatIndex, patch_distances, reweighted_score

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

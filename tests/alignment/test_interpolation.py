"""Interpolation against golden weights, and the sparse operator against the literal chain of dense layers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmad_cli.alignment import interpolation
from mmad_cli.alignment.grouping import farthest_points
from mmad_cli.alignment.interpolation import (
    idw_operator,
    inverse_distance_weights,
    nearest_centres,
    pooled_operator,
)


def literal_patches(tokens, indices, weights, pixel, grid, size=224):
    """Interpolate, scatter to an image, 3 x 3 average, adaptive average: all dense, in float64."""
    features = (tokens.astype(np.float64)[indices] * weights[..., None]).sum(axis=1)
    image = np.zeros((size * size, tokens.shape[1]))
    image[pixel] = features
    maps = torch.from_numpy(image.T.reshape(1, -1, size, size))
    return F.adaptive_avg_pool2d(F.avg_pool2d(maps, 3, 1), grid)[0].reshape(tokens.shape[1], -1).T.numpy()


def literal_expanded(points, centres):
    """Squared distances to all centres as a float32 matrix product with fused multiply-add gives them."""
    double_points, double_centres = points.astype(np.float64), centres.astype(np.float64)
    product = np.zeros((len(points), len(centres)), dtype=np.float32)
    for axis in range(3):
        product = (double_points[:, None, axis] * double_centres[None, :, axis] + product).astype(np.float32)
    norms = [p[:, 0] * p[:, 0] + p[:, 1] * p[:, 1] + p[:, 2] * p[:, 2] for p in (points, centres)]
    return np.float32(-2) * product + norms[0][:, None] + norms[1][None]


@pytest.fixture
def centres(cloud, golden):
    return cloud[golden["group_s128_g1024/fps_idx"]]


@pytest.mark.parametrize(("name", "groups"), [("mae_s128_g1024", 1024), ("mae_s32_g128", 128)])
def test_exact_weights(golden, cloud, name, groups):
    chosen = golden[f"group_{name[4:]}/fps_idx"]
    indices, weights = nearest_centres(cloud[golden["probe_points"]], cloud[chosen], "direct")
    assert groups == len(chosen)
    assert np.array_equal(indices, golden[f"{name}/interp_exact_idx"])
    np.testing.assert_allclose(weights, golden[f"{name}/interp_exact_w"], rtol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 1.0, 20.0])
def test_expanded_chooses_as_a_full_sort_of_the_rounded_distances(cloud, centres, offset):
    # the farther from the origin, the more centres are within rounding of the third
    points, middle = cloud[::37] + np.float32(offset), centres[::4] + np.float32(offset)
    squared = literal_expanded(points, middle)
    order = torch.from_numpy(squared).sort(dim=1).indices[:, :3].numpy()
    indices, weights = nearest_centres(points, middle, "expanded")
    chosen = np.take_along_axis(squared, indices, axis=1)
    assert np.array_equal(chosen, np.take_along_axis(squared, order, axis=1))
    expected = inverse_distance_weights(chosen)
    finite = np.isfinite(expected).all(axis=1)
    assert finite.mean() > 0.9
    assert np.array_equal(weights[finite], expected[finite])
    # equal ones too, of which the published code takes those that this sort puts first
    assert np.array_equal(np.sort(indices[finite]), np.sort(order[finite]))
    ascending = np.sort(squared, axis=1)
    assert (ascending[:, 2] == ascending[:, 3]).any()


def test_rounding_shows_near_centres_only(cloud, centres):
    exact, rounded = (nearest_centres(cloud, centres, form)[1] for form in ("direct", "expanded"))
    assert (exact >= 0).all()
    assert (rounded < 0).any()
    assert np.median(np.abs(exact - rounded)) < 0.01
    np.testing.assert_allclose(rounded.sum(axis=1), 1, atol=1e-3)


def test_direct_stands_in_for_weights_that_are_not_finite(cloud, centres, monkeypatch):
    monkeypatch.setattr(interpolation, "_expanded", lambda p, c, i: np.full(i.shape, -1e-8, dtype=np.float32))
    indices, weights = nearest_centres(cloud[:50], centres, "expanded")
    exact_indices, exact_weights = nearest_centres(cloud[:50], centres, "direct")
    assert np.array_equal(indices, exact_indices)
    assert np.array_equal(weights, exact_weights)


def hard_cases(cloud, centres, rng):
    """Points and centres: a scan near and far from the origin, a grid full of ties, copies, and few of either."""
    side = np.arange(30, dtype=np.float32) * np.float32(0.001)
    grid = np.stack([*np.meshgrid(side, side), np.full((30, 30), 0.5, np.float32)], axis=-1).reshape(-1, 3)
    copies = np.repeat(rng.random((20, 3)).astype(np.float32), 4, axis=0)
    return {
        "scan": (cloud[::9], centres),
        "far": (cloud[::37] + np.float32(20), centres[::4] + np.float32(20)),
        "grid": (grid, grid[::7]),
        "copies": (rng.random((200, 3)).astype(np.float32), copies),
        "on copies": (copies, copies),
        "at the origin": (np.zeros((10, 3), np.float32), np.zeros((5, 3), np.float32)),
        "three centres": (cloud[:50], centres[:3]),
        "one point": (cloud[:1], centres[:4]),
    }


@pytest.mark.parametrize("tile", [None, 2500])
@pytest.mark.parametrize("form", ["direct", "expanded"])
def test_the_gpu_path_finds_the_same(cloud, centres, rng, monkeypatch, torch_device, form, tile):
    if tile:
        monkeypatch.setattr(interpolation, "_DEVICE_PAIRS", tile)
    name = "cpu:0" if torch_device == "cpu" else torch_device
    for case, (points, middle) in hard_cases(cloud, centres, rng).items():
        indices, weights = nearest_centres(points, middle, form)
        found, same = nearest_centres(points, middle, form, device=name)
        assert np.array_equal(found, indices), case
        assert np.array_equal(same, weights), case
        assert (found.dtype, same.dtype) == (np.int64, np.float64)


def test_of_equal_distances_the_smaller_index_counts(cloud, centres, rng):
    for case, (points, middle) in hard_cases(cloud, centres, rng).items():
        difference = points.astype(np.float64)[:, None] - middle.astype(np.float64)
        squared = np.einsum("pka,pka->pk", difference, difference)
        expected = np.argsort(squared, axis=1, kind="stable")[:, :3]
        assert np.array_equal(nearest_centres(points, middle)[0], expected), case


def test_a_point_on_a_centre_takes_its_feature(centres):
    indices, weights = nearest_centres(centres, centres)
    assert np.array_equal(indices[:, 0], np.arange(len(centres)))
    # 1e-8 against squared distances of 1e-6 and more
    assert (weights[:, 0] > 0.97).all()


@pytest.mark.parametrize("form", ["direct", "expanded"])
@pytest.mark.parametrize("grid", [56, 28, 224])
def test_linear_form_equals_the_literal_chain(cloud, pixel, centres, rng, form, grid):
    tokens = rng.normal(size=(len(centres), 6)).astype(np.float32)
    indices, weights = nearest_centres(cloud, centres, form)
    ours = pooled_operator(indices, weights, pixel, len(centres), grid) @ tokens
    literal = literal_patches(tokens, indices, weights, pixel, grid)
    assert ours.shape == (grid * grid, 6)
    assert ours.dtype == np.float32
    assert np.abs(ours - literal).max() <= 1e-5 * np.abs(literal).max()
    assert np.array_equal((ours == 0).all(axis=1), (literal == 0).all(axis=1))


def test_patches_without_points_stay_zero(cloud, pixel, centres):
    tokens = np.ones((len(centres), 2), dtype=np.float32)
    operator = pooled_operator(*nearest_centres(cloud, centres), pixel, len(centres))
    covered = np.zeros((224, 224), dtype=bool)
    covered.ravel()[pixel] = True
    # bins of 4 or 5 averages of 3: patch (0, 0) sees pixels 0..5
    assert not covered[:6, :6].any()
    assert ((operator @ tokens)[0] == 0).all()
    assert (operator @ tokens).max() == pytest.approx(1, rel=1e-5)


def test_operator_on_another_size(rng):
    points = rng.random((200, 3)).astype(np.float32)
    pixel = rng.permutation(32 * 32)[:200]
    tokens = rng.normal(size=(20, 4)).astype(np.float32)
    indices, weights = nearest_centres(points, points[farthest_points(points, 20)])
    operator = pooled_operator(indices.astype(np.int16), weights.astype(np.float32), pixel, 20, grid=8, size=32)
    np.testing.assert_allclose(
        operator @ tokens, literal_patches(tokens, indices, weights, pixel, 8, 32), atol=1e-5 * np.abs(tokens).max()
    )


def test_idw_rows_add_repeated_centres():
    operator = idw_operator(np.array([[1, 1, 0]]), np.array([[0.2, 0.3, 0.5]]), 3)
    assert operator.toarray().tolist() == [[0.5, 0.5, 0]]


def test_wrong_arguments(cloud, centres):
    indices, weights = nearest_centres(cloud[:5], centres)
    with pytest.raises(ValueError, match="form: should be 'direct' or 'expanded', got 'linear'"):
        nearest_centres(cloud, centres, "linear")
    with pytest.raises(ValueError, match="at least 3, got 2"):
        nearest_centres(cloud, centres[:2])
    with pytest.raises(ValueError, match="weights"):
        idw_operator(indices, weights[:2], 1024)
    with pytest.raises(ValueError, match=r"lie in 0..9"):
        idw_operator(indices, weights, 10)
    with pytest.raises(ValueError, match=r"pixel: should be of shape \(5,\)"):
        pooled_operator(indices, weights, np.arange(4), 1024)

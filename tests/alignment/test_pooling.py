"""Pooling against PyTorch's own layers and against a plain loop."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmad_cli.alignment.pooling import (
    adaptive_average,
    adaptive_bins,
    average_3x3,
    patches_from_map,
    patches_from_points,
    scatter_to_grid,
)


def literal_patches(feature_map, grid):
    pooled = F.adaptive_avg_pool2d(F.avg_pool2d(torch.from_numpy(feature_map)[None].double(), 3, 1), grid)
    return pooled[0].reshape(len(feature_map), -1).T.numpy()


@pytest.fixture
def random():
    return np.random.default_rng(0)


@pytest.mark.parametrize(
    ("size", "out", "first"),
    [(222, 56, [(0, 4), (3, 8), (7, 12)]), (12, 28, [(0, 1), (0, 1), (0, 2)]), (26, 28, [(0, 1), (0, 2), (1, 3)])],
)
def test_bins_by_hand(size, out, first):
    assert adaptive_bins(size, out)[:3] == first
    assert adaptive_bins(size, out)[-1][1] == size


def test_bins_of_the_fpfh_image_are_8_or_9_wide():
    assert {end - begin for begin, end in adaptive_bins(222, 28)} == {8, 9}


@pytest.mark.parametrize("shape", [(5, 28, 28), (4, 14, 14), (3, 224, 224), (2, 223, 223), (3, 7, 9), (1, 3, 3)])
@pytest.mark.parametrize("grid", [28, 56, 1])
def test_patches_equal_the_literal_layers(random, shape, grid):
    feature_map = random.standard_normal(shape).astype(np.float32)
    patches = patches_from_map(feature_map, grid)
    assert patches.dtype == np.float32
    np.testing.assert_allclose(patches, literal_patches(feature_map, grid), rtol=0, atol=1e-6)


def test_single_steps_equal_the_literal_layers(random):
    feature_map = random.standard_normal((4, 17, 30)).astype(np.float32)
    tensor = torch.from_numpy(feature_map)
    np.testing.assert_allclose(average_3x3(feature_map), F.avg_pool2d(tensor, 3, 1).numpy(), atol=1e-6)
    np.testing.assert_allclose(adaptive_average(feature_map, 11), F.adaptive_avg_pool2d(tensor, 11).numpy(), atol=1e-6)


def test_rows_are_row_major():
    feature_map = np.zeros((1, 30, 30), dtype=np.float32)
    feature_map[0, 1:4, 22:25] = 9.0
    patches = patches_from_map(feature_map, 28)
    assert patches[28 + 22, 0] == pytest.approx(9.0)
    assert patches.argmax() == 28 + 22


def test_points_equal_the_scattered_map(random):
    pixel = np.sort(random.choice(224 * 224, 9000, replace=False)).astype(np.int32)
    points = random.random((9000, 33)).astype(np.float32) * 100
    scattered = scatter_to_grid(points, pixel, 224)
    np.testing.assert_array_equal(scattered[:, pixel // 224, pixel % 224].T, points)
    assert np.count_nonzero(scattered.any(axis=0)) == 9000
    np.testing.assert_allclose(
        patches_from_points(points, pixel, 224, 28), literal_patches(scattered, 28), rtol=1e-6, atol=1e-5
    )


def test_patches_without_points_are_exactly_zero(random):
    pixel = np.arange(224 * 20)
    patches = patches_from_points(random.random((len(pixel), 3)).astype(np.float32), pixel, 224, 28)
    assert not patches[28 * 4 :].any()
    assert patches[: 28 * 2].all()


def test_read_only_arrays_are_accepted_and_kept(random):
    points, pixel = random.random((10, 3)).astype(np.float32), np.arange(10)
    points.setflags(write=False)
    before = points.copy()
    patches_from_points(points, pixel, 16, 4)
    patches_from_map(scatter_to_grid(points, pixel, 16), 4)[0] = 1
    np.testing.assert_array_equal(points, before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: adaptive_bins(0, 4), "size must be at least 1, got 0"),
        (lambda: patches_from_map(np.zeros((4, 4)), 2), r"feature_map must have shape \(C, H, W\)"),
        (lambda: patches_from_map(np.zeros((1, 2, 5)), 2), "at least 3"),
        (lambda: average_3x3(np.zeros((1, 2, 5))), "at least 3 x 3"),
        (lambda: scatter_to_grid(np.zeros((3, 2)), np.arange(4), 8), "points must be"),
        (lambda: patches_from_points(np.zeros((1, 2)), np.array([64]), 8, 2), r"0\.\.63, got 64"),
        (lambda: scatter_to_grid(np.zeros((1, 2)), np.array([-1]), 8), "got -1"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()

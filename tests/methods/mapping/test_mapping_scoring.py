"""Box means and scalings: against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmad_cli.methods.mapping.scoring import SMOOTHING, at_map_size, box_matrix, scaled, smooth


def test_it_is_the_repeated_mean_with_zeros_outside():
    errors = np.random.default_rng(0).random((40, 40))
    expected = torch.from_numpy(errors)[None, None]
    for window in SMOOTHING:
        kernel = torch.full((1, 1, window, window), 1 / window**2, dtype=torch.float64)
        expected = torch.nn.functional.conv2d(expected, kernel, padding=window // 2)
    np.testing.assert_allclose(smooth(errors), expected[0, 0].numpy(), atol=1e-12)


def test_an_impulse_keeps_its_sum_and_gets_variance_22():
    errors = np.zeros((101, 101))
    errors[50, 50] = 1.0
    smoothed = smooth(errors)
    assert smoothed.sum() == pytest.approx(1.0)
    offset = np.arange(101) - 50
    assert (smoothed.sum(axis=1) * offset**2).sum() == pytest.approx(22.0)
    # 5 x 2 + 3 x 3 pixels in each direction, and exactly nothing beyond
    reached = np.argwhere(smoothed)
    assert (reached.min(axis=0) == 31).all() and (reached.max(axis=0) == 69).all()


def test_scaling_the_errors_scales_score_and_maps_as_published():
    errors = smooth(np.random.default_rng(1).random((64, 64)))
    one, four = scaled(errors), scaled(4 * errors)
    assert four.image_score == pytest.approx(2 * one.image_score)
    np.testing.assert_allclose(four.anomaly_map, 2 * one.anomaly_map, rtol=1e-5)
    np.testing.assert_allclose(four.anomaly_map * four.aupro_scale, one.anomaly_map * one.aupro_scale, rtol=1e-5)
    reached = errors[errors != 0].mean()
    np.testing.assert_allclose(one.anomaly_map * one.aupro_scale, errors / reached, rtol=1e-5)
    assert one.image_score == pytest.approx(errors.max() / np.sqrt(reached))


def test_nothing_valid_is_a_map_of_zeros():
    prediction = scaled(np.zeros((8, 8)))
    assert prediction.image_score == 0.0 and not prediction.anomaly_map.any() and prediction.aupro_scale == 1.0


def test_a_coarser_grid_is_brought_to_map_size():
    errors = np.full((56, 56), 3.0)
    assert at_map_size(errors).shape == (224, 224)
    np.testing.assert_allclose(at_map_size(errors), 3.0, rtol=1e-6)


@pytest.mark.parametrize("window", [0, 4, -3])
def test_windows_must_be_odd(window):
    with pytest.raises(ValueError, match="windows"):
        box_matrix(10, (window,))

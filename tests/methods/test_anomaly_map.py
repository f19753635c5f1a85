"""Upsampling against PyTorch, blurs against the stored arrays of the published code and a plain Gaussian."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmad_cli.methods.anomaly_map import bilinear_matrix, blur_float, blur_pillow8, upsample

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def blur():
    with np.load(GOLDEN / "blur.npz") as arrays:
        return {name: arrays[name].astype(np.float32) for name in arrays.files}


@pytest.mark.parametrize("case", ["impulse", "random", "ramp", "constant", "zero"])
def test_pillow8_equals_the_published_blur(blur, case):
    given, expected = blur[f"blur_{case}/in"], blur[f"blur_{case}/out"]
    # far below one 8-bit step, which would be max / 255
    np.testing.assert_allclose(blur_pillow8(given), expected, rtol=0, atol=given.max() / 255 * 1e-3)


def test_pillow8_equals_three_extended_box_blurs():
    """A Gaussian of radius 4 in integers: box radius 3.4375, three passes along each axis."""
    given = np.random.default_rng(1).integers(0, 256, (40, 50)).astype(np.float32)
    given[0, 0] = 255
    weight = int(2**24 / (2 * 3.4375 + 1))
    edge = (2**24 - 7 * weight) // 2
    levels = given.astype(np.int64)
    for _ in range(2):
        for _ in range(3):
            padded = np.pad(levels, ((0, 0), (4, 4)), mode="edge")
            windows = np.lib.stride_tricks.sliding_window_view(padded, 9, axis=1)
            levels = (weight * windows[..., 1:-1].sum(-1) + edge * (windows[..., 0] + windows[..., -1]) + 2**23) >> 24
        levels = levels.T
    np.testing.assert_allclose(blur_pillow8(given), levels.astype(np.float32), atol=1e-4)


def test_pillow8_has_at_most_256_levels():
    smooth = np.hypot(*np.mgrid[:224, :224]).astype(np.float32)
    assert len(np.unique(blur_pillow8(smooth))) <= 256
    assert len(np.unique(blur_float(smooth))) > 10_000


def test_float_blur_equals_a_plain_gaussian():
    given = np.random.default_rng(2).random((30, 45)).astype(np.float32)
    offsets = np.arange(-16, 17)
    kernel = np.exp(-0.5 * (offsets / 4.0) ** 2)
    kernel /= kernel.sum()
    padded = np.pad(given.astype(np.float64), 16, mode="symmetric")
    rows = np.apply_along_axis(np.convolve, 1, padded, kernel, mode="valid")
    expected = np.apply_along_axis(np.convolve, 0, rows, kernel, mode="valid")
    blurred = blur_float(given)
    assert blurred.dtype == np.float32
    np.testing.assert_allclose(blurred, expected, atol=1e-6)


@pytest.mark.parametrize("grid", [1, 28, 56, 37, 224, 300])
def test_upsample_equals_torch(grid):
    distances = np.random.default_rng(grid).random(grid * grid).astype(np.float32)
    tensor = torch.from_numpy(distances).reshape(1, 1, grid, grid)
    expected = F.interpolate(tensor, size=(224, 224), mode="bilinear", align_corners=False)[0, 0].numpy()
    result = upsample(distances, grid)
    assert result.dtype == np.float32
    # PyTorch computes positions in float32, which rounds unless the ratio is a power of two
    np.testing.assert_allclose(result, expected, atol=1e-6 if grid in (1, 28, 56, 224) else 5e-5)


def test_interpolation_weights_sum_to_one():
    np.testing.assert_allclose(bilinear_matrix(28, 224).sum(axis=1), 1, atol=1e-6)
    # half-pixel centres: the first output lies at -0.4375, that is on the border cell
    assert bilinear_matrix(28, 224)[0].tolist() == [1.0] + [0.0] * 27


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: upsample(np.zeros(10), 3), r"distances must have shape \(9,\), got \(10,\)"),
        (lambda: blur_pillow8(np.full((4, 4), np.nan, np.float32)), "finite and non-negative"),
        (lambda: blur_pillow8(np.full((4, 4), -1, np.float32)), "finite and non-negative"),
        (lambda: blur_float(np.ones((4, 4), np.float32), 0), "sigma must be positive, got 0"),
        (lambda: blur_float(np.ones(4, np.float32)), r"shape \(H, W\)"),
        (lambda: bilinear_matrix(0, 4), "at least 1"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()

import numpy as np
import pytest
from PIL import Image

from mmad_cli.preprocessing.resize import (
    centre_crop_view,
    nearest_indices,
    resize_mask,
    resize_rgb,
    resize_xyz,
    to_network_size,
    valid_pixels,
)


def test_valid_pixels_need_all_three_coordinates():
    xyz = np.array([[[1, 2, 3], [0, 2, 3], [1, 0, 3], [1, 2, 0], [0, 0, 0], [-1, -2, 3]]], dtype=np.float32)
    np.testing.assert_array_equal(valid_pixels(xyz), [[True, False, False, False, False, True]])


# 1998 is a size at which rounding in float32 decides
@pytest.mark.parametrize("source", [1, 57, 224, 256, 300, 370, 400, 500, 800, 1998])
def test_floor_rule_is_that_of_pytorch(source):
    import torch

    line = torch.arange(source, dtype=torch.float32)[None, None, None]
    expected = torch.nn.functional.interpolate(line, size=(1, 224), mode="nearest")[0, 0, 0].numpy()
    np.testing.assert_array_equal(nearest_indices(source, 224), expected)


@pytest.mark.parametrize("source", [57, 224, 300, 400, 448, 500])
def test_center_rule_is_that_of_pillow(source):
    line = Image.fromarray(np.arange(source, dtype=np.float32)[None])
    expected = np.asarray(line.resize((224, 1), Image.Resampling.NEAREST))[0]
    np.testing.assert_array_equal(nearest_indices(source, 224, "center"), expected)


def test_rules_differ_and_others_are_refused():
    assert (nearest_indices(400, 224) != nearest_indices(400, 224, "center")).any()
    with pytest.raises(ValueError, match="xyz_resize: should be 'floor' or 'center', got 'round'"):
        nearest_indices(400, 224, "round")


def test_cloud_keeps_its_points():
    xyz = np.random.default_rng(0).normal(size=(60, 90, 3)).astype(np.float32)
    small = resize_xyz(xyz, 30)
    np.testing.assert_array_equal(small, xyz[::2, ::3])
    assert small.flags.owndata


def test_to_network_size(make_sample):
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (300, 400, 3), dtype=np.uint8)
    mask = rng.random((300, 400)) < 0.5
    xyz = rng.normal(size=(300, 400, 3))
    sample = make_sample(xyz, rgb, mask)
    small = to_network_size(sample)
    assert small.rgb.shape == small.xyz.shape == (224, 224, 3)
    assert (small.rgb.dtype, small.xyz.dtype, small.mask.dtype) == (np.uint8, np.float32, bool)
    expected = np.asarray(Image.fromarray(rgb).resize((224, 224), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(small.rgb, expected)
    grey = Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).resize((224, 224), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(small.mask, np.asarray(grey) > 127)
    assert sample.rgb.shape == (300, 400, 3)
    assert to_network_size(sample, 56).mask.shape == (56, 56)
    with pytest.raises(ValueError, match="size: should be at least 1"):
        to_network_size(sample, 0)


def test_cloud_and_image_of_different_size(make_sample):
    from dataclasses import replace

    sample = replace(make_sample(np.ones((200, 200, 3))), rgb=np.zeros((170, 170, 3), np.uint8))
    assert to_network_size(sample).rgb.shape == to_network_size(sample).xyz.shape


def test_centre_crop_view():
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (400, 500, 3), dtype=np.uint8)
    mask = np.zeros((400, 500), bool)
    mask[150:250, 200:300] = True
    view, small = centre_crop_view(rgb, mask)
    resized = np.asarray(Image.fromarray(rgb).resize((320, 256), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(view, resized[16:240, 48:272])
    # the blurred rim does not count: 100 pixels are 64 at this size, and at most 64 stay whole
    grey = Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).resize((320, 256), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(small, (np.asarray(grey) == 255)[16:240, 48:272])
    assert 60**2 <= small.sum() <= 64**2
    assert small.dtype == bool


def test_centre_crop_view_is_that_of_torchvision_sizes():
    # odd sizes: the longer side is cut, the margin is rounded to even
    view, small = centre_crop_view(np.zeros((301, 257, 3), np.uint8), np.ones((301, 257), bool))
    assert view.shape == (224, 224, 3)
    assert small.all()


def test_wrong_arguments():
    rgb, mask = np.zeros((30, 40, 3), np.uint8), np.zeros((30, 40), bool)
    with pytest.raises(ValueError, match="crop: should be at most resize=256"):
        centre_crop_view(rgb, mask, crop=300)
    with pytest.raises(ValueError, match="mask: should have the size of rgb"):
        centre_crop_view(rgb, mask.T)
    with pytest.raises(ValueError, match="filter: should be one of"):
        resize_rgb(rgb, 10, "lanczos")
    with pytest.raises(ValueError, match="rgb: should be uint8"):
        resize_rgb(rgb.astype(np.float32), 10)


def test_mask_resize_is_exact_for_whole_factors():
    mask = np.random.default_rng(0).random((90, 60)) < 0.5
    np.testing.assert_array_equal(resize_mask(mask, (30, 20)), mask[1::3, 1::3])

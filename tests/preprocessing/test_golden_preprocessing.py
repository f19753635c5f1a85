"""Against arrays that the public M3DM and CFM scripts produced."""

import numpy as np
import pytest

from mmad_cli.preprocessing import PreprocessConfig, preprocess, to_network_size, valid_pixels

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])


def iou(one, other):
    return (one & other).sum() / (one | other).sum()


def check_plane(plane, expected):
    angle = np.degrees(np.arccos(np.clip(np.dot(plane[:3], expected[:3]), -1, 1)))
    assert angle < 0.1
    assert abs(plane[3] - expected[3]) < 2e-4


def normalised(rgb):
    return ((rgb / 255 - MEAN) / STD).transpose(2, 0, 1)


@pytest.fixture(scope="module")
def m3dm(golden):
    return {name.removeprefix("m3dm/"): array for name, array in golden.items() if name.startswith("m3dm/")}


@pytest.fixture(scope="module")
def cfm(golden):
    prefix = "cfm/test_hole/"
    return {name.removeprefix(prefix): array for name, array in golden.items() if name.startswith(prefix)}


@pytest.mark.parametrize("debris", ["components", "dbscan"])
def test_m3dm_cleaning(m3dm, make_sample, debris):
    raw = make_sample(m3dm["raw_xyz"], m3dm["raw_rgb"], m3dm["raw_gt"] > 0, "dent")
    clean = preprocess(raw, PreprocessConfig(debris=debris))
    check_plane(clean.info["plane"], m3dm["plane"])
    assert clean.info["pad"] == m3dm["pad_top_left"].tolist() == [65, 35]
    assert clean.rgb.shape == clean.xyz.shape == (500, 500, 3)
    assert iou(valid_pixels(clean.xyz), m3dm["kept_mask"]) >= 0.999
    assert iou(clean.rgb.any(axis=-1), m3dm["out_rgb_nonzero_mask"]) >= 0.999
    assert clean.mask.shape == (500, 500)
    assert clean.mask.sum() * 255 == m3dm["out_gt_sum"]
    np.testing.assert_allclose(clean.xyz.sum((0, 1), dtype=np.float64), m3dm["out_xyz_sum"], rtol=1e-3)
    height, width = raw.mask.shape
    planeless = m3dm["planeless_mask"].reshape(500, 500)[65 : 65 + height, 35 : 35 + width]
    table = int(valid_pixels(raw.xyz).sum() - planeless.sum())
    assert abs(clean.info["removed_plane_pixels"] - table) <= 1e-3 * table


def test_m3dm_loading(m3dm, make_sample):
    raw = make_sample(m3dm["raw_xyz"], m3dm["raw_rgb"], m3dm["raw_gt"] > 0, "dent")
    small = to_network_size(preprocess(raw, PreprocessConfig()))
    assert iou(valid_pixels(small.xyz), m3dm["loader_xyz_mask"]) >= 0.999
    np.testing.assert_array_equal(small.mask, m3dm["loader_gt"].reshape(224, 224))
    np.testing.assert_array_equal(small.xyz.transpose(2, 0, 1)[:, ::4, ::4], m3dm["loader_xyz_stride4"])
    np.testing.assert_allclose(normalised(small.rgb)[:, ::4, ::4], m3dm["loader_rgb_stride4"], atol=1e-5)
    np.testing.assert_allclose(normalised(small.rgb).mean((1, 2)), m3dm["loader_rgb_mean"], atol=1e-5)


def test_cfm_cleaning_and_loading(cfm, make_sample):
    raw = make_sample(cfm["raw/pc"], cfm["raw/rgb"], cfm["raw/gt"] > 0, "hole")
    clean = preprocess(raw, PreprocessConfig(protocol="cfm"))
    check_plane(clean.info["plane"], cfm["processed/plane"])
    assert clean.xyz.shape == (200, 200, 3)
    assert clean.rgb.shape == (170, 170, 3)
    assert iou(valid_pixels(clean.xyz), valid_pixels(cfm["processed/pc"])) >= 0.999
    small = to_network_size(clean)
    np.testing.assert_array_equal(small.xyz.transpose(2, 0, 1)[:, ::2, ::2], cfm["loader/pc_s2"])
    np.testing.assert_array_equal(
        np.packbits(valid_pixels(small.xyz)), np.packbits(np.unpackbits(cfm["loader/pc_valid"]))
    )
    np.testing.assert_array_equal(small.mask, np.unpackbits(cfm["loader/gt"]).reshape(224, 224).astype(bool))
    np.testing.assert_allclose(normalised(small.rgb)[:, ::4, ::4], cfm["loader/rgb_s4"], atol=1e-5)

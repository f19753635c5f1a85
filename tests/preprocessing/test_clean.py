from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from pydantic import ValidationError

from mmad_cli.preprocessing import PreprocessConfig, preprocess, valid_pixels
from mmad_cli.preprocessing.clean import square_padding
from mmad_cli.preprocessing.plane import edge_points, fit_plane, near_plane

# 1 mm per pixel: a radius of 6 mm holds a hundred points of a surface
M3DM = PreprocessConfig()


def test_m3dm_keeps_the_object_only(scene, make_sample):
    xyz, box, speck = scene()
    clean = preprocess(make_sample(xyz, mask=speck, defect="dent"), M3DM)
    assert clean.xyz.shape == (200, 200, 3)
    assert clean.info["pad"] == [50, 40]
    inside = (slice(50, 150), slice(40, 160))
    np.testing.assert_array_equal(valid_pixels(clean.xyz)[inside], box)
    np.testing.assert_array_equal(clean.xyz[inside][box], xyz[box])
    assert valid_pixels(clean.xyz).sum() == box.sum()
    # a pixel that never had a point keeps its colour, as in the released script
    missing = ~valid_pixels(xyz)
    np.testing.assert_array_equal(clean.rgb[inside].any(axis=-1), box | missing)
    assert clean.rgb.sum() == clean.rgb[inside].sum()
    np.testing.assert_array_equal(clean.mask[inside], speck)
    assert clean.mask.sum() == speck.sum()


def test_info_counts(scene, make_sample):
    xyz, box, speck = scene()
    info = preprocess(make_sample(xyz), M3DM).info
    valid = int(valid_pixels(xyz).sum())
    assert info["removed_plane_pixels"] == valid - box.sum() - speck.sum()
    assert info["removed_debris_pixels"] == speck.sum()
    assert info["valid_before"] == valid
    assert info["valid_after"] == box.sum()
    assert info["scan_size"] == [100, 120]
    assert info["plane_reason"] is None
    plane = np.array(info["plane"])
    np.testing.assert_allclose(plane * np.sign(plane[2]), [0, 0, 1, -0.6], atol=1e-5)


def test_background_can_be_kept(scene, make_sample):
    xyz, *_ = scene()
    clean = preprocess(make_sample(xyz), PreprocessConfig(rgb_background="keep"))
    assert (clean.rgb[50:150, 40:160] == 90).all()
    np.testing.assert_array_equal(clean.xyz, preprocess(make_sample(xyz), M3DM).xyz)


def test_cfm_touches_the_cloud_only(scene, make_sample):
    xyz, box, _ = scene()
    rgb = np.arange(xyz.size, dtype=np.uint8).reshape(xyz.shape)
    mask = np.zeros(box.shape, bool)
    mask[0, 3] = True
    clean = preprocess(make_sample(xyz, rgb, mask, "dent"), PreprocessConfig(protocol="cfm"))
    np.testing.assert_array_equal(clean.xyz, preprocess(make_sample(xyz), M3DM).xyz)
    assert clean.rgb.shape == (120, 120, 3)
    assert clean.info["image_pad"] == [10, 0]
    np.testing.assert_array_equal(clean.rgb[10:110], rgb)
    # edges are repeated outwards, in the mask too
    assert (clean.rgb[:10] == rgb[0]).all()
    assert (clean.rgb[110:] == rgb[-1]).all()
    np.testing.assert_array_equal(np.flatnonzero(clean.mask[:, 3]), np.arange(11))


def test_none_changes_nothing(scene, make_sample):
    xyz, *_ = scene()
    sample = make_sample(xyz)
    clean = preprocess(sample, PreprocessConfig(protocol="none"))
    for name in ("rgb", "xyz", "mask"):
        np.testing.assert_array_equal(getattr(clean, name), getattr(sample, name))
        assert not np.shares_memory(getattr(clean, name), getattr(sample, name))
    assert clean.info["plane"] is None


@pytest.mark.parametrize("protocol", ["m3dm", "cfm", "none"])
@pytest.mark.parametrize("size", [(100, 120), (200, 200)])
def test_input_is_not_changed(scene, make_sample, protocol, size):
    xyz, *_ = scene(size=size)
    sample = make_sample(xyz)
    before = sample.rgb.copy()
    clean = preprocess(sample, PreprocessConfig(protocol=protocol))
    np.testing.assert_array_equal(sample.xyz, xyz)
    np.testing.assert_array_equal(sample.rgb, before)
    assert sample.info == {}
    for name in ("rgb", "xyz", "mask"):
        assert not np.shares_memory(getattr(clean, name), getattr(sample, name))
        assert getattr(clean, name).flags.writeable


def test_square_multiple_of_100_is_not_padded(scene, make_sample):
    xyz, *_ = scene(size=(200, 200))
    clean = preprocess(make_sample(xyz), M3DM)
    assert clean.xyz.shape == (200, 200, 3)
    assert clean.info["pad"] == [0, 0]


def test_clean_scan_passes_unharmed(scene, make_sample):
    xyz, *_ = scene()
    once = preprocess(make_sample(xyz), M3DM)
    twice = preprocess(once, M3DM)
    np.testing.assert_array_equal(twice.xyz, once.xyz)
    np.testing.assert_array_equal(twice.rgb, once.rgb)
    assert twice.info["plane"] is None
    assert "50 are needed" in twice.info["plane_reason"]


def test_scan_that_is_all_table_is_left_empty(make_sample):
    row, column = np.mgrid[:100, :100]
    xyz = np.stack([column * 1e-3 + 1e-3, row * 1e-3 + 1e-3, np.full((100, 100), 0.6)], axis=-1)
    clean = preprocess(make_sample(xyz), M3DM)
    assert clean.info["valid_after"] == 0
    assert not clean.xyz.any()


@pytest.mark.parametrize("debris", ["components", "dbscan"])
def test_debris_options_agree_and_none_keeps_it(scene, make_sample, debris):
    xyz, box, speck = scene()
    clean = preprocess(make_sample(xyz), PreprocessConfig(debris=debris))
    assert clean.info["valid_after"] == box.sum()
    kept = preprocess(make_sample(xyz), PreprocessConfig(debris="none"))
    assert kept.info["valid_after"] == box.sum() + speck.sum()


def test_same_plane_every_time_and_in_threads(scene):
    rng = np.random.default_rng(0)
    points = np.c_[rng.uniform(-0.05, 0.05, (4000, 2)), 0.6 + rng.normal(0, 3e-3, 4000)].astype(np.float32)
    with ThreadPoolExecutor(4) as pool:
        planes = list(pool.map(lambda _: tuple(fit_plane(points)), range(8)))
    assert len(set(planes)) == 1
    assert tuple(fit_plane(points, seed=1)) != planes[0]


def test_edge_points_follow_the_published_order(make_sample):
    xyz = np.arange(1, 6 * 5 * 3 + 1, dtype=np.float32).reshape(6, 5, 3)
    xyz[0, 1, 2] = 0
    points = edge_points(xyz, edge=1)
    expected = np.concatenate([xyz[:1, [0, 2, 3, 4]], xyz[-1:], xyz[[0], :1], xyz[1:, :1].swapaxes(0, 1)], axis=1)
    np.testing.assert_array_equal(points[: expected.shape[1]], expected[0])
    # corners occur twice
    assert len(points) == 4 + 5 + 6 + 6


def test_near_plane_uses_the_distance(make_sample):
    xyz = np.array([[[0, 0, 0.6049], [0, 0, 0.6051], [0, 0, 0]]], dtype=np.float32)
    np.testing.assert_array_equal(near_plane(xyz, np.array([0, 0, 1, -0.6])), [[True, False, False]])


def test_too_few_points_for_a_plane():
    with pytest.raises(ValueError, match="points: should be at least 50"):
        fit_plane(np.ones((49, 3), np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"xyz": np.zeros((4, 4), np.float32)}, "xyz: should be"),
        ({"rgb": np.zeros((4, 5, 3), np.uint8)}, "rgb: should be"),
        ({"mask": np.zeros((5, 4), bool)}, "mask: should be"),
        ({"xyz": np.full((4, 4, 3), np.nan, np.float32)}, "xyz: should be finite"),
        ({"xyz": np.full((4, 4, 3), -np.inf, np.float32)}, "xyz: should be finite"),
    ],
)
def test_wrong_arrays(make_sample, change, message):
    from dataclasses import replace

    sample = replace(make_sample(np.ones((4, 4, 3))), **change)
    with pytest.raises(ValueError, match=message):
        preprocess(sample, M3DM)


def test_published_defaults():
    assert PreprocessConfig().model_dump() == {
        "protocol": "m3dm",
        "rgb_background": "zero",
        "debris": "components",
        "plane_distance": 0.004,
        "plane_samples": 50,
        "plane_iterations": 1000,
        "plane_removal": 0.005,
        "edge": 10,
        "pad_multiple": 100,
        "cluster_eps": 0.006,
        "cluster_min_points": 30,
        "seed": 0,
    }
    assert PreprocessConfig(protocol="cfm").rgb_background == "keep"
    assert PreprocessConfig(protocol="none").rgb_background == "keep"


@pytest.mark.parametrize(
    "values",
    [
        {"protocol": "cfm", "rgb_background": "zero"},
        {"protocol": "none", "rgb_background": "zero"},
        {"protocol": "other"},
        {"debris": "some"},
        {"plane_distance": 0},
        {"plane_samples": 2},
        {"seed": -1},
        {"plan_distance": 0.004},
    ],
)
def test_unknown_combinations(values):
    with pytest.raises(ValidationError):
        PreprocessConfig(**values)
    assert issubclass(ValidationError, ValueError)


def test_config_cannot_be_changed():
    with pytest.raises(ValidationError):
        M3DM.seed = 1


@pytest.mark.parametrize(
    ("height", "width", "side", "expected"),
    [(100, 100, 100, ((0, 0), (0, 0))), (371, 430, 500, ((64, 65), (35, 35)))],
)
def test_square_padding(height, width, side, expected):
    assert square_padding(height, width, side) == expected


def test_square_padding_never_cuts():
    with pytest.raises(ValueError, match="side: should be at least 120"):
        square_padding(100, 120, 100)

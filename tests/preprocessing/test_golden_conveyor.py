"""Eyecandies and polyurethane against arrays that the public conversion scripts produced."""

import zlib
from pathlib import Path

import numpy as np
import pytest

from mmad_cli.preprocessing import PreprocessConfig, preprocess, to_network_size, valid_pixels
from mmad_cli.preprocessing.chunks import (
    CHUNK_POINTS,
    drawn_positions,
    isolated_points,
    normalised_grid,
    outlying_points,
)
from mmad_cli.preprocessing.conveyor import belt_scan, depth_in_metres, world_points
from mmad_cli.types import Sample

GOLDEN = Path(__file__).parents[1] / "golden" / "eyecandies.npz"
SIZE = (512, 512)


@pytest.fixture(scope="module")
def arrays():
    with np.load(GOLDEN) as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module", params=["train", "bad"])
def golden(request, arrays):
    """One scan: `train` has the identity as pose, so its middle row and column lie on axes."""
    prefix = f"{request.param}/"
    found = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    steps = found.pop("depth_steps").view(np.uint16)
    found["depth"] = np.cumsum(steps, axis=1, dtype=np.uint16)
    return found


def unpacked(bits, shape=SIZE):
    return np.unpackbits(bits).reshape(shape).astype(bool)


def stats(array):
    wide = array.astype(np.float64)
    return [wide.sum(), np.abs(wide).sum(), np.sqrt((wide**2).sum()), wide.min(), wide.max()]


@pytest.fixture(scope="module")
def clean(golden):
    depth = depth_in_metres(golden["depth"], *golden["min_max"].tolist())
    scan = belt_scan(world_points(depth, golden["pose"]), *SIZE)
    mask = unpacked(golden["mask"])
    info = {"background_value": scan.background_value.tolist()}
    rgb = np.zeros((*SIZE, 3), np.uint8)
    raw = Sample("CandyCane", "test", "bad", "00", rgb, scan.xyz, mask, info, background=scan.background)
    return preprocess(raw, PreprocessConfig(protocol="cfm"))


def test_depth_and_points(golden):
    depth = depth_in_metres(golden["depth"], *golden["min_max"].tolist())
    np.testing.assert_array_equal(depth[::32, ::32], golden["depth_m_s32"])
    points = world_points(depth, golden["pose"]).reshape(*SIZE, 3)
    np.testing.assert_allclose(points[::32, ::32], golden["pc_before_s32"], rtol=1e-10, atol=1e-12)


def test_background(golden, clean):
    depth = depth_in_metres(golden["depth"], *golden["min_max"].tolist())
    scan = belt_scan(world_points(depth, golden["pose"]), *SIZE)
    np.testing.assert_array_equal(scan.background, unpacked(golden["removed"]))
    np.testing.assert_allclose(scan.background_value, golden["background_value"], atol=1e-7)
    assert clean.info["removed_background_pixels"] == unpacked(golden["removed"]).sum()


def test_cloud(golden, clean):
    np.testing.assert_allclose(clean.xyz[::16, ::16], golden["organised_s16"], atol=1e-7)
    np.testing.assert_allclose(stats(clean.xyz), golden["organised_stats"], rtol=1e-6)
    np.testing.assert_array_equal(valid_pixels(clean.xyz), unpacked(golden["valid"]))
    assert (clean.xyz[..., 0] == 0).sum() == golden["x_exact_zero"]


def test_both_protocols_agree(golden, clean):
    other = to_network_size(clean)
    np.testing.assert_array_equal(other.xyz.transpose(2, 0, 1)[:, ::8, ::8], golden["loader_pc_s8"])
    np.testing.assert_array_equal(valid_pixels(other.xyz), unpacked(golden["loader_valid"], (224, 224)))
    np.testing.assert_allclose(stats(other.xyz), golden["loader_stats"], rtol=1e-6)
    if "loader_gt" in golden:
        np.testing.assert_array_equal(other.mask, unpacked(golden["loader_gt"], (224, 224)))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (2.0, 1.0), (1.0, np.inf), (-1.0, 1.0)])
def test_wrong_depths(low, high):
    with pytest.raises(ValueError, match="low, high: should be"):
        depth_in_metres(np.zeros((2, 2), np.uint16), low, high)


def test_wrong_poses():
    depth = np.ones((4, 4), np.float32)
    with pytest.raises(ValueError, match=r"pose: should be \(4, 4\)"):
        world_points(depth, np.eye(3))
    with pytest.raises(ValueError, match="pose: should have an inverse"):
        world_points(depth, np.zeros((4, 4)))
    with pytest.raises(ValueError, match="top and bottom middle should differ"):
        belt_scan(np.ones((16, 3)), 4, 4)


# --- polyurethane


@pytest.fixture(scope="module")
def polyurethane(arrays):
    prefix = "polyurethane/"
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def generator(name):
    return np.random.Generator(np.random.PCG64(zlib.crc32(f"{name}/20417".encode())))


@pytest.fixture(scope="module")
def points():
    """The scan that the stored numbers are of: 4.5 chunks with six far points."""
    random, count = generator("poly_cloud"), 4 * CHUNK_POINTS + 4608
    cloud = random.random((count, 3)) * np.array([100.0, 60.0, 2.0])
    far = np.argsort(random.random(count), kind="stable")[:6]
    cloud[far] += np.array([80.0, 70.0, 40.0]) * (1.0 + random.random((6, 3)))
    return cloud.astype(np.float32)


def test_isolated_points(polyurethane, points):
    np.testing.assert_array_equal(isolated_points(points), polyurethane["iso_low_idx"])
    np.testing.assert_array_equal(isolated_points(points, 1.5e-4), polyurethane["iso_high_idx"])
    # stored for a part of the scan
    np.testing.assert_array_equal(outlying_points(points[:4096]), [3622])


def test_normalised_grid(polyurethane, points):
    grids = [normalised_grid(part) for part in points[: 4 * CHUNK_POINTS].reshape(4, CHUNK_POINTS, 3)]
    assert len(grids) == polyurethane["chunk_count"]
    np.testing.assert_allclose(grids[0].transpose(2, 0, 1)[:, ::4, ::4], polyurethane["image_s4"], atol=1e-6)
    np.testing.assert_allclose(stats(np.stack(grids)), polyurethane["normalised_stats"], rtol=1e-5)
    assert (np.abs(normalised_grid(np.ones((9, 3), np.float32))) == 1).all()


def test_split(polyurethane):
    labels = polyurethane["split_labels"]
    normal, anomalous = np.flatnonzero(labels == 0), np.flatnonzero(labels)
    tested = normal[drawn_positions(len(normal))]
    assert sorted([*tested, *anomalous]) == sorted(polyurethane["split_test"])
    assert sorted(set(normal) - set(tested)) == sorted(polyurethane["split_train"])
    # the published sizes
    assert len(drawn_positions(2063)) == 207


def test_identity_at_network_size(points):
    grid = normalised_grid(points[:CHUNK_POINTS])
    mask = np.random.default_rng(0).random((96, 96)) < 0.01
    sample = Sample("edges", "test", "good", "a-0000", np.zeros((96, 96, 3), np.uint8), grid, mask)
    same = to_network_size(sample, size=96)
    np.testing.assert_array_equal(same.xyz, grid)
    np.testing.assert_array_equal(same.mask, mask)


@pytest.mark.parametrize("shape", [(0, 3), (8, 3), (9, 2)])
def test_wrong_chunks(shape):
    with pytest.raises(ValueError, match=r"points: should be \(n, 3\)"):
        normalised_grid(np.zeros(shape, np.float32))


def test_wrong_contamination(points):
    with pytest.raises(ValueError, match="contamination: should be above 0"):
        isolated_points(points, 0.0)
    with pytest.raises(ValueError, match="points: should be"):
        isolated_points(np.zeros((0, 3), np.float32))

"""DBSCAN on a grid against Open3D's DBSCAN: the labels are the same."""

import numpy as np
import pytest

from mmad_cli.preprocessing.debris import density_labels, largest_cluster, largest_component


def open3d_labels(points, eps, min_points):
    import open3d

    cloud = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(points.astype(np.float64)))
    return np.asarray(cloud.cluster_dbscan(eps=eps, min_points=min_points))


def blobs(rng, count):
    centres = rng.uniform(0, 0.1, (rng.integers(2, 12), 3))
    return centres[rng.integers(0, len(centres), count)] + rng.normal(0, rng.uniform(5e-4, 6e-3), (count, 3))


def sheet(rng, count):
    return np.c_[rng.uniform(0, 0.15, (count, 2)), rng.normal(0, 0.002, count)]


def stripes(rng, count):
    # 7 mm apart: further than eps, nearer than the cells that have to be looked at
    rows = np.round(rng.uniform(0, 0.1, count) / 0.007) * 0.007
    return np.c_[rng.uniform(0, 0.1, count), rows, np.zeros(count)] + rng.normal(0, 1e-4, (count, 3))


def scattered(rng, count):
    return rng.uniform(0, rng.choice([0.02, 0.04, 0.08, 0.2]), (count, 3))


@pytest.mark.parametrize("make", [blobs, sheet, stripes, scattered])
@pytest.mark.parametrize(("eps", "min_points"), [(0.006, 30), (0.004, 3), (0.01, 10), (0.006, 1)])
def test_same_labels_as_open3d(make, eps, min_points):
    rng = np.random.default_rng(7)
    for _ in range(6):
        points = make(rng, int(rng.integers(1, 1500))).astype(np.float32)
        np.testing.assert_array_equal(density_labels(points, eps, min_points), open3d_labels(points, eps, min_points))


def test_cases_have_many_and_no_clusters():
    rng = np.random.default_rng(7)
    assert open3d_labels(stripes(rng, 1200), 0.006, 10).max() > 5
    assert open3d_labels(scattered(rng, 20), 0.006, 30).max() == -1


def test_dense_surface_with_a_speck_beside_it():
    row, column = np.mgrid[:80, :80] * 3e-4
    surface = np.stack([column, row, np.full_like(row, 0.6)], axis=-1).reshape(-1, 3)
    speck = surface[:40] + np.array([0.0, 0.0, 0.0065])
    points = np.concatenate([surface, speck]).astype(np.float32)
    kept = largest_component(points)
    np.testing.assert_array_equal(kept, largest_cluster(points))
    assert kept[: len(surface)].all()
    assert not kept[len(surface) :].any()


def test_noise_takes_part_in_the_vote():
    rng = np.random.default_rng(0)
    cluster = rng.normal(0, 1e-3, (40, 3))
    noise = rng.uniform(1, 2, (60, 3))
    points = np.concatenate([cluster, noise]).astype(np.float32)
    for kept in (largest_component(points), largest_cluster(points)):
        np.testing.assert_array_equal(kept, np.arange(100) >= 40)


def test_huge_extent():
    rng = np.random.default_rng(0)
    points = rng.normal(0, 1e6, (300, 3)).astype(np.float32)
    points[:100] = rng.normal(0, 1e-3, (100, 3))
    points[200] = 1e30
    np.testing.assert_array_equal(density_labels(points), open3d_labels(points, 0.006, 30))


@pytest.mark.parametrize("keep", [largest_component, largest_cluster])
def test_no_point(keep):
    assert keep(np.zeros((0, 3), np.float32)).shape == (0,)


@pytest.mark.parametrize(
    ("points", "eps", "min_points", "message"),
    [
        (np.zeros((3, 2), np.float32), 0.006, 30, "points: should be"),
        (np.full((3, 3), np.nan, np.float32), 0.006, 30, "points: should be"),
        (np.zeros((3, 3), np.float32), 0.0, 30, "eps: should be"),
        (np.zeros((3, 3), np.float32), 0.006, 0, "min_points: should be"),
    ],
)
def test_wrong_arguments(points, eps, min_points, message):
    with pytest.raises(ValueError, match=message):
        density_labels(points, eps, min_points)

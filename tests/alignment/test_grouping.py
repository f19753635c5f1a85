"""Farthest point sampling and grouping against the published operators' choices and against plain loops."""

import numpy as np
import pytest
import torch

from mmad_cli.alignment import grouping
from mmad_cli.alignment.grouping import farthest_points, farthest_points_of, group_neighbours

CASES = [("group_s128_g1024", 1024, 128), ("group_s32_g128", 128, 32)]


def literal_neighbours(points, centres, count):
    rows = []
    for centre in centres:
        difference = points - centre
        squared = difference[:, 0] ** 2 + difference[:, 1] ** 2 + difference[:, 2] ** 2
        rows.append(np.argsort(squared, kind="stable")[:count])
    return np.array(rows)


def grid(side, step=0.001):
    u, v = np.mgrid[:side, :side]
    return np.stack([u * step, v * step, np.full((side, side), 0.5)], axis=-1).reshape(-1, 3).astype(np.float32)


@pytest.mark.parametrize(("name", "groups", "size"), CASES)
def test_published_choices(golden, cloud, name, groups, size):
    chosen = farthest_points(cloud, groups)
    assert np.array_equal(chosen, golden[f"{name}/fps_idx"])
    members = group_neighbours(cloud, cloud[chosen], size)
    assert np.array_equal(members[:, :8], golden[f"{name}/knn_first8"])
    assert np.array_equal(members[golden[f"{name}/knn_full_groups"]], golden[f"{name}/knn_full"])
    assert np.array_equal(members.sum(axis=1), golden[f"{name}/knn_sum_idx"])


@pytest.mark.parametrize("name", ["fps_origin", "fps_all_origin"])
def test_points_near_the_origin_are_no_centres(golden, name):
    cloud, expected = golden[f"{name}/cloud"], golden[f"{name}/idx"]
    chosen = farthest_points(cloud, len(expected))
    assert np.array_equal(chosen, expected)
    assert ((cloud[chosen[1:]] ** 2).sum(axis=1) > 1e-3).all() or not chosen.any()


def test_the_origin_rule_can_be_switched_off(golden):
    cloud = golden["fps_origin/cloud"]
    near = np.flatnonzero((cloud**2).sum(axis=1) <= 1e-3)
    assert not np.isin(farthest_points(cloud, 300)[1:], near).any()
    assert np.isin(farthest_points(cloud, 300, skip_origin=False)[1:], near).any()


def test_a_point_on_the_bound_is_judged_in_double_precision():
    # float32(0.001) lies above 0.001, so this point is outside the bound
    x = np.sqrt(np.float32(1e-3))
    while x * x < np.float32(1e-3):
        x = np.nextafter(x, np.float32(1))
    points = np.array([[0, 0, 0], [x, 0, 0], [0, 0.01, 0]], dtype=np.float32)
    assert farthest_points(points, 2).tolist() == [0, 1]


def clouds(rng):
    """Point sets whose covering radius falls as on a surface, slower, much faster, and in jumps."""
    line = np.zeros((3000, 3))
    line[:, 0] = rng.random(3000)
    specks = grid(50)
    specks[rng.integers(0, len(specks), 60)] += rng.normal(0, 0.3, (60, 3)).astype(np.float32)
    return {
        "surface": grid(55),
        "ball": rng.normal(size=(3000, 3)),
        "line": line + 1,
        "specks": specks,
        "duplicates": np.repeat(rng.random((100, 3)), 30, axis=0) + 1,
        "two scales": np.concatenate([rng.random((40, 3)), 0.001 * rng.random((3000, 3)) + 1]),
        "near the sensor": rng.normal(0, 0.03, (3000, 3)),
    }


@pytest.mark.parametrize("margin", [0.6, 1.0])
def test_parking_points_changes_no_choice(rng, monkeypatch, margin):
    # a larger margin parks more points that are needed later, so that they must come back
    returns = []
    joined = grouping._with_parked
    monkeypatch.setattr(grouping, "_with_parked", lambda *parts: returns.append(0) or joined(*parts))
    for name, points in clouds(rng).items():
        points = points.astype(np.float32)
        monkeypatch.setattr(grouping, "_PARKING_MARGIN", margin)
        monkeypatch.setattr(grouping, "_PARKING_INTERVAL", 16)
        plain = grouping._farthest_points_torch([points], 400, True, "cpu", [0])[0]
        assert np.array_equal(farthest_points(points, 400), plain), name
    assert returns


def test_the_first_choice_may_be_any_point(rng):
    points = rng.random((500, 3)).astype(np.float32)
    chosen = farthest_points(points, 60, start=123)
    assert chosen[0] == 123 and len(set(chosen.tolist())) == 60
    assert np.array_equal(chosen, grouping._farthest_points_torch([points], 60, True, "cpu", [123])[0])
    # the greedy rule holds from there
    for step in range(1, 60):
        nearest = ((points[:, None] - points[chosen[:step]][None]) ** 2).sum(axis=2).min(axis=1)
        assert nearest[chosen[step]] == pytest.approx(nearest.max(), rel=1e-5)
    with pytest.raises(ValueError, match="start"):
        farthest_points(points, 3, start=500)


def test_equal_distances_go_to_the_smallest_index():
    points = np.array([[0, 0, 1], [1, 0, 1], [-1, 0, 1], [0, 1, 1]], dtype=np.float32)
    assert farthest_points(points, 4).tolist() == [0, 1, 2, 3]
    assert group_neighbours(points, points[:1], 3).tolist() == [[0, 1, 2]]


def test_indices_repeat_when_points_run_out(caplog):
    points = np.array([[0, 0, 1], [1, 0, 1]], dtype=np.float32)
    assert farthest_points(points, 4).tolist() == [0, 1, 0, 0]
    assert "4 centres of 2 points" in caplog.text


@pytest.mark.parametrize("offset", [0.0, 0.3, 30.0])
def test_neighbours_on_a_grid_full_of_ties(offset):
    # far from the origin float32 makes many distances equal that differ in float64
    points = (grid(40, 0.00037) + np.float32(offset)).astype(np.float32)
    centres = points[::97]
    assert np.array_equal(group_neighbours(points, centres, 50), literal_neighbours(points, centres, 50))


def test_neighbours_among_duplicates(rng):
    points = np.repeat(rng.random((6, 3)), 40, axis=0).astype(np.float32)
    centres = points[::40]
    assert np.array_equal(group_neighbours(points, centres, 32), literal_neighbours(points, centres, 32))


def test_all_points_may_be_neighbours(rng):
    points = rng.random((30, 3)).astype(np.float32)
    assert np.array_equal(group_neighbours(points, points, 30), literal_neighbours(points, points, 30))


def test_the_gpu_path_makes_the_same_choices(cloud, golden):
    chosen = grouping._farthest_points_torch([cloud], 128, True, "cpu", [0])[0]
    assert np.array_equal(chosen, golden["group_s32_g128/fps_idx"])
    members = grouping._neighbours_torch(cloud, cloud[chosen], 32, "cpu")
    assert np.array_equal(members, group_neighbours(cloud, cloud[chosen], 32))
    ties = grid(30)
    assert np.array_equal(grouping._neighbours_torch(ties, ties, 20, "cpu"), group_neighbours(ties, ties, 20))


@pytest.mark.parametrize("skip_origin", [True, False])
def test_clouds_of_a_batch_do_not_meet(rng, torch_device, skip_origin):
    """Few and many points, duplicates, ties, all near the sensor: each cloud as if it were alone."""
    together = [points.astype(np.float32) for points in clouds(rng).values()]
    together += [grid(3), np.zeros((5, 3), np.float32), together[0][:1], together[1][:300]]
    starts = [number % len(points) for number, points in enumerate(together)]
    found = grouping._farthest_points_torch(together, 50, skip_origin, torch_device, starts)
    assert len(found) == len(together)
    for chosen, points, start in zip(found, together, starts, strict=True):
        assert np.array_equal(chosen, farthest_points(points, 50, skip_origin, start=start))
    backwards = grouping._farthest_points_torch(together[::-1], 50, skip_origin, torch_device, starts[::-1])
    assert all(np.array_equal(a, b) for a, b in zip(found, backwards[::-1], strict=True))


def test_several_clouds_on_the_cpu(rng):
    together = [rng.random((40, 3)), rng.random((60, 3))]
    found = farthest_points_of(together, 20, starts=[3, 5])
    assert all(
        np.array_equal(chosen, farthest_points(points, 20, start=start))
        for chosen, points, start in zip(found, together, (3, 5), strict=True)
    )
    assert farthest_points_of([], 20) == grouping._farthest_points_torch([], 20, True, "cpu", []) == []
    with pytest.raises(ValueError, match=r"start: should lie in 0\.\.39, got 40"):
        farthest_points_of(together, 20, starts=[40, 5])


def test_tiles_of_centres_change_nothing(rng, torch_device, monkeypatch):
    points = rng.random((500, 3)).astype(np.float32)
    monkeypatch.setattr(grouping, "_DEVICE_PAIRS", 3 * 500)
    found = grouping._neighbours_torch(points, points[:40], 20, torch_device)
    assert np.array_equal(found, group_neighbours(points, points[:40], 20))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_and_cpu_agree(cloud):
    chosen = farthest_points(cloud, 1024, device="cuda")
    assert np.array_equal(chosen, farthest_points(cloud, 1024))
    members = group_neighbours(cloud, cloud[chosen], 128, device="cuda")
    assert np.array_equal(members, group_neighbours(cloud, cloud[chosen], 128))


def test_wrong_arguments(rng):
    points = rng.random((100, 3)).astype(np.float32)
    with pytest.raises(ValueError, match="group size of 128, got 100"):
        group_neighbours(points, points[:4])
    with pytest.raises(ValueError, match="count: should be at least 1, got 0"):
        farthest_points(points, 0)
    with pytest.raises(ValueError, match=r"points: should be of shape \(n, 3\)"):
        farthest_points(points[:, :2], 4)
    with pytest.raises(ValueError, match="centres"):
        group_neighbours(points, points[0], 4)

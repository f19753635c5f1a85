"""Per-region overlap against two independent references, and its properties."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from sklearn.metrics import roc_curve

from mmad_cli.metrics import aupro, aupro_exact, aupro_grid, pixel_auroc, pro_curve

LIMITS = (1.0, 0.3, 0.1, 0.05, 0.01)
SEEDS = range(6)


def regions_of(mask):
    """Pixel lists of the 8-connected regions, by flood fill."""
    left, regions = {tuple(pixel) for pixel in np.argwhere(mask)}, []
    while left:
        region, front = [], [left.pop()]
        while front:
            row, column = front.pop()
            region.append((row, column))
            near = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            front.extend(near)
        regions.append(tuple(np.array(region).T))
    return regions


def area_to(points, limit):
    """Area under straight pieces between points (x, y) up to x = limit, divided by limit."""
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 >= limit:
            break
        end = min(x1, limit)
        y_end = y1 if x1 <= limit else y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
        area += (end - x0) * (y0 + y_end) / 2
    return area / limit


def brute_force_aupro(masks, maps, limit):
    """Every distinct score is a threshold; every region is looked at for every threshold."""
    normal = np.concatenate([scores[~mask] for mask, scores in zip(masks, maps, strict=True)])
    inside = [scores[r] for mask, scores in zip(masks, maps, strict=True) for r in regions_of(mask)]
    thresholds = np.unique(np.concatenate([scores.ravel() for scores in maps]))[::-1]
    points = [(0.0, 0.0)]
    points += [(np.mean(normal >= t), np.mean([np.mean(values >= t) for values in inside])) for t in thresholds]
    return area_to(points, limit)


def mean_of_roc_areas(masks, maps, limit):
    """AUPRO is the mean of the regions' own ROC areas, each against all normal pixels."""
    normal = np.concatenate([scores[~mask] for mask, scores in zip(masks, maps, strict=True)])
    areas = []
    for mask, scores in zip(masks, maps, strict=True):
        for region in regions_of(mask):
            values = np.concatenate([normal, scores[region]])
            labels = np.arange(len(values)) >= len(normal)
            rate, hits, _ = roc_curve(labels, values, drop_intermediate=False)
            areas.append(area_to(list(zip(rate, hits, strict=True)), limit))
    return np.mean(areas)


@pytest.mark.parametrize("reference", [brute_force_aupro, mean_of_roc_areas])
@pytest.mark.parametrize("levels", [None, 4, 1], ids=["continuous", "ties", "few levels"])
@pytest.mark.parametrize("seed", SEEDS)
def test_exact_against_references(random_case, seed, levels, reference):
    masks, maps = random_case(seed, levels=levels)
    expected = [reference(masks, maps, limit) for limit in LIMITS]
    np.testing.assert_allclose(aupro_exact(masks, maps, LIMITS), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32])
def test_dtypes(random_case, dtype):
    masks, maps = random_case(7, levels=4)
    maps = (maps * 4).astype(dtype)
    expected = [brute_force_aupro(masks, maps, limit) for limit in LIMITS]
    np.testing.assert_allclose(aupro_exact(masks, maps, LIMITS), expected, rtol=0, atol=1e-12)


def test_images_of_different_size(random_case):
    cases = [random_case(seed, 2, size) for seed, size in enumerate((9, 14, 20))]
    masks = [mask for case, _ in cases for mask in case]
    maps = [scores for _, case in cases for scores in case]
    expected = [brute_force_aupro(masks, maps, limit) for limit in LIMITS]
    np.testing.assert_allclose(aupro_exact(masks, maps, LIMITS), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("thresholds", [2, 7, 99, 100])
@pytest.mark.parametrize("levels", [None, 2])
def test_grid_against_its_definition(random_case, thresholds, levels):
    masks, maps = random_case(11, levels=levels)
    normal = np.sort(maps[~masks])
    inside = [scores[r] for mask, scores in zip(masks, maps, strict=True) for r in regions_of(mask)]
    points = [(1.0, 1.0)]
    for rank in np.linspace(0, len(normal) - 1, thresholds).astype(int):
        overlap = np.mean([np.mean(values > normal[rank]) for values in inside])
        points.append((1 - (rank + 1) / len(normal), overlap))
    expected = [area_to(points[::-1], limit) for limit in LIMITS]
    np.testing.assert_allclose(aupro_grid(masks, maps, LIMITS, thresholds), expected, rtol=0, atol=1e-12)
    rate, overlap = pro_curve(masks, maps, grid=thresholds)
    np.testing.assert_allclose(np.stack([rate, overlap], axis=1), points[::-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid", [None, 99, 100])
def test_perfect_map(random_case, grid):
    masks, maps = random_case(0)
    assert [aupro(masks, maps + 10 * masks, limit, grid) for limit in LIMITS] == [1.0] * len(LIMITS)


def test_constant_map_is_chance(random_case):
    masks, _ = random_case(0)
    values = aupro_exact(masks, np.full(masks.shape, 0.25), LIMITS)
    np.testing.assert_allclose(values, np.array(LIMITS) / 2, rtol=0, atol=1e-12)


def test_random_map_is_near_chance():
    rng = np.random.default_rng(5)
    masks = np.zeros((8, 64, 64), dtype=bool)
    masks[:, 10:40, 10:40] = True
    assert aupro(masks, rng.random(masks.shape)) == pytest.approx(0.15, abs=0.01)


def test_worst_map_is_zero(random_case):
    masks, maps = random_case(0)
    assert aupro(masks, maps - 100 * masks, limit=0.3) == 0.0


@pytest.mark.parametrize("grid", [None, 99, 100])
@pytest.mark.parametrize("transform", [lambda s: 3 * s + 2, np.exp, lambda s: np.arctan(s.astype(np.float64))])
def test_monotone_transform_changes_nothing(random_case, grid, transform):
    masks, maps = random_case(2, levels=8)
    assert aupro(masks, transform(maps), 0.3, grid) == pytest.approx(aupro(masks, maps, 0.3, grid), abs=1e-12)


@pytest.mark.parametrize("grid", [None, 99])
def test_order_and_mirror_images_change_nothing(random_case, grid):
    masks, maps = random_case(2, levels=8)
    order = np.random.default_rng(1).permutation(len(masks))
    value = aupro(masks, maps, 0.1, grid)
    assert aupro(masks[order], maps[order], 0.1, grid) == pytest.approx(value, abs=1e-12)
    assert aupro(masks[:, ::-1], maps[:, ::-1], 0.1, grid) == pytest.approx(value, abs=1e-12)


def test_one_region_of_whole_curve_is_pixel_auroc(random_case):
    masks, maps = random_case(9, levels=3)
    masks = np.zeros_like(masks)
    masks[1, 3:9, 4:7] = True
    assert aupro(masks, maps, limit=1.0) == pytest.approx(pixel_auroc(masks, maps), abs=1e-12)


def test_regions_count_once_whatever_their_size():
    mask = np.zeros((1, 12, 12), dtype=bool)
    mask[0, :6, :6] = True
    mask[0, 10, 10] = True
    # The large region is found, the single pixel is below every normal pixel
    maps = np.where(mask, 1.0, 0.5)
    maps[0, 10, 10] = 0.0
    assert aupro(mask, maps, limit=0.3) == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [([(2, 2), (3, 3)], 0.5), ([(2, 3), (3, 2)], 0.5), ([(2, 2), (2, 4)], 0.5), ([(2, 2), (3, 3), (6, 6)], 0.75)],
    ids=["diagonal", "other diagonal", "apart", "diagonal and apart"],
)
def test_diagonal_neighbours_are_one_region(pixels, expected):
    mask = np.zeros((1, 8, 8), dtype=bool)
    maps = np.zeros((1, 8, 8))
    for row, column in pixels:
        mask[0, row, column] = True
    for value, (row, column) in zip((1.0, -1.0, 1.0), pixels, strict=False):
        maps[0, row, column] = value
    # One region of two pixels with one found: 1/2; with 4-connectivity the last case would give 2/3
    assert aupro(mask, maps, limit=0.3) == pytest.approx(expected, abs=1e-12)


def test_regions_do_not_join_across_images():
    masks = np.zeros((2, 4, 4), dtype=bool)
    masks[0, 3, :], masks[1, 0, 0] = True, True
    maps = np.zeros((2, 4, 4))
    maps[1, 0, 0] = 1.0
    maps[0, 3, :] = -1.0
    assert aupro(masks, maps, limit=0.3) == pytest.approx(0.5, abs=1e-12)


def test_image_with_vanished_mask_gives_normal_pixels(random_case):
    masks, maps = random_case(1)
    without = aupro(masks[1:], maps[1:], limit=0.3)
    assert not masks[0].any()
    louder = maps.copy()
    louder[0] += 5
    assert aupro(masks, louder, limit=0.3) < without


def test_a_tie_is_one_slanted_piece():
    # At score 0.5 stand half of the region and one of two normal pixels
    mask, scores = np.array([[[1, 1, 0, 0]]]), np.array([[[0.9, 0.5, 0.5, 0.1]]])
    rate, overlap = pro_curve(mask, scores)
    np.testing.assert_array_equal(rate, [0, 0, 0.5, 1])
    np.testing.assert_array_equal(overlap, [0, 0.5, 1, 1])
    assert aupro(mask, scores, limit=0.25) == pytest.approx(0.625, abs=1e-12)


@pytest.mark.parametrize("grid", [None, 99])
def test_curve_rises_from_rate_0_to_1(random_case, grid):
    rate, overlap = pro_curve(*random_case(3, levels=6), grid=grid)
    assert rate[0] == 0
    assert (rate[-1], overlap[-1]) == (1.0, 1.0)
    assert (np.diff(rate) >= 0).all()
    assert (np.diff(overlap) >= 0).all()


def test_inputs_stay_as_they_are(random_case):
    masks, maps = random_case(0, count=1)
    masks[0, 2, 2] = True
    before = masks.copy(), maps.copy()
    masks.setflags(write=False)
    maps.setflags(write=False)
    aupro(masks, maps)
    aupro(masks.transpose(0, 2, 1), maps.transpose(0, 2, 1), grid=99)
    np.testing.assert_array_equal(masks, before[0])
    np.testing.assert_array_equal(maps, before[1])


ONE, MAP = np.array([[[True, False], [False, False]]]), np.ones((1, 2, 2))


@pytest.mark.parametrize(
    ("masks", "maps", "message"),
    [
        (ONE & False, MAP, "masks must hold normal and defect pixels, got no defect pixel in any mask"),
        (ONE | True, MAP, "got no normal pixel in any mask"),
        ([], [], "got no test image"),
        (ONE, MAP * np.nan, "maps must be finite, got nan or infinite values at index 0"),
        (ONE, MAP * np.inf, "maps must be finite"),
        (ONE, np.ones((2, 2, 2)), "masks and maps must have one length, got 1 and 2"),
        (ONE, np.ones((1, 2, 3)), r"equal shapes, got \(2, 2\) and \(2, 3\) at index 0"),
        (ONE[0], MAP[0], r"must be \(N, H, W\)"),
        (ONE * 255, MAP, r"masks\[0\] must be bool or hold only 0 and 1, got 255"),
        (ONE, MAP * 1j, r"maps\[0\] must hold real numbers"),
    ],
)
def test_errors(masks, maps, message):
    for metric in (aupro, pixel_auroc, pro_curve):
        with pytest.raises(ValueError, match=message):
            metric(masks, maps)


@pytest.mark.parametrize("limit", [0.0, -0.3, 1.5, 30, float("nan")])
def test_limit_out_of_range(limit):
    with pytest.raises(ValueError, match=r"limit must be in \(0, 1\]"):
        aupro(ONE, MAP, limit=limit)


@pytest.mark.parametrize("grid", [0, 1, -5])
def test_grid_out_of_range(grid):
    with pytest.raises(ValueError, match="grid must be None or at least 2"):
        aupro(ONE, MAP, grid=grid)

"""Bootstrap draws against the metrics themselves, on the images repeated as the draw says."""

from __future__ import annotations

import time

import numpy as np
import pytest

from mmad_cli.metrics import all_metrics, average_precision, f1_max, fpr_at_tpr, image_auroc
from mmad_cli.metrics.bootstrap import count_pixels, draw_weights, image_draws, percentile_interval, pixel_draws

IMAGE_METRICS = {"i_auroc": image_auroc, "i_ap": average_precision, "i_f1max": f1_max, "i_fpr95": fpr_at_tpr}
EXACT = ("p_auroc", "p_fpr95", "aupro_30", "aupro_10", "aupro_05", "aupro_01")
GRID = ("aupro_30_grid100", "aupro_30_grid99", "aupro_10_grid99", "aupro_05_grid99", "aupro_01_grid99")


@pytest.fixture(params=["ties", "distinct", "perfect", "constant", "reversed"])
def scored(request):
    """Labels and scores of 40 images."""
    rng = np.random.default_rng(3)
    labels = np.repeat([0, 1], [10, 30])
    scores = {
        "ties": np.round(rng.normal(labels, 1.0), 1),
        "distinct": rng.normal(labels, 1.0),
        "perfect": labels + 0.1 * rng.random(40),
        "constant": np.ones(40),
        "reversed": -labels.astype(float),
    }
    return labels, scores[request.param]


def repeated(weights, *arrays):
    index = np.repeat(np.arange(len(weights)), weights.astype(int))
    return [array[index] for array in arrays]


def test_image_draws_are_the_metrics_of_the_repeated_images(scored):
    labels, scores = scored
    weights = draw_weights(labels, 50, seed=1)
    found = image_draws(labels, scores, weights)
    assert set(found) == set(IMAGE_METRICS)
    for draw, row in enumerate(weights):
        for key, metric in IMAGE_METRICS.items():
            assert found[key][draw] == pytest.approx(metric(*repeated(row, labels, scores)), abs=1e-12), key


def test_draws_keep_the_number_of_images_of_each_class():
    labels = np.array([1, 0, 0, 1, 1, 0, 1])
    weights = draw_weights(labels, 200, seed=0)
    assert (weights[:, labels == 0].sum(axis=1) == 3).all() and (weights[:, labels == 1].sum(axis=1) == 4).all()
    assert (weights == np.round(weights)).all() and len(np.unique(weights, axis=0)) > 100


def test_draws_are_those_of_the_seed():
    labels = [0, 1, 1, 0]
    assert np.array_equal(draw_weights(labels, 20, seed=4), draw_weights(labels, 20, seed=4))
    assert not np.array_equal(draw_weights(labels, 20, seed=4), draw_weights(labels, 20, seed=5))


def test_draws_do_not_depend_on_how_many_are_computed_at_once(scored, monkeypatch):
    labels, scores = scored
    weights = draw_weights(labels, 30)
    whole = image_draws(labels, scores, weights)
    monkeypatch.setattr("mmad_cli.metrics.bootstrap._CELLS_AT_ONCE", 100)
    for key, values in image_draws(labels, scores, weights).items():
        assert np.array_equal(values, whole[key])


def test_a_thousand_draws_of_110_images_are_fast():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [22, 88])
    start = time.perf_counter()
    image_draws(labels, rng.normal(labels), draw_weights(labels, 1000))
    assert time.perf_counter() - start < 0.5


@pytest.fixture(scope="module")
def pixels():
    """Labels, masks and maps of 20 images of 64 x 64, half of them with one or two defects that the maps half see."""
    rng = np.random.default_rng(5)
    labels = np.repeat([0, 1], 10)
    masks = np.zeros((20, 64, 64), dtype=bool)
    maps = rng.normal(0, 1, (20, 64, 64)).astype(np.float32)
    for index in np.flatnonzero(labels):
        for _ in range(1 + index % 2):
            top, left, size = rng.integers(2, 40), rng.integers(2, 40), rng.integers(3, 16)
            masks[index, top : top + size, left : left + size] = True
        maps[index][masks[index]] += 2
    return labels, masks, maps


def test_pixel_draws_are_the_metrics_of_the_repeated_images(pixels):
    labels, masks, maps = pixels
    weights = np.vstack([np.ones(20), draw_weights(labels, 5, seed=2)])
    found = pixel_draws(count_pixels(masks, maps), weights)
    assert set(found) == {*EXACT, *GRID}
    for draw, row in enumerate(weights):
        expected = all_metrics(*repeated(row, labels, labels, masks, maps)).values
        for key in found:
            # Ranks of the published grids are cut to whole pixels, of which there are only 80000 here; P-FPR95 is a
            # single point of a curve whose thresholds are 0.95 / 500 = 0.0019 apart
            tolerance = 1e-3 if key in EXACT and key != "p_fpr95" else 2e-3
            assert found[key][draw] == pytest.approx(expected[key], abs=tolerance), (draw, key)


def test_constant_maps_give_what_the_metrics_give(pixels):
    labels, masks, maps = pixels
    found = pixel_draws(count_pixels(masks, np.zeros_like(maps)), np.ones((1, 20)))
    expected = all_metrics(labels, labels, masks, np.zeros_like(maps)).values
    for key in set(EXACT) - {"p_fpr95"}:
        assert found[key][0] == pytest.approx(expected[key], abs=1e-12)
    # one jump to (1, 1): the metric stands at its end, the straight line reaches 95 % before
    assert (expected["p_fpr95"], found["p_fpr95"][0]) == (1.0, pytest.approx(0.95))


def test_percentile_interval():
    assert percentile_interval([0.0, 0.5, 1.0], 0.5) == (0.25, 0.75)
    assert percentile_interval([0.7]) == (0.7, 0.7)


def test_the_interval_covers_the_true_value_about_as_often_as_it_says():
    """AUROC of unit normals one apart is Phi(1 / sqrt 2) = 0.7602; 80 % intervals of 200 test sets."""
    rng = np.random.default_rng(11)
    labels = np.repeat([0, 1], [60, 60])
    covered = 0
    for trial in range(200):
        scores = rng.normal(labels, 1.0)
        low, high = percentile_interval(image_draws(labels, scores, draw_weights(labels, 300, trial))["i_auroc"], 0.8)
        covered += low <= 0.7602 <= high
    assert 0.72 <= covered / 200 <= 0.88


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: draw_weights([0, 1], 0), "draws must be at least 1, got 0"),
        (lambda: draw_weights([0, 2], 1), "labels must be bool"),
        (lambda: image_draws([0, 1], [0.0, 1.0], [[1, 0]]), "at least one image of each class"),
        (lambda: image_draws([0, 1], [0.0, 1.0], [[1, 1, 1]]), r"weights must be \(B, 2\)"),
        (lambda: image_draws([0, 1], [0.0, 1.0], [[1, -1]]), "not be negative"),
        (lambda: image_draws([0, 1], [0.0, np.nan], [[1, 1]]), "finite"),
        (lambda: count_pixels(np.zeros((1, 4, 4), bool), np.zeros((1, 4, 4))), "normal and defect pixels"),
        (lambda: percentile_interval([]), "not be empty"),
        (lambda: percentile_interval([1.0], 1.0), "between 0 and 1, got 1.0"),
    ],
)
def test_wrong_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()

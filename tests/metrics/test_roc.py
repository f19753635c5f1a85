"""ROC, precision-recall and operating points against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as reference

from mmad_cli.metrics import average_precision, f1_max, fpr_at_tpr, image_auroc, pixel_auroc

CASES = {
    "continuous": (200, 0.4, None),
    "few levels": (200, 0.4, 1),
    "many ties": (500, 0.1, 4),
    "one positive": (50, 0.02, None),
    "one negative": (50, 0.98, None),
    "two images": (2, 0.5, None),
}
DTYPES = (np.float32, np.float64, np.float16)


@pytest.fixture(params=CASES)
def scored(request):
    count, fraction, levels = CASES[request.param]
    rng = np.random.default_rng(list(CASES).index(request.param))
    labels = np.zeros(count, dtype=int)
    labels[: max(1, round(count * fraction))] = 1
    scores = rng.normal(size=count) + labels
    if levels:
        scores = np.round(scores * levels) / levels
    order = rng.permutation(count)
    return labels[order], scores[order]


def reference_f1_max(labels, scores):
    precision, recall, _ = reference.precision_recall_curve(labels, scores)
    return np.max(2 * precision * recall / np.maximum(precision + recall, 1e-300))


def reference_fpr(labels, scores, tpr):
    false_positive, true_positive, _ = reference.roc_curve(labels, scores, drop_intermediate=False)
    return false_positive[true_positive >= tpr].min()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (image_auroc, reference.roc_auc_score),
        (average_precision, reference.average_precision_score),
        (f1_max, reference_f1_max),
    ],
    ids=["auroc", "ap", "f1max"],
)
def test_against_scikit_learn(scored, ours, theirs, dtype):
    labels, scores = scored[0], scored[1].astype(dtype)
    assert ours(labels, scores) == pytest.approx(theirs(labels, scores.astype(np.float64)), abs=1e-12)


@pytest.mark.parametrize("tpr", [0.01, 0.5, 0.9, 0.95, 1.0])
def test_fpr_at_tpr(scored, tpr):
    assert fpr_at_tpr(*scored, tpr=tpr) == pytest.approx(reference_fpr(*scored, tpr), abs=1e-12)


def test_fpr_at_tpr_counts_exactly_reached_rates():
    # 19 of 20 are found at the 19th score, 20 of 20 only below every normal score
    labels = np.array([1] * 19 + [0] * 10 + [1])
    assert fpr_at_tpr(labels, -np.arange(30.0), tpr=0.95) == 0.0
    assert fpr_at_tpr(labels, -np.arange(30.0), tpr=0.951) == 1.0


@pytest.mark.parametrize("levels", [None, 2])
def test_pixel_auroc(random_case, levels):
    masks, maps = random_case(3, levels=levels)
    expected = reference.roc_auc_score(masks.ravel(), maps.ravel())
    assert pixel_auroc(masks, maps) == pytest.approx(expected, abs=1e-12)


def test_pixel_metrics_of_flat_arrays(random_case):
    masks, maps = random_case(4, levels=3)
    expected = reference.average_precision_score(masks.ravel(), maps.ravel())
    assert average_precision(masks, maps) == pytest.approx(expected, abs=1e-12)


def test_pixel_auroc_of_images_of_different_size(random_case):
    masks, maps = zip(*[(m[0], s[0]) for m, s in (random_case(i, 2, 8 + 3 * i) for i in range(3))], strict=True)
    masks[1][2:4, 2:7] = True
    flat = np.concatenate([mask.ravel() for mask in masks]), np.concatenate([scores.ravel() for scores in maps])
    assert pixel_auroc(masks, maps) == pytest.approx(reference.roc_auc_score(*flat), abs=1e-12)


METRICS = (image_auroc, average_precision, f1_max, fpr_at_tpr)


@pytest.mark.parametrize("metric", METRICS)
def test_monotone_transform_and_order_change_nothing(scored, metric):
    labels, scores = scored
    value = metric(labels, scores)
    assert metric(labels, np.exp(scores / 2)) == pytest.approx(value, abs=1e-12)
    order = np.random.default_rng(0).permutation(len(labels))
    assert metric(labels[order], scores[order]) == pytest.approx(value, abs=1e-12)


def test_reversed_scores_mirror_the_roc(scored):
    labels, scores = scored
    assert image_auroc(labels, -scores) == pytest.approx(1 - image_auroc(labels, scores), abs=1e-12)


def test_perfect_and_constant_scores():
    labels = [0, 0, 0, 1]
    assert [metric(labels, [0, 1, 2, 3]) for metric in METRICS] == [1.0, 1.0, 1.0, 0.0]
    assert [metric(labels, np.ones(4)) for metric in METRICS] == [0.5, 0.25, 0.4, 1.0]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 0], [0.1, 0.2], "labels must hold both classes, got 2 normal and 0 anomalous"),
        ([1, 1, 1], [0.1, 0.2, 0.3], "got 0 normal and 3 anomalous"),
        ([], [], "got 0 normal and 0 anomalous"),
        ([0, 1], [0.1, np.nan], "scores must be finite, got nan at index 1"),
        ([0, 1], [-np.inf, 1.0], "scores must be finite, got -inf at index 0"),
        ([0, 2], [0.1, 0.2], "labels must be bool or hold only 0 and 1, got 2"),
        ([0, 1], [0.1, 0.2, 0.3], r"labels and scores must have one shape, got \(2,\) and \(3,\)"),
        ([0, 1], ["a", "b"], "scores must hold real numbers"),
    ],
)
def test_errors(metric, labels, scores, message):
    with pytest.raises(ValueError, match=message):
        metric(labels, scores)


@pytest.mark.parametrize("tpr", [0.0, -0.1, 1.01, float("nan")])
def test_tpr_out_of_range(tpr):
    with pytest.raises(ValueError, match=r"tpr must be in \(0, 1\]"):
        fpr_at_tpr([0, 1], [0.1, 0.2], tpr=tpr)


def test_large_counts_do_not_overflow():
    # 3e5 x 3e5 pairs, twice, is beyond 32 bits
    scores = np.arange(600_000, dtype=np.float64)
    assert image_auroc(scores % 2, scores) == pytest.approx(0.5 + 0.5 / 300_000, abs=1e-12)

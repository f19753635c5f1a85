"""All metrics at once: names, order, undefined values."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from sklearn import metrics as reference

from mmad_cli.metrics import (
    METRIC_KEYS,
    METRICS_VERSION,
    VALIDATION_KEYS,
    all_metrics,
    aupro,
    aupro_exact,
    f1_max,
    fpr_at_tpr,
    image_auroc,
    pixel_auroc,
    threshold_at_fpr,
)

# Names and order that files and reports rely on
KEYS = [
    *("i_auroc", "i_ap", "i_f1max", "i_fpr95"),
    *("p_auroc", "p_ap", "p_f1max", "p_fpr95"),
    *("aupro_30", "aupro_10", "aupro_05", "aupro_01"),
    *("aupro_30_grid100", "aupro_30_grid99", "aupro_10_grid99", "aupro_05_grid99", "aupro_01_grid99"),
]


@pytest.fixture
def category(random_case):
    masks, maps = random_case(21, count=12, size=20)
    masks[:4] = False
    return masks.any(axis=(1, 2)).astype(int), maps.max(axis=(1, 2)), masks, maps


def test_keys():
    assert list(METRIC_KEYS) == KEYS
    assert isinstance(METRICS_VERSION, int)


def test_threshold_that_few_good_scores_exceed():
    scores = np.random.default_rng(0).permutation(1000) / 1000
    threshold = threshold_at_fpr(scores)
    assert (scores > threshold).mean() == 0.005
    assert threshold in scores
    # too few for half a percent: none may exceed it
    assert threshold_at_fpr([3, 1, 2]) == 3
    # equal scores are on one side together
    assert threshold_at_fpr([1, 1, 1, 1], 0.5) == 1
    with pytest.raises(ValueError, match="normal_scores"):
        threshold_at_fpr([])
    with pytest.raises(ValueError, match="normal_scores"):
        threshold_at_fpr([np.nan])
    with pytest.raises(ValueError, match="fpr"):
        threshold_at_fpr([1], 1.0)


def test_rates_at_the_threshold_of_validation_images(category):
    labels, scores, masks, maps = category
    good = np.sort(scores[labels == 0])
    result = all_metrics(*category, validation_scores=good[:2])
    assert list(result.values) == [*KEYS, *VALIDATION_KEYS]
    assert result.values["i_fpr_val"] == (scores[labels == 0] > good[1]).mean()
    assert result.values["i_tpr_val"] == (scores[labels == 1] > good[1]).mean()
    without = all_metrics(*category, validation_scores=[])
    assert without.values["i_fpr_val"] is None
    assert without.reasons == dict.fromkeys(VALIDATION_KEYS, "no validation image")
    alone = all_metrics(labels[:4] * 0, scores[:4], masks[:4], maps[:4], validation_scores=good)
    assert alone.reasons["i_tpr_val"] == "no anomalous test image"


def test_every_value_equals_its_own_function(category):
    labels, scores, masks, maps = category
    result = all_metrics(*category)
    assert list(result.values) == KEYS
    assert result.reasons == {}
    expected = [
        image_auroc(labels, scores),
        reference.average_precision_score(labels, scores),
        f1_max(labels, scores),
        fpr_at_tpr(labels, scores, 0.95),
        pixel_auroc(masks, maps),
        reference.average_precision_score(masks.ravel(), maps.ravel()),
        f1_max(masks, maps),
        fpr_at_tpr(masks, maps, 0.95),
        *aupro_exact(masks, maps, [0.3, 0.1, 0.05, 0.01]),
        aupro(masks, maps, 0.3, 100),
        *(aupro(masks, maps, limit, 99) for limit in (0.3, 0.1, 0.05, 0.01)),
    ]
    np.testing.assert_allclose(list(result.values.values()), expected, rtol=0, atol=1e-12)
    assert all(type(value) is float for value in result.values.values())


def test_no_anomalous_image(category):
    labels, scores, masks, maps = (part[:4] for part in category)
    result = all_metrics(labels, scores, masks, maps)
    assert list(result.values) == KEYS
    assert set(result.values.values()) == {None}
    assert result.reasons["i_auroc"] == "no anomalous test image"
    assert result.reasons["aupro_30"] == "no defect pixel in any mask"
    assert set(result.reasons) == set(KEYS)


def test_no_normal_image(category):
    labels, scores, masks, maps = (part[4:] for part in category)
    result = all_metrics(labels, scores, masks, maps)
    assert result.reasons == dict.fromkeys(KEYS[:4], "no normal test image")
    assert result.values["i_auroc"] is None
    assert result.values["aupro_30"] == pytest.approx(aupro(masks, maps), abs=1e-12)


def test_all_masks_vanished(category):
    labels, scores, masks, maps = category
    result = all_metrics(labels, scores, masks & False, maps)
    assert result.values["i_auroc"] == pytest.approx(image_auroc(labels, scores), abs=1e-12)
    assert result.reasons == dict.fromkeys(KEYS[4:], "no defect pixel in any mask")


def test_no_normal_pixel():
    result = all_metrics([0, 1], [0.1, 0.9], np.ones((2, 2, 2), dtype=bool), np.ones((2, 2, 2)))
    assert result.reasons["p_auroc"] == "no normal pixel in any mask"
    assert result.values["i_auroc"] == 1.0


def test_no_image():
    result = all_metrics([], [], [], [])
    assert set(result.reasons.values()) == {"no test image"}
    assert set(result.reasons) == set(KEYS)


def test_own_maps_for_aupro(category):
    labels, scores, masks, maps = category
    other = maps + 10 * masks
    result = all_metrics(labels, scores, masks, maps, aupro_maps=other)
    assert result.values["aupro_30"] == 1.0
    assert result.values["p_auroc"] == pytest.approx(pixel_auroc(masks, maps), abs=1e-12)


def test_images_of_different_size(category):
    labels, scores, masks, maps = category
    ragged = [m[: 10 + i] for i, m in enumerate(masks[:10])], [s[: 10 + i] for i, s in enumerate(maps[:10])]
    result = all_metrics(labels[:10], scores[:10], *ragged)
    flat = [np.concatenate([image.ravel() for image in images]) for images in ragged]
    assert result.values["p_auroc"] == pytest.approx(reference.roc_auc_score(*flat), abs=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [0, 1]}, "labels and scores must have one shape"),
        ({"labels": [0, 1], "image_scores": [0.1, 0.2]}, "labels and masks must have one length, got 2 and 12"),
        ({"image_scores": np.full(12, np.nan)}, "scores must be finite"),
        ({"maps": np.full((12, 20, 20), np.nan)}, "maps must be finite"),
        ({"maps": np.zeros((12, 20, 19))}, "equal shapes"),
        ({"masks": np.full((12, 20, 20), 255)}, "hold only 0 and 1, got 255"),
    ],
)
def test_errors(category, change, message):
    arguments = dict(zip(("labels", "image_scores", "masks", "maps"), category, strict=True)) | change
    with pytest.raises(ValueError, match=message):
        all_metrics(**arguments)


def test_heavy_libraries_stay_out():
    code = (
        "import sys, mmad_cli.metrics;"
        "sys.exit(', '.join({'torch', 'sklearn', 'skimage', 'pandas', 'open3d'} & set(sys.modules)))"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.stderr.strip() == ""

"""Values of the published codes, to 1e-6."""

from __future__ import annotations

import numpy as np
import pytest

from mmad_cli.metrics import all_metrics, aupro_exact, aupro_grid, image_auroc, pixel_auroc, pro_curve
from mmad_cli.metrics.pro import trapezoid_areas
from mmad_cli.metrics.ranking import label_regions, rank_pixels

TOLERANCE = {"rtol": 0, "atol": 1e-6}
M3DM_CASES = ("maps64", "ties64", "easy64")
MAPPING_CASES = ("continuous", "ties", "separable", "zero_background", "large")


@pytest.fixture(params=M3DM_CASES)
def m3dm(request, golden_m3dm):
    return {name.split("/")[1]: array for name, array in golden_m3dm.items() if name.startswith(request.param + "/")}


@pytest.fixture(params=MAPPING_CASES)
def mapping(request, golden_mapping, mapping_case):
    masks, maps = mapping_case(request.param)
    start = request.param + "/"
    golden = {name.split("/")[1]: array for name, array in golden_mapping.items() if name.startswith(start)}
    return golden | {"gt": masks, "maps": maps}


@pytest.mark.parametrize("thresholds", [100, 300])
def test_m3dm_aupro(m3dm, thresholds):
    values = aupro_grid(m3dm["gt"], m3dm["maps"], list(m3dm["limits"]), thresholds)
    np.testing.assert_allclose(values, m3dm[f"aupro_t{thresholds}"], **TOLERANCE)


def test_m3dm_curve(m3dm):
    rate, overlap = pro_curve(m3dm["gt"], m3dm["maps"], grid=100)
    np.testing.assert_allclose(rate, m3dm["curve_fpr"], **TOLERANCE)
    np.testing.assert_allclose(overlap, m3dm["curve_pro"], **TOLERANCE)


def test_m3dm_auroc(m3dm):
    assert pixel_auroc(m3dm["gt"], m3dm["maps"]) == pytest.approx(float(m3dm["pixel_rocauc"]), abs=1e-6)
    value = image_auroc(m3dm["image_labels"], m3dm["image_scores"])
    assert value == pytest.approx(float(m3dm["image_rocauc"]), abs=1e-6)


def test_m3dm_component_counts(m3dm):
    counts = [label_regions(mask.astype(bool))[1] for mask in m3dm["gt"]]
    np.testing.assert_array_equal(counts, m3dm["n_components"])
    assert rank_pixels(m3dm["gt"], m3dm["maps"]).n_regions == m3dm["n_components"].sum()


def test_m3dm_summary(m3dm):
    result = all_metrics(m3dm["image_labels"], m3dm["image_scores"], m3dm["gt"], m3dm["maps"])
    assert not result.reasons
    assert result.values["aupro_30_grid100"] == pytest.approx(m3dm["aupro_t100"][0], abs=1e-6)
    assert result.values["p_auroc"] == pytest.approx(float(m3dm["pixel_rocauc"]), abs=1e-6)
    assert result.values["i_auroc"] == pytest.approx(float(m3dm["image_rocauc"]), abs=1e-6)


@pytest.mark.parametrize(("case", "tolerance"), [("maps64", 2e-3), ("easy64", 2e-3)])
def test_grid_and_exact_agree_without_ties(golden_m3dm, case, tolerance):
    masks, maps = golden_m3dm[f"{case}/gt"], golden_m3dm[f"{case}/maps"]
    exact = aupro_exact(masks, maps, [0.3])[0]
    assert exact == pytest.approx(golden_m3dm[f"{case}/aupro_t300"][0], abs=tolerance)
    assert exact != golden_m3dm[f"{case}/aupro_t300"][0]


@pytest.mark.parametrize("thresholds", [99, 300])
def test_mapping_aupro(mapping, thresholds):
    values = aupro_grid(mapping["gt"], mapping["maps"], list(mapping["au_pro_limits"]), thresholds)
    np.testing.assert_allclose(values, mapping[f"au_pro_{thresholds}"], **TOLERANCE)


@pytest.mark.parametrize("thresholds", [99, 300])
def test_mapping_curve(mapping, thresholds):
    rate, overlap = pro_curve(mapping["gt"], mapping["maps"], grid=thresholds)
    np.testing.assert_allclose(rate, mapping[f"fpr_{thresholds}"], **TOLERANCE)
    np.testing.assert_allclose(overlap, mapping[f"pro_{thresholds}"], **TOLERANCE)


def test_mapping_thresholds(mapping):
    pixels = rank_pixels(mapping["gt"], mapping["maps"])
    assert len(pixels.normal) == mapping["ok_pixels"]
    ranks = np.linspace(0, len(pixels.normal) - 1, 99).astype(int)[::-1]
    np.testing.assert_array_equal(pixels.normal[ranks], mapping["thr_99"][:-1].astype(np.float32))


def test_mapping_whole_area(mapping):
    value = aupro_grid(mapping["gt"], mapping["maps"], [1.0], 99)
    np.testing.assert_allclose(value, mapping["au_pro_limit_1.0"], **TOLERANCE)


def test_mapping_auroc(mapping):
    assert pixel_auroc(mapping["gt"], mapping["maps"]) == pytest.approx(float(mapping["p_auroc"]), abs=1e-6)
    value = image_auroc(mapping["image_labels"], mapping["image_scores"])
    assert value == pytest.approx(float(mapping["i_auroc"]), abs=1e-6)


def test_mapping_components(mapping):
    labelled = [label_regions(mask)[0] for mask in mapping["gt"]]
    sizes = np.concatenate([np.bincount(labels.ravel())[1:] for labels in labelled])
    assert len(sizes) == mapping["components"]
    np.testing.assert_array_equal(np.sort(sizes), np.sort(mapping["component_sizes"]))


def test_mapping_summary(mapping):
    values = all_metrics(mapping["image_labels"], mapping["image_scores"], mapping["gt"], mapping["maps"]).values
    keys = ("aupro_30_grid99", "aupro_10_grid99", "aupro_05_grid99", "aupro_01_grid99")
    np.testing.assert_allclose([values[key] for key in keys], mapping["au_pro_99"], **TOLERANCE)


@pytest.mark.parametrize("case", range(4))
def test_trapezoid(golden_mapping, case):
    x, y, x_max, area = (golden_mapping[f"trapezoid/{case}/{name}"] for name in ("x", "y", "x_max", "area"))
    limit = x[-1] if np.isnan(x_max) else x_max
    np.testing.assert_allclose(trapezoid_areas(x, y, [limit]), [area], **TOLERANCE)


def test_one_percent_limit_of_99_thresholds_is_one_trapezoid(mapping):
    """CFM's AUPRO at 1 % weighs the overlap at rate 0 and at the next grid rate about half each."""
    rate, overlap = pro_curve(mapping["gt"], mapping["maps"], grid=99)
    share = 0.01 / rate[1] / 2
    value = aupro_grid(mapping["gt"], mapping["maps"], [0.01], 99)[0]
    assert value == pytest.approx((1 - share) * overlap[0] + share * overlap[1], abs=1e-9)
    assert share == pytest.approx(0.49, abs=2e-3)

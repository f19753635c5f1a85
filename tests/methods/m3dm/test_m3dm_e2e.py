"""Whole runs against the published code's, on stand-in weights and 13 generated scans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmad_cli.memory import coreset, patch_distances
from mmad_cli.methods import build_config, get_method
from mmad_cli.methods.checks import GeneratedFeatures, GeneratedSample
from mmad_cli.methods.m3dm.dlf import DecisionFusion
from mmad_cli.metrics import aupro, image_auroc, pixel_auroc

pytestmark = pytest.mark.slow

TRAIN = 5
LABELS = np.array([0, 0, 0, 1, 1, 1, 1, 1])
THREE = "dino+point_mae+fusion"
GOLDEN_NAMES = {"points": "xyz", "rgb": "rgb", "fused": "fusion"}
# file -> variant and settings; the point network ran in evaluation mode, every projection from seed 0
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "dino_single": ("dino", {}),
    "pointmae_single": ("point_mae", {}),
    "pointmae_single_rmzero": ("point_mae", {"rm_zero_for_project": True}),
    "fusion_uff_single": ("fusion", {}),
    "double_multiple": ("dino+point_mae", {}),
    "double_add_multiple": ("dino+point_mae+add", {}),
    "triple_uff_multiple": (THREE, {}),
    "triple_uff_asy2": (THREE, {"asy_memory_bank": 2}),
    "triple_uff_pointbert": (THREE, {"point_backbone": "point_bert"}),
    "triple_uff_g64n256": (THREE, {"groups": 256, "group_size": 64}),
}

# the other runs differ from these in what comes before the selection, which the stored picks test
OWN_PICKS = [name for name in RUNS if not name.startswith("triple") or name == "triple_uff_multiple"]

Golden = Callable[[str], dict[str, np.ndarray]]


@pytest.fixture
def run(
    golden_samples: Callable[..., list[GeneratedSample]],
    weights: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[Any, list[GeneratedSample]]]:
    """Fits a variant on the golden training scans; returns the method and the test samples."""

    def make(variant: str, settings: dict[str, Any]) -> tuple[Any, list[GeneratedSample]]:
        definition = get_method("m3dm")
        official = {"point_bn": "eval", "random_state": 0, **settings}
        method = definition.build(build_config(definition, variant, "official", official), "cpu")
        samples = golden_samples(method)
        monkeypatch.setenv("MMAD_WEIGHTS", str(weights("m3dm_uff")))
        method.fit(GeneratedFeatures(samples[:TRAIN]), GeneratedFeatures([]), seed=0)
        return method, samples[TRAIN:]

    return make


def published_picks(monkeypatch: pytest.MonkeyPatch, expected: dict[str, np.ndarray]) -> None:
    """Take the rows that the published code selected, in the order of its banks."""
    picks = iter([expected[f"coreset{i}_idx"] for i in range(3) if f"coreset{i}_idx" in expected])

    def stored(rows: Any, count: int, *others: Any) -> np.ndarray:
        selected = next(picks).astype(np.int64)
        assert len(selected) == count
        assert selected.max() < len(rows)
        return selected

    monkeypatch.setattr(coreset, "greedy_coreset", stored)


def maxima_before_blur(method: Any, sample: GeneratedSample) -> list[float]:
    """Largest patch distance per bank: what the 256 levels of the published blur are relative to."""
    return [
        float(patch_distances(method.banks_[name].normalise(rows), method.banks_[name].index)[0].max())
        for name, (rows, _) in method._patches(sample).items()
    ]


def check_maps(method: Any, samples: Sequence[GeneratedSample], maps: list[np.ndarray], expected: np.ndarray) -> None:
    """Maps agree within two 8-bit steps: of a bank's maximum, weighted as the maps are joined."""
    weight = np.ones(len(method.config.parts))
    if method.fusion_ is not None:
        weight = method.fusion_.pixel * [method.config.map_lambda(name) for name in method.config.parts]
    for sample, ours, published in zip(samples, maps, expected, strict=True):
        step = float(weight @ maxima_before_blur(method, sample)) / 255
        assert np.abs(ours[::8, ::8] - published).max() <= 2 * step


@pytest.mark.parametrize("name", RUNS)
def test_published_run_with_its_picks(
    golden: Golden, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    expected, at = golden(f"e2e/{name}"), golden("e2e")["map_samples"]
    published_picks(monkeypatch, expected)
    method, test = run(*RUNS[name])
    for bank in method.config.parts:
        which = "" if len(method.config.parts) == 1 else f"_{GOLDEN_NAMES[bank]}"
        assert list(method.banks_[bank].rows_.shape) == expected[f"patch{which}_lib_shape"].tolist()
        if f"norm{which}_mean" in expected:
            assert method.banks_[bank].mean_ == pytest.approx(float(expected[f"norm{which}_mean"]), abs=1e-6)
            assert method.banks_[bank].std_ == pytest.approx(float(expected[f"norm{which}_std"]), rel=1e-5)
    predictions = [method.predict(sample) for sample in test]
    scores = [prediction.image_score for prediction in predictions]
    np.testing.assert_allclose(scores, expected["image_scores"].ravel(), rtol=1e-3)
    check_maps(method, [test[i] for i in at], [predictions[i].anomaly_map for i in at], expected["map"])


@pytest.mark.parametrize("name", OWN_PICKS)
def test_published_metrics_with_own_picks(
    golden: Golden, run: Callable[..., Any], golden_masks: np.ndarray, name: str
) -> None:
    expected = golden(f"e2e/{name}")
    method, test = run(*RUNS[name])
    predictions = [method.predict(sample) for sample in test]
    maps = np.stack([prediction.anomaly_map for prediction in predictions])
    scores = np.array([prediction.image_score for prediction in predictions])
    assert image_auroc(LABELS, scores) == pytest.approx(float(expected["image_rocauc"]), abs=0.02)
    assert pixel_auroc(golden_masks, maps) == pytest.approx(float(expected["pixel_rocauc"]), abs=0.02)
    assert aupro(golden_masks, maps, 0.3, 100) == pytest.approx(float(expected["au_pro"]), abs=0.02)


def test_published_run_without_a_selection(golden: Golden, run: Callable[..., Any]) -> None:
    """All rows kept: each bank's score, and the joined result with the published weights.

    Training samples lie in the banks and score exactly 0 here. The published distances of equal vectors are rounding
    noise of about 0.01, from which its weights were learned, so the weights themselves cannot be compared.
    """
    expected, at = golden("e2e/triple_uff_nocoreset"), golden("e2e")["map_samples"]
    with pytest.warns(UserWarning, match="fixed weights"):
        method, test = run(THREE, {"coreset_fraction": 1.0})
    assert [size.rows for size in method.banks().values()] == [15681, 3920, 15680]
    method.fusion_ = DecisionFusion(expected["detect_coef"], expected["seg_coef"])
    chosen = [test[i] for i in at]
    for i, sample in zip(at, chosen, strict=True):
        raw = [score.image_score for score in method.bank_scores(sample)]
        np.testing.assert_allclose(raw, expected["raw_s_test"][i], rtol=1e-3)
        image_row = np.array([method.config.image_lambda(name) for name in method.config.parts]) * raw
        joined = method.fusion_.image_score(image_row)
        assert joined == pytest.approx(float(expected["image_scores"].ravel()[i]), rel=1e-3)
    maps = [method.predict(sample).anomaly_map for sample in chosen]
    check_maps(method, chosen, maps, expected["map"])

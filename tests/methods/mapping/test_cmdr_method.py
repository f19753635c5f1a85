"""CMDR-IAD as a method: variants, switches, a missing modality, and maps of chunks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from mmad_cli.errors import DataError
from mmad_cli.methods.base import Prediction
from mmad_cli.methods.checks import GeneratedFeatures, GeneratedSample, generated_sample
from mmad_cli.methods.cmdr_iad.config import RGB_SMOOTHING, CmdrIadConfig
from mmad_cli.methods.cmdr_iad.inference import errors, fuse
from mmad_cli.methods.cmdr_iad.method import DEFINITION, CmdrIad, nearest
from mmad_cli.methods.mapping.scoring import at_map_size, scaled, smooth

SMALL: dict[str, Any] = {"grid": 16, "epochs": 1}


def samples(method: CmdrIad, split: str, count: int) -> list[GeneratedSample]:
    return [generated_sample(method.features(), f"{split}/good/{i:03d}") for i in range(count)]


def fitted(**settings: Any) -> CmdrIad:
    method = CmdrIad(CmdrIadConfig(**{**SMALL, **settings}))
    method.fit(GeneratedFeatures(samples(method, "train", 2)), GeneratedFeatures([]), seed=0)
    return method


@pytest.fixture(scope="module")
def both() -> CmdrIad:
    return fitted()


def test_published_settings() -> None:
    config = CmdrIadConfig()
    assert (config.epochs, config.batch_size, config.rate, config.optimiser) == (50, 1, 1e-3, "adam")
    assert (config.fps_start, config.fps_skip_origin, config.trainer().non_finite) == ("random", False, "skip")
    chunks = CmdrIadConfig(variant="polyurethane")
    assert (chunks.epochs, chunks.batch_size, chunks.optimiser, chunks.weight_decay) == (50, 4, "adamw", 0.01)
    assert (chunks.groups, chunks.group_size, chunks.grid) == (96, 32, 96)
    assert CmdrIadConfig(variant="polyurethane", batch_size=2).batch_size == 2


@pytest.mark.parametrize(
    ("settings", "streams", "networks"),
    [
        ({"variant": "rgb+3d"}, {"rgb", "points"}, 4),
        ({"variant": "rgb"}, {"rgb", "points"}, 1),
        ({"variant": "rgb", "rgb_mask": "none"}, {"rgb"}, 1),
        ({"variant": "3d"}, {"points"}, 1),
        ({"variant": "polyurethane"}, {"points"}, 1),
    ],
)
def test_variant_reads_what_it_needs(settings: dict[str, Any], streams: set[str], networks: int) -> None:
    method = CmdrIad(CmdrIadConfig(**{**settings, "grid": 16}))
    assert set(method.features()) == streams
    with torch.device("meta"):
        assert len(method.build_learner({"rgb": 6, "points": 6}).networks) == networks


def test_point_features_are_asked_for_as_published() -> None:
    params = CmdrIad(CmdrIadConfig()).features()["points"].params
    assert (params["fps_start"], params["fps_skip_origin"], params["size"]) == ("random", False, 224)
    chunk = CmdrIad(CmdrIadConfig(variant="polyurethane"))
    assert chunk.features()["points"].params["size"] == 96
    assert (chunk.reader.cloud_size, chunk.reader.side) == (96, 96)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"grid": 20}, "grid"), ({"points_smoothing": (4,)}, "points_smoothing"), ({"dropout": 1.0}, "dropout")],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        CmdrIadConfig(**settings)
    if named == "grid":
        # the RGB decoder alone takes any grid
        assert CmdrIadConfig(variant="rgb", grid=20).grid == 20


def test_errors_are_joined_at_map_size(both: CmdrIad) -> None:
    features = both.reader(samples(both, "test", 1)[0])
    found = errors(both.learner_.networks, features.rgb, features.points, features.valid)  # type: ignore[attr-defined]
    maps = {name: at_map_size(error.view(16, 16).numpy()) for name, error in found.items()}
    valid = np.repeat(np.repeat(features.valid.view(16, 16).numpy(), 14, axis=0), 14, axis=1)
    joined = both.errors(both.learner_, features)
    np.testing.assert_allclose(joined, fuse(maps, valid).fused)
    assert joined.shape == (224, 224) and (joined[~valid] == 0).all() and joined.any()


def test_errors_from_tokens_are_those_from_features(both: CmdrIad) -> None:
    """Also where a pixel has point features that sum to zero."""
    sample = samples(both, "test", 1)[0]
    tokens = both.reader.tokens(sample)
    dense = both.errors(both.learner_, both.reader.assemble(tokens))
    np.testing.assert_allclose(both.sample_errors(both.learner_, tokens), dense, atol=1e-4 * dense.max())
    assert tokens.points is not None
    tokens.points[:40] = 0
    tokens.points[:40, :2] = [1, -1]
    dense = both.errors(both.learner_, both.reader.assemble(tokens))
    assert (dense == 0).sum() > (both.errors(both.learner_, both.reader(sample)) == 0).sum()
    np.testing.assert_allclose(both.sample_errors(both.learner_, tokens), dense, atol=1e-4 * dense.max())


def without(sample: GeneratedSample, feature: str) -> GeneratedSample:
    return GeneratedSample(sample.id, {name: arrays for name, arrays in sample.arrays.items() if name != feature})


def test_sample_without_points_is_scored_by_its_image(both: CmdrIad) -> None:
    sample = samples(both, "test", 1)[0]
    found = both.predict(without(sample, "points"))
    assert found.note == "scored by RGB alone, 3D is missing"
    empty = {name: array[:0] for name, array in sample["points"].items()}
    same(both.predict(GeneratedSample(sample.id, {**sample.arrays, "points": empty})), found)
    image = CmdrIad(CmdrIadConfig(**SMALL, variant="rgb", rgb_mask="none")).reader(sample)
    decoder = {"rgb_decoder": both.learner_.networks["rgb_decoder"]}  # type: ignore[attr-defined]
    error = errors(decoder, image.rgb, None, image.valid)["rgb_decoder"].view(16, 16).numpy()
    same(found, scaled(smooth(at_map_size(error), RGB_SMOOTHING)))


def test_sample_without_image_is_scored_by_its_points(both: CmdrIad) -> None:
    sample = samples(both, "test", 1)[0]
    found = both.predict(without(sample, "rgb"))
    assert found.note == "scored by 3D alone, RGB is missing"
    cloud = CmdrIad(CmdrIadConfig(**SMALL, variant="3d")).reader(sample)
    decoder = {"point_decoder": both.learner_.networks["point_decoder"]}  # type: ignore[attr-defined]
    error = errors(decoder, None, cloud.points, cloud.valid)["point_decoder"].view(16, 16).numpy()
    same(found, scaled(at_map_size(error).astype(np.float64)))


def same(found: Prediction, expected: Prediction) -> None:
    np.testing.assert_allclose(found.anomaly_map, expected.anomaly_map, rtol=1e-5, atol=1e-6)
    assert found.image_score == pytest.approx(expected.image_score)


def test_sample_with_both_or_none_is_treated_as_ever(both: CmdrIad) -> None:
    sample = samples(both, "test", 1)[0]
    whole = both.predict(sample)
    assert not whole.note
    other = CmdrIad(CmdrIadConfig(**SMALL, missing_modality="error"))
    other.learner_, other._trained_channels = both.learner_, both._trained_channels
    same(other.predict(sample), whole)
    with pytest.raises(DataError, match=sample.id):
        both.predict(without(without(sample, "rgb"), "points"))
    for feature in ("rgb", "points"):
        with pytest.raises(DataError, match=sample.id):
            other.predict(without(sample, feature))
    assert both.drops_missing and not other.drops_missing
    assert not CmdrIad(CmdrIadConfig(variant="rgb")).drops_missing


def test_switches_of_the_figure_change_smoothing_and_score(both: CmdrIad) -> None:
    sample = samples(both, "test", 1)[0]
    joined = both.errors(both.learner_, both.reader(sample))
    plain = both.scored(joined)
    figure = CmdrIad(CmdrIadConfig(**SMALL, image_score="mean", final_smoothing="figure")).scored(joined)
    smoothed = smooth(joined, RGB_SMOOTHING)
    assert figure.image_score == pytest.approx(smoothed.max() / smoothed[smoothed > 0].mean(), rel=1e-5)
    assert plain.image_score != pytest.approx(figure.image_score, rel=1e-2)


def test_points_alone_are_not_smoothed_unless_asked_for() -> None:
    error = np.zeros((224, 224))
    error[100, 100] = 1.0
    raw = CmdrIad(CmdrIadConfig(variant="3d")).scored(error)
    assert np.count_nonzero(raw.anomaly_map) == 1
    softened = CmdrIad(CmdrIadConfig(variant="3d", points_smoothing=(5,))).scored(error)
    assert np.count_nonzero(softened.anomaly_map) == 25


def test_map_of_a_chunk_keeps_its_values() -> None:
    """Pixels are repeated as those of the ground truth are, so nothing is interpolated."""
    error = np.random.default_rng(0).random((96, 96))
    found = CmdrIad(CmdrIadConfig(variant="polyurethane")).scored(error)
    smoothed = smooth(error, (5,))
    expected = smoothed / (np.sqrt(smoothed.mean()) + 1e-6)
    assert found.image_score == pytest.approx(expected.max())
    assert found.aupro_scale == 1.0 and found.anomaly_map.shape == (224, 224)
    np.testing.assert_allclose(np.unique(found.anomaly_map), np.unique(expected.astype(np.float32)))


def test_nearest_takes_the_pixel_under_the_middle() -> None:
    np.testing.assert_array_equal(nearest(np.array([[1, 2], [3, 4]]), 3)[0], [1, 2, 2])
    np.testing.assert_array_equal(nearest(np.eye(4), 4), np.eye(4))


def test_memory_estimate_names_the_decoders() -> None:
    whole, small = (CmdrIad(CmdrIadConfig(grid=grid)).memory_estimate(10) for grid in (224, 56))
    assert whole > small > 0


def test_definition() -> None:
    assert set(DEFINITION.recipes) == {"official", "corrected", "fast"}
    assert DEFINITION.protocol == "cfm"

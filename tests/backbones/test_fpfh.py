from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmad_cli.backbones import Backbone, FeatureSpec, create
from mmad_cli.backbones import fpfh as module
from mmad_cli.backbones.fpfh import point_histograms, point_normals
from mmad_cli.errors import DataError
from mmad_cli.types import Sample

GoldenSample = Callable[[int], Sample]


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    with np.load(Path(__file__).parent.parent / "golden" / "btf_fpfh.npz") as arrays:
        return {name: arrays[name] for name in arrays.files if name.startswith("fpfh/")}


def _cloud(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    pixel = np.flatnonzero((sample.xyz != 0).all(axis=-1))
    return sample.xyz.reshape(-1, 3)[pixel], pixel


def _two_parts(distance: float) -> np.ndarray:
    """Two patches of a curved surface, `distance` metres apart."""
    random = np.random.default_rng(3)
    plane = random.uniform(-0.01, 0.01, (150, 2))
    patch = np.column_stack([plane, 0.5 + 20 * (plane**2).sum(axis=1)])
    return np.concatenate([patch, patch[:60] + np.array([distance, 0, 0])])


def test_normals_and_histograms_equal_the_published_code(golden_sample: GoldenSample, golden: dict[str, Any]) -> None:
    points, pixel = _cloud(golden_sample(0))
    assert len(points) == int(golden["fpfh/n_points"])
    rows = np.searchsorted(pixel, golden["fpfh/probe_pixel"])
    normals = point_normals(points)
    np.testing.assert_allclose(normals[rows], golden["fpfh/probe_normals"], rtol=0, atol=1e-6)
    histograms = point_histograms(points, normals)
    np.testing.assert_allclose(histograms[rows], golden["fpfh/probe"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(histograms.mean(axis=0), golden["fpfh/mean"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(histograms.std(axis=0), golden["fpfh/std"], rtol=1e-6, atol=1e-6)


def test_backbone_gives_points_in_raster_order(golden_sample: GoldenSample, golden: dict[str, Any]) -> None:
    backbone = create(FeatureSpec.fpfh())
    assert isinstance(backbone, Backbone)
    (features,) = backbone.extract([golden_sample(0)])
    _, pixel = _cloud(golden_sample(0))
    np.testing.assert_array_equal(features["pixel"], pixel)
    assert features["pixel"].dtype == np.int32
    assert features["points"].dtype == np.float32
    rows = np.searchsorted(pixel, golden["fpfh/probe_pixel"])
    np.testing.assert_allclose(features["points"][rows], golden["fpfh/probe"], rtol=1e-6, atol=1e-6)


def test_each_angle_has_its_share_of_the_histogram(golden_sample: GoldenSample) -> None:
    points, _ = _cloud(golden_sample(5))
    histograms = point_histograms(points[::8], point_normals(points[::8]))
    np.testing.assert_allclose(histograms.reshape(-1, 3, 11).sum(axis=2), 200, rtol=1e-9)


def test_both_searches_agree_where_the_radius_does_not_bind(golden_sample: GoldenSample) -> None:
    points = np.asarray(_cloud(golden_sample(9))[0][::2], dtype=np.float64)
    normals = point_normals(points)
    np.testing.assert_array_equal(
        module._histograms_nearest(points, normals, 100), module._histograms_hybrid(points, normals, 0.25, 100)
    )


@pytest.mark.parametrize(("distance", "hybrid_runs"), [(0.1, False), (1.0, True)])
def test_a_radius_that_binds_is_respected(distance: float, hybrid_runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = module._histograms_hybrid
    monkeypatch.setattr(module, "_histograms_hybrid", lambda *a: calls.append(1) or original(*a))
    points = _two_parts(distance)
    normals = point_normals(points, radius=0.05)
    ours = point_histograms(points, normals)
    assert bool(calls) == hybrid_runs
    np.testing.assert_array_equal(ours, original(points, normals, 0.25, 100))
    if hybrid_runs:
        # the smaller part has 60 points: without the radius its neighbourhoods would reach the other part
        assert not np.array_equal(ours, module._histograms_nearest(points, normals, 100))


def test_same_values_every_time(golden_sample: GoldenSample) -> None:
    first, second = create(FeatureSpec.fpfh()).extract([golden_sample(7), golden_sample(7)])
    assert first["points"].tobytes() == second["points"].tobytes()


def test_too_few_points_name_the_sample(golden_sample: GoldenSample) -> None:
    sample = golden_sample(0)
    xyz = np.zeros_like(sample.xyz)
    xyz[100, 100:129] = sample.xyz[100, 100:129]
    with pytest.raises(DataError, match=r"train/good/000: 29 valid 3D points"):
        create(FeatureSpec.fpfh()).extract([replace(sample, xyz=xyz)])


@pytest.mark.parametrize("shape", [(3,), (4, 2), (2, 4, 3)])
def test_wrong_shapes_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"points: expected shape \(n, 3\), got"):
        point_normals(np.ones(shape))
    with pytest.raises(ValueError, match="normals"):
        point_histograms(np.ones((5, 3)), np.ones((4, 3)))

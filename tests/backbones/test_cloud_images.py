from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mmad_cli.backbones import FeatureSpec, create
from mmad_cli.backbones.cloud_images import normal_image, relief_image, sample_bilinear, shaded_views
from mmad_cli.backbones.weights import import_file
from mmad_cli.errors import DataError
from mmad_cli.preprocessing.resize import valid_pixels
from mmad_cli.types import Sample

CNN = "resnet18.tv_in1k"


def test_images_are_within_0_and_1_and_black_where_there_is_no_point(golden_sample: Callable[[int], Sample]) -> None:
    xyz = golden_sample(0).xyz
    empty = ~valid_pixels(xyz)
    for image in (normal_image(xyz), relief_image(xyz)):
        assert image.shape == (3, 224, 224)
        assert image.dtype == np.float32
        assert image.min() >= 0
        assert image.max() <= 1
        assert image[:, ~empty].std() > 0.01
        assert not image[:, empty].any()


def test_relief_puts_the_quantiles_of_z_at_0_and_1(golden_sample: Callable[[int], Sample]) -> None:
    xyz = golden_sample(0).xyz
    valid = valid_pixels(xyz)
    low, high = np.quantile(xyz[valid, 2], [0.01, 0.99])
    expected = np.clip((xyz[valid, 2] - low) / (high - low), 0, 1)
    np.testing.assert_allclose(relief_image(xyz)[1][valid], expected, atol=1e-6)
    assert not relief_image(np.zeros_like(xyz)).any()


def test_views_hold_all_points_and_show_the_nearest(golden_sample: Callable[[int], Sample]) -> None:
    xyz = golden_sample(0).xyz
    views = shaded_views(xyz)
    assert len(views) == 27
    for view in views:
        assert view.at.min() >= 0
        assert view.at.max() <= 223
        x, y = np.round(view.at).astype(int).T
        # no point lies on the white background, and what is drawn is at most grey
        assert view.image[0][y, x].max() <= 0.5
    assert len({view.image.tobytes() for view in views}) == 27


def test_reading_a_map_is_pytorchs_bilinear_upsampling() -> None:
    small = np.random.default_rng(0).random((5, 14, 14), dtype=np.float32)
    large = torch.nn.functional.interpolate(torch.from_numpy(small)[None], size=224, mode="bilinear")[0].numpy()
    x, y = np.random.default_rng(1).integers(0, 224, (2, 500))
    np.testing.assert_allclose(sample_bilinear(small, np.stack([x, y], 1), 224), large[:, y, x].T, atol=1e-6)


@pytest.fixture
def network(tmp_path: Path, random_state: Callable[[str], dict[str, Any]]) -> None:
    save_file(random_state(CNN), tmp_path / "random.safetensors")
    import_file(CNN, tmp_path / "random.safetensors")


@pytest.mark.usefixtures("network")
def test_a_network_sees_normals_and_relief(golden_sample: Callable[[int], Sample]) -> None:
    sample = golden_sample(0)
    features = {
        kind: create(FeatureSpec.timm(CNN, input=kind, outputs=[2])).extract([sample])[0]["out2"]
        for kind in ("rgb", "normals", "relief", "depth")
    }
    assert all(one.shape == (128, 28, 28) for one in features.values())
    assert len({one.tobytes() for one in features.values()}) == 4


@pytest.mark.usefixtures("network")
def test_rendered_features_are_unit_averages_over_views(
    golden_sample: Callable[[int], Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = golden_sample(0)
    few = shaded_views(sample.xyz)[:2]
    monkeypatch.setattr("mmad_cli.backbones.timm_backbone.shaded_views", lambda _: few)
    backbone = create(FeatureSpec.timm(CNN, input="render", outputs=[1, 2]))
    (features,) = backbone.extract([sample])
    assert features["tokens"].shape == (3136, 192)
    assert features["grid"].tolist() == [56, 56]
    lengths = np.linalg.norm(features["tokens"], axis=1)
    assert lengths.max() <= 1 + 1e-5
    assert ((lengths > 0) == (lengths > 1e-3)).all()
    assert 0.1 < (lengths > 0).mean() < 0.9
    with pytest.raises(DataError, match=sample.id):
        backbone.extract([Sample(**{**sample.__dict__, "xyz": np.zeros_like(sample.xyz)})])

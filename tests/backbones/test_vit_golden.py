"""ViT-B/8 tokens against the published feature extractor of M3DM on stand-in weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mmad_cli.backbones import FeatureSpec, create
from mmad_cli.types import Sample

MODEL = "vit_base_patch8_224.dino"
STAIN = 10

pytestmark = pytest.mark.slow


def relative(ours: np.ndarray, expected: np.ndarray) -> float:
    assert ours.shape == expected.shape
    return float(np.abs(ours - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(("name", "index"), [("train0", 0), ("stain", STAIN)])
def test_published_tokens(
    golden: Callable[[str], dict[str, np.ndarray]],
    imported: Callable[..., None],
    golden_sample: Callable[[int], Sample],
    name: str,
    index: int,
) -> None:
    imported(MODEL, "vit_base_patch8_224_dino")
    backbone = create(FeatureSpec.timm(MODEL))
    seen: dict[str, np.ndarray] = {}
    network = backbone._network  # type: ignore[attr-defined]
    network.patch_embed.register_forward_pre_hook(lambda _, given: seen.update(input=given[0][0].numpy()))
    network.blocks[0].register_forward_pre_hook(lambda _, given: seen.update(tokens_in=given[0][0].numpy()))
    for number in (0, 3, 7, 11):
        network.blocks[number].register_forward_hook(
            lambda _, given, output, key=f"block{number}": seen.update({key: output[0].numpy()})
        )
    sample = golden_sample(index)
    assert (name == "stain") == (sample.defect == "stain")
    (features,) = backbone.extract([sample])

    expected = golden(f"vit/{name}")
    assert relative(seen["input"][:, ::16, ::16], expected["input_sub"]) < 1e-5
    for stage in ("tokens_in", "block0", "block3", "block7", "block11"):
        assert relative(seen[stage][::80, ::8], expected[stage]) < 1e-4
    tokens = features["tokens"]
    assert features["grid"].tolist() == [28, 28]
    maps = tokens.T.reshape(768, 28, 28)
    assert relative(maps[::64, ::2, ::2], expected["feat"]) < 1e-4
    assert relative(tokens.mean(axis=0), expected["feat_channel_mean"]) < 1e-4
    assert relative(tokens.std(axis=0, ddof=1), expected["feat_channel_std"]) < 1e-4
    doubled = maps.repeat(2, axis=1).repeat(2, axis=2).reshape(768, -1).T
    assert relative(doubled[::64, ::32], expected["patch56"]) < 1e-4

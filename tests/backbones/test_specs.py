from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mmad_cli.backbones import FeatureSpec
from mmad_cli.errors import UsageError


def test_defaults_are_filled_in_so_that_equal_meanings_are_equal() -> None:
    short = FeatureSpec.timm("resnet18.tv_in1k", outputs=[2, 3])
    long = FeatureSpec(
        backbone="timm",
        view="resize",
        input="rgb",
        params={"model": "resnet18.tv_in1k", "outputs": (2, 3), "norm": "imagenet", "size": 224},
    )
    assert short == long
    assert hash(short) == hash(long)
    assert json.dumps(short.canonical()) == json.dumps(long.canonical())


def test_how_the_cloud_is_resized_does_not_matter_to_an_image_feature() -> None:
    assert FeatureSpec.timm("a.b", outputs=[1], xyz_resize="center") == FeatureSpec.timm("a.b", outputs=[1])
    floor, center = (FeatureSpec.timm("a.b", input="depth", outputs=[1], xyz_resize=r) for r in ("floor", "center"))
    assert floor != center


@pytest.mark.parametrize(
    "change",
    [{"norm": "none"}, {"outputs": [3]}, {"precision": "bfloat16"}, {"size": 256}, {"view": "crop"}],
)
def test_every_setting_is_in_the_canonical_form(change: dict[str, object]) -> None:
    base: dict[str, object] = {"outputs": [2]}
    assert FeatureSpec.timm("a.b", **base).canonical() != FeatureSpec.timm("a.b", **{**base, **change}).canonical()


def test_fpfh_defaults_are_those_of_btf() -> None:
    spec = FeatureSpec.fpfh()
    assert spec.params == {
        "size": 224,
        "xyz_resize": "floor",
        "normal_radius": 0.1,
        "normal_neighbours": 30,
        "feature_radius": 0.25,
        "feature_neighbours": 100,
    }
    assert spec.weights_names() == []
    assert spec.libraries() == ("open3d",)


def test_timm_needs_its_model_as_weights() -> None:
    spec = FeatureSpec.timm("vit_base_patch8_224.dino")
    assert spec.weights_names() == ["vit_base_patch8_224.dino"]
    assert spec.libraries() == ("torch", "timm")
    assert FeatureSpec.timm("x.y", input="depth").params["norm"] == "none"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "tim", "input": "rgb"}, "did you mean 'timm'"),
        ({"backbone": "fpfh", "input": "rgb"}, "input must be xyz"),
        ({"backbone": "fpfh", "input": "xyz", "view": "crop"}, "view 'crop'"),
        ({"backbone": "timm", "input": "depth", "view": "crop", "params": {"model": "a"}}, "view 'crop'"),
        ({"backbone": "timm", "input": "rgb", "view": "crop", "params": {"model": "a", "size": 64}}, "224"),
        ({"backbone": "timm", "input": "rgb", "params": {}}, "model"),
        ({"backbone": "timm", "input": "rgb", "params": {"model": "a", "layers": 1}}, "layers"),
        ({"backbone": "timm", "input": "rgb", "params": {"model": "a", "outputs": [3, 2]}}, "ascending"),
        ({"backbone": "fpfh", "input": "xyz", "params": {"normal_radius": -1}}, "normal_radius"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        FeatureSpec(**arguments)  # type: ignore[arg-type]


def test_size_estimates() -> None:
    assert FeatureSpec.timm("resnet18.tv_in1k", outputs=[2, 3]).estimated_bytes() == 4 * (128 * 28**2 + 256 * 14**2)
    assert FeatureSpec.timm("vit_small_patch8_224.dino").estimated_bytes() == 4 * (784 * 384 + 2)
    assert FeatureSpec.fpfh().estimated_bytes() == 224 * 224 * 34 * 4


def test_importing_the_room_loads_no_network_library() -> None:
    code = (
        "import sys, mmad_cli.backbones, mmad_cli.backbones.weights as w; w.list_weights();"
        "from mmad_cli.backbones import FeatureSpec as F; F.fpfh(); F.timm('a.b', outputs=[2]).canonical();"
        "print([m for m in ('torch', 'timm', 'open3d', 'requests', 'safetensors.torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

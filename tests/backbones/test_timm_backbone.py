from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mmad_cli.backbones import Backbone, FeatureSpec, create, timm_backbone
from mmad_cli.backbones._timm import import_timm, torchvision_state
from mmad_cli.backbones.specs import TimmParams
from mmad_cli.backbones.timm_backbone import output_shapes
from mmad_cli.backbones.weights import import_file
from mmad_cli.errors import UsageError, WeightsError
from mmad_cli.types import Sample
from tests.pretended_cuda import pretended_cuda

RandomState = Callable[[str], dict[str, Any]]
GoldenSample = Callable[[int], Sample]
CNN = "resnet18.tv_in1k"
VIT = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
REGISTERS = "vit_small_patch14_reg4_dinov2.lvd142m"
ROTARY = "vit_small_patch16_dinov3.lvd1689m"
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@pytest.fixture
def install(tmp_path: Path, random_state: RandomState) -> Callable[..., dict[str, Any]]:
    """Put random weights of a model into the registry."""

    def run(name: str, drop: tuple[str, ...] = ()) -> dict[str, Any]:
        state = {key: value for key, value in random_state(name).items() if not drop or not key.startswith(drop)}
        save_file(state, tmp_path / "random.safetensors")
        import_file(name, tmp_path / "random.safetensors")
        return state

    return run


def _image(sample: Sample) -> torch.Tensor:
    return torch.from_numpy(sample.rgb.copy()).permute(2, 0, 1).float().div(255)


def _plain(name: str, state: dict[str, Any]) -> Any:
    # on no device first, because drawing initial values takes most of the time
    with torch.device("meta"):
        network = import_timm().create_model(name, pretrained=False)
    network.load_state_dict(state, strict=True, assign=True)
    return network.eval()


@torch.inference_mode()
def _stages(network: Any, x: torch.Tensor) -> dict[int, np.ndarray]:
    """Outputs of a ResNet by hand, without timm's feature extractor."""
    x = network.maxpool(network.act1(network.bn1(network.conv1(x))))
    stages = {}
    for index, layer in enumerate((network.layer1, network.layer2, network.layer3, network.layer4), start=1):
        x = layer(x)
        stages[index] = x[0].numpy()
    return stages


def test_cnn_outputs_equal_the_network(install: Any, golden_sample: GoldenSample) -> None:
    network = _plain(CNN, install(CNN))
    sample = golden_sample(3)
    backbone = create(FeatureSpec.timm(CNN, outputs=[2, 3]))
    assert isinstance(backbone, Backbone)
    (features,) = backbone.extract([sample])
    wanted = _stages(network, ((_image(sample) - MEAN) / STD)[None])
    assert set(features) == {"out2", "out3"}
    assert features["out2"].shape == (128, 28, 28)
    assert features["out3"].shape == (256, 14, 14)
    for index in (2, 3):
        assert features[f"out{index}"].dtype == np.float32
        np.testing.assert_allclose(features[f"out{index}"], wanted[index], rtol=1e-5, atol=1e-5)


def test_depth_is_z_three_times_and_not_normalised(install: Any, golden_sample: GoldenSample) -> None:
    network = _plain(CNN, install(CNN))
    sample = golden_sample(3)
    (features,) = create(FeatureSpec.timm(CNN, input="depth", outputs=[2])).extract([sample])
    z = torch.from_numpy(sample.xyz[..., 2].copy()).expand(1, 3, -1, -1)
    np.testing.assert_allclose(features["out2"], _stages(network, z)[2], rtol=1e-5, atol=1e-5)


def test_crop_view_is_patchcores(install: Any, golden_sample: GoldenSample) -> None:
    network = _plain(CNN, install(CNN))
    sample = golden_sample(3)
    (features,) = create(FeatureSpec.timm(CNN, view="crop", outputs=[2])).extract([sample])
    enlarged = np.asarray(Image.fromarray(sample.rgb).resize((256, 256), Image.Resampling.BILINEAR))[16:240, 16:240]
    image = torch.from_numpy(enlarged.copy()).permute(2, 0, 1).float().div(255)
    np.testing.assert_allclose(
        features["out2"], _stages(network, ((image - MEAN) / STD)[None])[2], rtol=1e-5, atol=1e-5
    )


def test_values_do_not_depend_on_the_batch(install: Any, golden_sample: GoldenSample) -> None:
    install(CNN)
    backbone = create(FeatureSpec.timm(CNN, outputs=[3]))
    alone = [backbone.extract([golden_sample(i)])[0]["out3"] for i in (0, 5, 8)]
    together = [features["out3"] for features in backbone.extract([golden_sample(i) for i in (0, 5, 8)])]
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)
    assert backbone.extract([]) == []


def test_partial_weights_reach_their_outputs(install: Any, random_state: RandomState, golden_sample: Any) -> None:
    install(CNN, drop=("layer4", "fc"))
    (features,) = create(FeatureSpec.timm(CNN, outputs=[2, 3])).extract([golden_sample(3)])
    wanted = _stages(_plain(CNN, random_state(CNN)), ((_image(golden_sample(3)) - MEAN) / STD)[None])
    np.testing.assert_allclose(features["out3"], wanted[3], rtol=1e-5, atol=1e-5)
    with pytest.raises(WeightsError, match="reaches output 3 only, output 4 asked for"):
        create(FeatureSpec.timm(CNN, outputs=[4]))


def test_tokens_equal_the_network(install: Any, golden_sample: GoldenSample) -> None:
    network = _plain(VIT, install(VIT))
    sample = golden_sample(4)
    (features,) = create(FeatureSpec.timm(VIT)).extract([sample])
    with torch.inference_mode():
        wanted = network.forward_features(((_image(sample) - MEAN) / STD)[None])[0, 1:].numpy()
    np.testing.assert_array_equal(features["grid"], [14, 14])
    assert features["tokens"].shape == (196, 192)
    assert features["tokens"].dtype == np.float32
    np.testing.assert_allclose(features["tokens"], wanted, rtol=1e-4, atol=1e-5)


def test_the_first_blocks_of_a_network(install: Any, golden_sample: GoldenSample) -> None:
    network = _plain(VIT, install(VIT))
    sample = golden_sample(4)
    (features,) = create(FeatureSpec.timm(VIT, blocks=4)).extract([sample])
    network.blocks = network.blocks[:4]
    with torch.inference_mode():
        wanted = network.forward_features(((_image(sample) - MEAN) / STD)[None])[0, 1:].numpy()
    np.testing.assert_allclose(features["tokens"], wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match=r"blocks.*12"):
        create(FeatureSpec.timm(VIT, blocks=13))
    with pytest.raises(UsageError, match="blocks"):
        FeatureSpec.timm("resnet18.tv_in1k", outputs=[2], blocks=1)


def test_norm_model_uses_the_networks_constants(install: Any, golden_sample: GoldenSample) -> None:
    network = _plain(VIT, install(VIT))
    sample = golden_sample(4)
    (features,) = create(FeatureSpec.timm(VIT, norm="model")).extract([sample])
    with torch.inference_mode():
        wanted = network.forward_features((_image(sample)[None] - 0.5) / 0.5)[0, 1:].numpy()
    np.testing.assert_allclose(features["tokens"], wanted, rtol=1e-4, atol=1e-5)


def test_register_tokens_are_dropped_and_the_grid_is_free(install: Any, golden_sample: GoldenSample) -> None:
    install(REGISTERS)
    (features,) = create(FeatureSpec.timm(REGISTERS, size=126)).extract([golden_sample(4)])
    np.testing.assert_array_equal(features["grid"], [9, 9])
    assert features["tokens"].shape == (81, 384)
    with pytest.raises(UsageError, match="multiple of its 14 x 14 patches, got 100"):
        create(FeatureSpec.timm(REGISTERS, size=100))


@pytest.mark.parametrize(
    ("model", "size", "side", "channels"),
    [
        ("vit_base_patch8_224.dino", 224, 28, 768),
        ("vit_small_patch14_dinov2.lvd142m", 224, 16, 384),
        ("vit_small_patch14_dinov2.lvd142m", 518, 37, 384),
        ("vit_base_patch14_dinov2.lvd142m", 518, 37, 768),
        (ROTARY, 448, 28, 384),
        ("vit_base_patch16_dinov3.lvd1689m", 224, 14, 768),
    ],
)
def test_grid_follows_from_size_and_patches(model: str, size: int, side: int, channels: int) -> None:
    shapes = output_shapes(TimmParams(model=model, size=size))
    assert shapes["tokens"] == (side * side, channels)


@pytest.mark.parametrize(("model", "size"), [(VIT, 160), (ROTARY, 96)])
def test_other_size_is_what_timm_makes_of_it(install: Any, golden_sample: GoldenSample, model: str, size: int) -> None:
    """Position embeddings as if timm had built the network for that size and fitted the weights to it."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    state = install(model)
    network = import_timm().create_model(model, pretrained=False, img_size=size).eval()
    if model == VIT:
        assert network.pos_embed.shape != state["pos_embed"].shape
        state = checkpoint_filter_fn(state, network)
    network.load_state_dict(state, strict=True)
    sample = golden_sample(4)
    resized = np.asarray(Image.fromarray(sample.rgb).resize((size, size), Image.Resampling.BICUBIC))
    image = torch.from_numpy(resized.copy()).permute(2, 0, 1).float().div(255)
    with torch.inference_mode():
        wanted = network.forward_features(((image - MEAN) / STD)[None])[0, network.num_prefix_tokens :].numpy()
    (features,) = create(FeatureSpec.timm(model, size=size)).extract([sample])
    np.testing.assert_array_equal(features["grid"], [size // 16, size // 16])
    np.testing.assert_allclose(features["tokens"], wanted, rtol=1e-4, atol=1e-5)


def test_network_without_a_free_size_says_its_own() -> None:
    with pytest.raises(UsageError, match="size must be 224, its own, got 256"):
        output_shapes(TimmParams(model="beit_base_patch16_224.in22k_ft_in22k", size=256))


def test_bfloat16_is_near_and_stored_as_float32(install: Any, golden_sample: GoldenSample) -> None:
    install(VIT)
    (exact,) = create(FeatureSpec.timm(VIT)).extract([golden_sample(4)])
    (short,) = create(FeatureSpec.timm(VIT, precision="bfloat16")).extract([golden_sample(4)])
    assert short["tokens"].dtype == np.float32
    difference = np.linalg.norm(short["tokens"] - exact["tokens"]) / np.linalg.norm(exact["tokens"])
    assert 1e-5 < difference < 0.03


def test_stage_names_of_other_families(install: Any, golden_sample: GoldenSample) -> None:
    """Families whose feature extractor renames `stages.0` to `stages_0` load from plain names too."""
    name = "convnext_atto.d2_in1k"
    state = install(name)
    (features,) = create(FeatureSpec.timm(name, outputs=[1, 2])).extract([golden_sample(0)])
    network = _plain(name, state)
    with torch.inference_mode():
        x = network.stem(((_image(golden_sample(0)) - MEAN) / STD)[None])
        wanted = network.stages[1](network.stages[0](x))[0].numpy()
    np.testing.assert_allclose(features["out1"], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"outputs": [9]}, r"no feature outputs \[9\]"), ({}, "no patch tokens")],
)
def test_what_a_network_does_not_have(install: Any, options: dict[str, Any], message: str) -> None:
    install(CNN)
    with pytest.raises(UsageError, match=message):
        create(FeatureSpec.timm(CNN, **options))


def test_missing_weights_stop_before_any_work() -> None:
    with pytest.raises(WeightsError, match=r"mmad weights fetch vit_base_patch8_224\.dino"):
        create(FeatureSpec.timm("vit_base_patch8_224.dino"))


def test_timm_imports_whatever_torchvision_is_like() -> None:
    assert import_timm().__name__ == "timm"
    assert torchvision_state() in ("complete", "python only", "missing")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("spec", [FeatureSpec.timm(CNN, outputs=[2, 3]), FeatureSpec.timm(VIT)])
def test_steps_of_a_gpu_keep_the_order(
    install: Any, golden_sample: GoldenSample, monkeypatch: pytest.MonkeyPatch, spec: FeatureSpec
) -> None:
    """While one step is computed the next one is prepared; features still come in the order of the samples."""
    install(spec.params["model"])
    samples = [golden_sample(i) for i in (0, 5, 8, 3, 1)]
    alone = create(spec).extract(samples)
    monkeypatch.setattr(timm_backbone, "_STEPS_GPU", 2)
    with pretended_cuda():
        backbone = create(spec, "cuda")
        together = backbone.extract(samples)
        assert next(backbone._network.parameters()).is_cuda  # type: ignore[attr-defined]
    for one, other in zip(alone, together, strict=True):
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_allclose(other[name], one[name], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("spec", [FeatureSpec.timm(CNN, outputs=[2, 3]), FeatureSpec.timm(VIT)])
def test_gpu_agrees_with_cpu(install: Any, golden_sample: GoldenSample, spec: FeatureSpec) -> None:
    install(spec.params["model"])
    samples = [golden_sample(i) for i in (0, 5)]
    for cpu, gpu in zip(create(spec).extract(samples), create(spec, "cuda").extract(samples), strict=True):
        for name in cpu:
            np.testing.assert_allclose(gpu[name], cpu[name], rtol=1e-3, atol=1e-3)

"""Point-MAE and Point-BERT: parity with the published code on stand-in weights, checkpoints, settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mmad_cli.alignment.interpolation import nearest_centres, pooled_operator
from mmad_cli.backbones import Features, FeatureSpec, create, point_transformer
from mmad_cli.backbones.point_transformer import (
    DROP_DECISIONS,
    DROP_RATES,
    GroupEncoder,
    PointTransformer,
    branch_weights,
    draw_keep,
)
from mmad_cli.backbones.weights import import_file, resolve
from mmad_cli.errors import DataError, UsageError, WeightsError
from mmad_cli.types import Sample

Golden = Callable[[str], dict[str, np.ndarray]]
StandIns = Callable[[str], dict[str, Any]]
CheckpointFile = Callable[..., Path]
MakeSample = Callable[[int], Sample]

SMALL = {"groups": 128, "group_size": 32}
FULL = {"groups": 1024, "group_size": 128}
SETTINGS = {"s32_g128": SMALL, "s128_g1024": FULL}
CASES = [
    pytest.param(network, short, size, marks=[pytest.mark.slow] if size == "s128_g1024" else [])
    for network, short in (("point_mae", "mae"), ("point_bert", "bert"))
    for size in SETTINGS
]


def relative(ours: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(ours - expected) / np.linalg.norm(expected))


def inputs_of(features: Features, sample: Sample, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the network saw: groups relative to their centres, and the centres."""
    from mmad_cli.alignment.grouping import group_neighbours

    points, centres = sample.xyz.reshape(-1, 3)[features["pixel"]], features["centres"]
    members = group_neighbours(points, centres, group_size)
    return torch.from_numpy(points[members] - centres[:, None]), torch.from_numpy(centres)


def published_subset(tokens: np.ndarray) -> np.ndarray:
    """Channels ::24 of every 4th of at most 128 groups, as the golden features are kept."""
    return tokens.T[::24, :: 4 * max(1, len(tokens) // 128)]


# parity with the published code


@pytest.mark.parametrize(
    "name", ["point_mae", "point_bert", "uff", pytest.param("vit_base_patch8_224_dino", marks=pytest.mark.slow)]
)
def test_stand_in_checkpoints_are_the_golden_ones(golden: Golden, stand_ins: StandIns, name: str) -> None:
    expected, tensors = golden(f"checkpoint/{name}"), stand_ins(name)
    assert list(tensors) == expected["keys"].tolist()
    flat = [tensor.double().reshape(-1) for tensor in tensors.values()]
    np.testing.assert_allclose([float(t.abs().sum()) for t in flat], expected["sum_abs"], rtol=1e-9)
    assert [float(t[0]) for t in flat] == expected["first"].tolist()
    assert [float(t[-1]) for t in flat] == expected["last"].tolist()


@pytest.mark.parametrize(("network", "short", "size"), CASES)
def test_published_features(
    golden: Golden, imported: Callable[[str], None], golden_sample: MakeSample, network: str, short: str, size: str
) -> None:
    imported(network)
    settings, expected = SETTINGS[size], golden(f"{short}_{size}")
    backbone = create(FeatureSpec.point(network, point_bn="eval", **settings))
    sample = golden_sample(0)
    (features,) = backbone.extract([sample])
    check_tokens(features["tokens"], expected, "eval")

    groups, centres = inputs_of(features, sample, settings["group_size"])
    network_module: PointTransformer = backbone._network  # type: ignore[attr-defined]
    with torch.inference_mode():
        keep = [expected["train_drop_keep"].tolist()]
        training = network_module(groups[None], centres[None], True, keep)[0].numpy()
        for mode in ("eval", "train"):
            tokens = network_module.encoder(groups, mode == "train").numpy()
            subset = tokens[:: 4 * max(1, len(tokens) // 64), ::4]
            assert relative(subset, expected[f"{mode}_enc_tokens"]) < 1e-4
    check_tokens(training, expected, "train")

    operator = pooled_operator(features["neighbours"], features["weights"], features["pixel"], settings["groups"])
    check_patches(operator @ features["tokens"], expected)


def check_tokens(tokens: np.ndarray, expected: dict[str, np.ndarray], mode: str) -> None:
    ours = published_subset(tokens)
    assert relative(ours, expected[f"{mode}_feat"]) < 1e-4
    assert np.abs(ours - expected[f"{mode}_feat"]).max() < 1e-4 * np.abs(expected[f"{mode}_feat"]).max()
    if f"{mode}_feat_mean_per_channel" in expected:
        assert relative(tokens.mean(axis=0), expected[f"{mode}_feat_mean_per_channel"]) < 1e-4
        assert relative(tokens.std(axis=0, ddof=1), expected[f"{mode}_feat_std_per_channel"]) < 1e-4


def check_patches(patches: np.ndarray, expected: dict[str, np.ndarray]) -> None:
    ours, published = patches[::4, ::128], expected["patch_sub"]
    assert np.array_equal((ours == 0).all(axis=1), (published == 0).all(axis=1))
    covered = (published != 0).any(axis=1)
    error = np.linalg.norm(ours - published, axis=1)[covered] / np.linalg.norm(published, axis=1)[covered]
    assert error.max() < 1e-5
    if "patch_norm" in expected:
        norms = np.linalg.norm(patches, axis=1)
        np.testing.assert_allclose(norms, expected["patch_norm"], atol=1e-5 * expected["patch_norm"].max())


@pytest.mark.parametrize("size", ["s32_g128", pytest.param("s128_g1024", marks=pytest.mark.slow)])
def test_published_interpolation(
    golden: Golden, imported: Callable[[str], None], golden_sample: MakeSample, size: str
) -> None:
    imported("point_mae")
    expected, probe = golden(f"mae_{size}"), golden("probe_points")["probe_points"]
    (features,) = create(FeatureSpec.point(point_bn="eval", **SETTINGS[size])).extract([golden_sample(0)])
    points = golden_sample(0).xyz.reshape(-1, 3)[features["pixel"]][probe]
    for form, name in (("direct", "interp_exact_probe"), ("expanded", "interp_probe")):
        indices, weights = nearest_centres(points, features["centres"], form)  # type: ignore[arg-type]
        values = np.einsum("pk,pkc->pc", weights, features["tokens"][indices][..., ::96])
        error = np.linalg.norm(values - expected[name], axis=1) / np.linalg.norm(expected[name], axis=1)
        assert error.max() < 1e-5
    kept = features["weights"][probe]
    np.testing.assert_allclose(kept, weights, rtol=1e-5, atol=1e-6)


# the group encoder computes the same as its layers, one after the other


class LiteralEncoder(nn.Module):
    def __init__(self, encoder: GroupEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, groups: torch.Tensor, batch_statistics: bool) -> torch.Tensor:
        self.encoder.train(batch_statistics)
        points = self.encoder.first_conv(groups.transpose(1, 2))
        both = torch.cat([points.amax(dim=2, keepdim=True).expand_as(points), points], dim=1)
        return self.encoder.second_conv(both).amax(dim=2)


@pytest.fixture
def encoder() -> GroupEncoder:
    torch.manual_seed(0)
    encoder = GroupEncoder(40)
    for layer in (encoder.first_conv[1], encoder.second_conv[1]):
        nn.init.normal_(layer.weight, 1, 0.3)
        nn.init.normal_(layer.bias, 0, 0.3)
        nn.init.normal_(layer.running_mean, 0, 0.3)
        nn.init.uniform_(layer.running_var, 0.5, 2)
    return encoder.requires_grad_(False)


@pytest.mark.parametrize("batch_statistics", [True, False])
@pytest.mark.parametrize("piece", [1, 50, 10**6])
@pytest.mark.parametrize("scale", [1.0, 0.003])
def test_encoder_equals_its_layers(
    encoder: GroupEncoder, monkeypatch: pytest.MonkeyPatch, batch_statistics: bool, piece: int, scale: float
) -> None:
    monkeypatch.setattr(point_transformer, "_PIECE", piece)
    groups = scale * (torch.randn(37, 20, 3, generator=torch.Generator().manual_seed(1)) + 0.5)
    ours = encoder(groups, batch_statistics)
    literal = LiteralEncoder(encoder.double())(groups.double(), batch_statistics)
    assert relative(ours.numpy(), literal.numpy()) < 1e-5


def test_batch_statistics_undo_the_scale_of_the_coordinates(encoder: GroupEncoder) -> None:
    groups = torch.randn(16, 20, 3, generator=torch.Generator().manual_seed(1))
    assert relative(encoder(10 * groups, True).numpy(), encoder(groups, True).numpy()) < 1e-3
    assert relative(encoder(10 * groups, False).numpy(), encoder(groups, False).numpy()) > 0.5


def test_flat_groups_give_finite_tokens(encoder: GroupEncoder) -> None:
    assert torch.isfinite(encoder(torch.zeros(4, 8, 3), True)).all()


# stochastic depth


def test_branches_under_stochastic_depth() -> None:
    assert branch_weights(None) == [(1.0, 1.0)] * 12
    kept = branch_weights([True] * DROP_DECISIONS)
    assert kept[0] == (1.0, 1.0)
    assert kept[11] == (pytest.approx(1 / 0.9), pytest.approx(1 / 0.9))
    assert branch_weights([False] * DROP_DECISIONS)[1:] == [(0.0, 0.0)] * 11
    with pytest.raises(ValueError, match="keep: should hold 22 flags, got 3"):
        branch_weights([True] * 3)


def test_branches_are_dropped_at_their_rates() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = np.array([draw_keep(generator) for _ in range(4000)])
    expected = 1 - np.repeat(DROP_RATES[1:], 2)
    assert np.abs(drawn.mean(axis=0) - expected).max() < 0.02


def test_stochastic_depth_belongs_to_the_sample(imported: Callable[[str], None], golden_sample: MakeSample) -> None:
    imported("point_mae")
    samples = [golden_sample(i) for i in range(3)]

    def tokens(order: list[int], **params: Any) -> dict[int, np.ndarray]:
        backbone = create(FeatureSpec.point(**SMALL, **params))
        found = backbone.extract([samples[i] for i in order])
        return {i: features["tokens"] for i, features in zip(order, found, strict=True)}

    forward, backward = (tokens(order, point_droppath="on") for order in ([0, 1, 2], [2, 1, 0]))
    assert all(np.array_equal(forward[i], backward[i]) for i in range(3))
    other = tokens([0, 1, 2], point_droppath="on", droppath_seed=1)
    assert any(not np.array_equal(forward[i], other[i]) for i in range(3))
    assert all(relative(tokens([i])[i], forward[i]) > 1e-3 for i in range(3))


# the backbone


def test_arrays(imported: Callable[[str], None], golden_sample: MakeSample) -> None:
    imported("point_mae")
    spec = FeatureSpec.point(**SMALL)
    sample = golden_sample(0)
    sample.xyz.setflags(write=False)
    (features,) = create(spec).extract([sample])
    count = int((sample.xyz != 0).all(axis=-1).sum())
    shapes = {name: (array.dtype, array.shape) for name, array in features.items()}
    assert shapes == {
        "tokens": (np.float32, (128, 1152)),
        "centres": (np.float32, (128, 3)),
        "pixel": (np.int32, (count,)),
        "neighbours": (np.int16, (count, 3)),
        "weights": (np.float32, (count, 3)),
    }
    assert all(array.flags.c_contiguous for array in features.values())
    assert sum(array.nbytes for array in features.values()) <= spec.estimated_bytes()
    again = create(spec).extract([sample, sample])
    assert all(np.array_equal(f[name], features[name]) for f in again for name in features)


@pytest.mark.parametrize(
    ("network", "params"),
    [
        ("point_mae", {}),
        ("point_mae", {"point_bn": "eval"}),
        ("point_mae", {"point_droppath": "on"}),
        ("point_bert", {"idw": "direct"}),
        ("builtin_points", {}),
    ],
)
def test_a_batch_on_the_device_gives_each_sample_its_own_features(
    imported: Callable[[str], None],
    golden_sample: MakeSample,
    torch_device: str,
    network: str,
    params: dict[str, Any],
) -> None:
    if network != "builtin_points":
        imported(network)
    samples = [golden_sample(i) for i in range(3)]
    spec = FeatureSpec.point(network, groups=48, group_size=32, **params)
    alone = create(spec).extract(samples)
    together = create(spec, torch_device)._batch(samples)  # type: ignore[attr-defined]
    for one, other in zip(alone, together, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one if name != "tokens")
        assert one["tokens"].dtype == other["tokens"].dtype and other["tokens"].flags.c_contiguous
        assert relative(other["tokens"], one["tokens"]) < 1e-5


def test_memory_that_ends_makes_smaller_batches(
    imported: Callable[[str], None],
    golden_sample: MakeSample,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    imported("point_mae")
    backbone = create(FeatureSpec.point(groups=48, group_size=32))
    samples = [golden_sample(i) for i in range(3)]
    expected = backbone.extract(samples)
    computed = backbone._batch  # type: ignore[attr-defined]

    def with_room_for_one(some: list[Sample]) -> list[Features]:
        if len(some) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return computed(some)  # type: ignore[no-any-return]

    monkeypatch.setattr(backbone, "_batch", with_room_for_one)
    monkeypatch.setattr(backbone._batches, "_size", 4)  # type: ignore[attr-defined]
    found = backbone.extract(samples)
    assert all(np.array_equal(a[n], b[n]) for a, b in zip(expected, found, strict=True) for n in a)
    assert "batches of 1" in caplog.text


def test_settings_change_what_they_name(imported: Callable[[str], None], golden_sample: MakeSample) -> None:
    imported("point_mae")
    sample = golden_sample(0)
    near = replace(sample, xyz=np.where(sample.xyz == 0, 0, sample.xyz - np.float32([0, 0, 0.49])).astype(np.float32))

    def features(of: Sample = sample, **params: Any) -> Features:
        return create(FeatureSpec.point(**{**SMALL, **params})).extract([of])[0]

    base = features()
    assert not np.array_equal(base["weights"], features(idw="direct")["weights"])
    assert np.array_equal(base["tokens"], features(idw="direct")["tokens"])
    assert relative(features(point_bn="eval")["tokens"], base["tokens"]) > 0.01
    assert 1e-5 < relative(features(precision="bfloat16")["tokens"], base["tokens"]) < 0.05
    assert features(size=112)["pixel"].max() < 112 * 112
    skipped, kept = features(near), features(near, fps_skip_origin=False)
    assert not np.array_equal(skipped["centres"], kept["centres"])
    drawn = features(fps_start="random", fps_seed=1)
    assert not np.array_equal(drawn["centres"][0], base["centres"][0])
    assert np.array_equal(drawn["centres"], features(fps_start="random", fps_seed=1)["centres"])
    assert not np.array_equal(drawn["centres"], features(fps_start="random", fps_seed=2)["centres"])


def test_pruned_networks_join_the_outputs_of_their_own_blocks(
    imported: Callable[[str], None], golden_sample: MakeSample
) -> None:
    imported("point_mae")
    sample = golden_sample(0)
    by_depth = {
        blocks: create(FeatureSpec.point(**{**SMALL, "blocks": blocks})).extract([sample])[0]["tokens"]
        for blocks in (12, 8, 4, 2, 3)
    }
    assert [tokens.shape[1] for tokens in by_depth.values()] == [1152, 1152, 1152, 384, 384]
    # outputs after blocks 4, 8, 12; 2, 5, 8; 2, 3, 4, counted from 1
    assert np.array_equal(by_depth[8][:, :384], by_depth[2])
    assert np.array_equal(by_depth[4][:, 384:768], by_depth[3])
    assert np.array_equal(by_depth[12][:, :384], by_depth[4][:, 768:])
    assert np.array_equal(by_depth[12][:, 384:768], by_depth[8][:, 768:])


def test_fewer_points_than_groups(imported: Callable[[str], None], golden_sample: MakeSample) -> None:
    imported("point_mae")
    sample = golden_sample(0)
    xyz = np.zeros_like(sample.xyz)
    xyz[100:110, 100:110] = sample.xyz[100:110, 100:110]
    small = replace(sample, xyz=xyz)
    (features,) = create(FeatureSpec.point(groups=128, group_size=32)).extract([small])
    assert features["tokens"].shape == (128, 1152)
    assert all(np.isfinite(array).all() for array in features.values())
    with pytest.raises(DataError, match=r"train/good/\S+: 100 valid 3D points .* groups of 128 need at least 128"):
        create(FeatureSpec.point()).extract([small])


def test_specs() -> None:
    spec = FeatureSpec.point("point_bert")
    assert (spec.backbone, spec.input, spec.weights_names()) == ("point_bert", "xyz", ["point_bert"])
    assert spec.libraries() == ("torch", "scipy")
    assert FeatureSpec.point(droppath_seed=3) == FeatureSpec.point()
    assert FeatureSpec.point(point_droppath="on", droppath_seed=3) != FeatureSpec.point(point_droppath="on")
    for change in ({"groups": 512}, {"point_bn": "eval"}, {"idw": "direct"}, {"fps_skip_origin": False}):
        assert FeatureSpec.point(**change).canonical() != FeatureSpec.point().canonical()
    with pytest.raises(UsageError, match="point_bn"):
        FeatureSpec.point(point_bn="running")


def test_missing_weights_say_how_to_get_them() -> None:
    with pytest.raises(WeightsError, match="mmad weights fetch point_mae"):
        create(FeatureSpec.point())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_and_cpu_agree(imported: Callable[[str], None], golden_sample: MakeSample) -> None:
    imported("point_mae")
    cpu, gpu = (create(FeatureSpec.point(), device).extract([golden_sample(0)])[0] for device in ("cpu", "cuda"))
    assert np.array_equal(cpu["centres"], gpu["centres"])
    assert relative(gpu["tokens"], cpu["tokens"]) < 1e-4


# checkpoints


@pytest.mark.parametrize("network", ["point_mae", "point_bert"])
def test_import_keeps_the_encoder_only(
    stand_ins: StandIns, checkpoint_file: CheckpointFile, network: str, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    record = import_file(network, checkpoint_file(network, stand_ins(network)))
    kept = load_file(record.path)
    assert kept.keys() == PointTransformer(network).state_dict().keys()  # type: ignore[arg-type]
    prefix = {"point_mae": "module.MAE_encoder.", "point_bert": "module.transformer_q."}[network]
    assert all(torch.equal(value, stand_ins(network)[prefix + name]) for name, value in kept.items())
    # what was kept can be imported again, as on another machine
    save_file(kept, tmp_path / "encoder.safetensors")
    assert import_file(network, tmp_path / "encoder.safetensors").tensors == len(kept)


@pytest.mark.parametrize(
    ("network", "change", "message"),
    [
        ("point_mae", {"module.MAE_encoder.norm.bias": None}, r"1 missing: MAE_encoder\.norm\.bias"),
        ("point_mae", {"module.MAE_encoder.norm.gamma": torch.ones(3)}, r"1 unexpected: MAE_encoder\.norm\.gamma"),
        ("point_mae", {"module.head.weight": torch.ones(3)}, r"1 unexpected: head\.weight"),
        ("point_mae", {"module.MAE_encoder.norm.bias": torch.ones(3)}, r"another shape: .* \[3\] \(needs \[384\]\)"),
        ("point_bert", {"module.transformer_q.cls_pos": None}, r"1 missing: transformer_q\.cls_pos"),
        ("point_bert", {"module.transformer_q.more": torch.ones(3)}, r"1 unexpected: transformer_q\.more"),
        ("m3dm_uff", {"rgb_head.bias": None}, r"1 missing: rgb_head\.bias"),
        ("m3dm_uff", {"rgb_norm.weight": torch.ones(3)}, r"another shape: rgb_norm\.weight"),
    ],
)
def test_checkpoints_must_fit(
    stand_ins: StandIns, checkpoint_file: CheckpointFile, network: str, change: dict[str, Any], message: str
) -> None:
    tensors = {**stand_ins(network.removeprefix("m3dm_")), **change}
    path = checkpoint_file(network, {name: value for name, value in tensors.items() if value is not None})
    with pytest.raises(WeightsError, match=message):
        import_file(network, path)


def test_one_network_is_not_taken_for_the_other(stand_ins: StandIns, checkpoint_file: CheckpointFile) -> None:
    for wanted, other in (("point_mae", "point_bert"), ("point_bert", "point_mae"), ("m3dm_uff", "point_mae")):
        with pytest.raises(WeightsError, match=f"does not fit {wanted}: .*missing"):
            import_file(wanted, checkpoint_file(other, stand_ins(other)))


def test_old_files_without_counters_load(stand_ins: StandIns, checkpoint_file: CheckpointFile) -> None:
    tensors = {k: v for k, v in stand_ins("point_mae").items() if not k.endswith("num_batches_tracked")}
    import_file("point_mae", checkpoint_file("point_mae", tensors))
    create(FeatureSpec.point())


def test_fusion_block_keeps_its_names(stand_ins: StandIns, checkpoint_file: CheckpointFile) -> None:
    from safetensors.torch import load_file

    import_file("m3dm_uff", checkpoint_file("m3dm_uff", stand_ins("uff")))
    assert load_file(resolve("m3dm_uff").path).keys() == stand_ins("uff").keys()

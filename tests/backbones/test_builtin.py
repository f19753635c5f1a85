"""The built-in networks: their files, what their tokens ignore, and that they sit behind the common interface."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mmad_cli.alignment.grouping import farthest_points, group_neighbours
from mmad_cli.backbones import builtin, create
from mmad_cli.backbones.builtin import HERE, NAMES, card
from mmad_cli.backbones.builtin.points import CHANNELS, PointNetwork
from mmad_cli.backbones.builtin.rgb import RgbNetwork
from mmad_cli.backbones.specs import FeatureSpec
from mmad_cli.backbones.weights import WeightsError, list_weights, resolve, verify
from mmad_cli.errors import UsageError
from mmad_cli.types import Sample

MEGABYTE = 10**6


def shipped(name: str) -> torch.nn.Module:
    from safetensors.torch import load_file

    network = RgbNetwork() if name == "builtin_rgb" else PointNetwork()
    state = {key: value.float() for key, value in load_file(HERE / f"{name}.safetensors").items()}
    missing = network.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in missing.missing_keys)
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize("name", NAMES)
def test_files_are_those_of_the_card(name: str) -> None:
    facts = card()["networks"][name]
    body = (HERE / facts["file"]).read_bytes()
    assert len(body) == facts["bytes"]
    assert hashlib.sha256(body).hexdigest() == facts["sha256"]
    record = resolve(name)
    assert record.sha256 == facts["sha256"]
    assert not record.official
    assert [status.state for status in verify(name)] == ["ready"]


def test_together_they_are_small() -> None:
    assert sum(path.stat().st_size for path in HERE.glob("*.safetensors")) < 12 * MEGABYTE


def test_the_card_says_how_they_were_made() -> None:
    from mmad_cli.pretraining.config import committed
    from mmad_cli.pretraining.training import shipped_log

    found = card()
    assert found["licence"] == "Apache-2.0"
    assert found["limits"]
    for network in ("rgb", "points"):
        facts, config, log = found["networks"][f"builtin_{network}"], committed(network), shipped_log(network)
        assert facts["steps"] == config.steps == len(log)
        assert facts["seed"] == config.seed
        assert facts["data"]
        assert facts["recipe"]
        assert facts["hardware"]
        assert facts["loss"] == pytest.approx([log[0].loss, np.mean([line.loss for line in log[-50:]])], abs=5e-4)


def test_they_are_here_without_a_download() -> None:
    states = {status.name: status for status in list_weights()}
    for name in NAMES:
        assert states[name].state == "ready"
        assert states[name].licence == "apache-2.0"


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_package_is_noticed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "package"
    shutil.copytree(HERE, damaged)
    monkeypatch.setattr(builtin, "HERE", damaged)
    path = damaged / f"{name}.safetensors"
    body = bytearray(path.read_bytes())
    body[-1] ^= 1
    path.write_bytes(body)
    assert [status.state for status in verify(name)] == ["damaged"]
    path.write_bytes(body[:-1])
    with pytest.raises(WeightsError, match="install mmad-cli again"):
        resolve(name)


def bumpy(rng: np.random.Generator) -> np.ndarray:
    """A bumpy sheet (n, 3) in metres, half a metre before the sensor, points in no order."""
    x, y = rng.uniform(-0.04, 0.04, (2, 4000))
    z = 0.5 + 0.004 * np.sin(150 * x) * np.cos(90 * y) + 0.05 * x
    return np.stack([x, y, z], axis=1)


def tokens_of(network: torch.nn.Module, points: np.ndarray, chosen: np.ndarray) -> torch.Tensor:
    centres = points[chosen].astype(np.float32)
    groups = points[group_neighbours(points.astype(np.float32), centres, 64)] - points[chosen][:, None]
    return network(torch.from_numpy(groups.astype(np.float32))[None], torch.from_numpy(centres)[None])[0]


@pytest.mark.parametrize("change", ["turned", "enlarged"])
def test_point_tokens_ignore_turn_and_size(change: str) -> None:
    points = bumpy(np.random.default_rng(0))
    chosen = farthest_points(points, 96)
    network = shipped("builtin_points")
    angle = 1.1
    turn = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
    other = points @ turn.T if change == "turned" else 1.7 * points
    before, after = (tokens_of(network, cloud, chosen) for cloud in (points, other))
    assert before.shape == (96, CHANNELS)
    unlike = (before - before.roll(1, 0)).square().sum(dim=1).median()
    # the few centres whose nearest groups lie equally far may take others
    assert (before - after).square().sum(dim=1).median() < 1e-4 * unlike


def test_tokens_consist_of_parts_of_length_one() -> None:
    points = bumpy(np.random.default_rng(1))
    tokens = tokens_of(shipped("builtin_points"), points, farthest_points(points, 64))
    torch.testing.assert_close(tokens.view(64, 3, 96).norm(dim=-1), torch.ones(64, 3))
    images = torch.rand(2, 3, 56, 72, generator=torch.Generator().manual_seed(0))
    fine, coarse = shipped("builtin_rgb").halves(images)
    for half in (fine, coarse):
        assert half.shape == (2, 8, 10, 96)
        torch.testing.assert_close(half.norm(dim=-1), torch.ones(2, 8, 10))


def test_a_token_is_the_root_of_the_averaged_map() -> None:
    network = shipped("builtin_rgb")
    images = torch.rand(2, 3, 56, 72, generator=torch.Generator().manual_seed(0))
    tokens = network.forward_features(images)
    assert tokens.shape == (2, 7 * 9, 32)
    quarter = network.maps(images)[1]
    for row, column in ((0, 0), (3, 5), (6, 8)):
        block = quarter[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        torch.testing.assert_close(tokens[:, 9 * row + column] ** 2, block.mean(dim=(2, 3)))


SPECS = {
    "tokens": (FeatureSpec.timm("builtin_rgb"), {"tokens": (784, 32)}),
    "maps": (FeatureSpec.timm("builtin_rgb", outputs=[2, 3]), {"out2": (64, 28, 28), "out3": (128, 14, 14)}),
    "crop": (FeatureSpec.timm("builtin_rgb", view="crop", outputs=[2]), {"out2": (64, 28, 28)}),
    "points": (FeatureSpec.point("builtin_points", groups=128), {"tokens": (128, 288), "centres": (128, 3)}),
}


@pytest.mark.parametrize("which", SPECS)
def test_features_come_through_the_common_interface(which: str, golden_sample: Callable[[int], Sample]) -> None:
    spec, shapes = SPECS[which]
    first, again = (create(spec).extract([golden_sample(0)])[0] for _ in range(2))
    for name, shape in shapes.items():
        assert first[name].shape == shape
        assert first[name].dtype == np.float32
        np.testing.assert_array_equal(first[name], again[name])


def test_settings_of_other_networks_make_no_other_feature() -> None:
    assert FeatureSpec.point("builtin_points", point_bn="eval", blocks=8) == FeatureSpec.point("builtin_points")
    assert FeatureSpec.point("builtin_points", groups=64) != FeatureSpec.point("builtin_points")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (FeatureSpec.timm("builtin_points"), "takes? builtin_rgb"),
        (FeatureSpec.timm("builtin_rgb", blocks=4), "no transformer blocks"),
        (FeatureSpec.timm("builtin_rgb", outputs=[2, 4]), "outputs 0 to 3"),
        (FeatureSpec.timm("builtin_rgb", size=100), "multiple"),
    ],
)
def test_what_they_cannot_do_is_said(spec: FeatureSpec, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        create(spec)


def test_the_card_is_plain_json() -> None:
    assert json.loads((HERE / "card.json").read_text(encoding="utf-8")) == card()

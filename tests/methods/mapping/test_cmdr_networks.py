"""The networks of CMDR-IAD against the published code's numbers, and how they treat windows, order and layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mmad_cli.errors import WeightsError
from mmad_cli.methods.cmdr_iad import networks as cmdr
from mmad_cli.methods.cmdr_iad.config import PUBLISHED_NAMES, SHORTENING, STREAMS, NetworkName
from mmad_cli.methods.cmdr_iad.networks import (
    AttentionBlock,
    Mapper,
    PointDecoder,
    RGBDecoder,
    WindowAttention,
    load_tensors,
    new_networks,
)

Golden = Callable[[str], dict[str, np.ndarray]]
Networks = dict[NetworkName, nn.Module]
NAMES = tuple(PUBLISHED_NAMES)
Load = Callable[..., Networks]


@pytest.fixture(scope="module")
def load(golden_state: Any, golden_shapes: Any) -> Load:
    """names -> networks for a side of 56 with the deterministic weights, without dropout."""

    def build(names: tuple[NetworkName, ...] = NAMES) -> Networks:
        networks = new_networks(side=56, dropout=0.0, names=names)
        for name, network in networks.items():
            other = PUBLISHED_NAMES[name]
            state = golden_state(other, golden_shapes["cmdr_56"][other])
            load_tensors(network, {key: torch.from_numpy(value) for key, value in state.items()}, other)
        return networks

    return build


@pytest.fixture(scope="module")
def small(load: Load) -> Networks:
    return load()


def inputs(golden_sample: Any, name: NetworkName) -> torch.Tensor:
    sample = golden_sample(0, 56)
    return torch.from_numpy(np.array(sample["rgb" if STREAMS[name][0] == "rgb" else "xyz"]))[None]


def statistics(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    return np.array([values.sum(), np.abs(values).sum(), np.sqrt((values**2).sum()), values.min(), values.max()])


def assert_statistics(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    # the sum is a difference of large numbers: measured by the sum of magnitudes
    scale = np.array([expected[1], expected[1], expected[2], *[np.abs(expected[3:]).max()] * 2])
    np.testing.assert_array_less(np.abs(statistics(found) - expected), tolerance * scale + 1e-12)


def hidden_layers(network: nn.Module, features: torch.Tensor) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
    found: dict[str, np.ndarray] = {}
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, key=key: found.__setitem__(key, out.detach().numpy()))
        for key, module in network.named_modules()
        if key
    ]
    with torch.no_grad():
        out = network(features)
    for hook in hooks:
        hook.remove()
    return out, found


@pytest.mark.parametrize(("configuration", "side"), [("cmdr_224", 224), ("cmdr_56", 56)])
def test_networks_have_the_published_tensors(golden_shapes: Any, configuration: str, side: int) -> None:
    with torch.device("meta"):
        networks = new_networks(side=side)
    for name, network in networks.items():
        shapes = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
        assert shapes == golden_shapes[configuration][PUBLISHED_NAMES[name]]


def test_parameter_counts() -> None:
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in net.parameters()) for name, net in new_networks().items()}
        chunk = PointDecoder(96 * 96)
    assert counts == {
        "rgb_to_points": 3_694_272,
        "points_to_rgb": 3_693_888,
        "rgb_decoder": 5_026_176,
        "point_decoder": 87_840_208,
    }
    assert sum(counts.values()) == 100_254_544
    assert sum(p.numel() for p in chunk.parameters()) == 9_435_088


@pytest.mark.parametrize("name", NAMES)
def test_published_forward(golden_arrays: Golden, golden_sample: Any, small: Networks, name: NetworkName) -> None:
    """Output and every hidden layer in evaluation mode, on a grid whose last window is half full."""
    expected, other = golden_arrays("cmdr_iad"), PUBLISHED_NAMES[name]
    prefix = f"small/eval/{other}"
    out, found = hidden_layers(small[name].eval(), inputs(golden_sample, name))
    rows = expected[f"{prefix}/rows"]
    np.testing.assert_allclose(out[0, expected["small/tok"]], rows, atol=1e-4 * np.abs(rows).max(), rtol=0)
    assert_statistics(out.numpy(), expected[f"{prefix}/stats"])
    compare_hidden(found, expected, prefix)


@pytest.mark.parametrize("name", ["rgb_decoder", "point_decoder"])
def test_published_forward_in_training_mode(
    golden_arrays: Golden, golden_sample: Any, load: Load, name: NetworkName
) -> None:
    """The same with the batch statistics of the sample, and the running statistics that it leaves behind."""
    expected, other = golden_arrays("cmdr_iad"), PUBLISHED_NAMES[name]
    prefix = f"small/train/{other}"
    network = load((name,))[name].train()
    out, found = hidden_layers(network, inputs(golden_sample, name))
    rows = expected[f"{prefix}/rows"]
    np.testing.assert_allclose(out[0, expected["small/tok"]], rows, atol=1e-4 * np.abs(rows).max(), rtol=0)
    compare_hidden(found, expected, prefix)
    buffers = dict(network.named_buffers())
    for key, summary in zip(expected[f"{prefix}/buffers/names"], expected[f"{prefix}/buffers/sum_abs_l2"], strict=True):
        assert_statistics(buffers[str(key)].numpy(), np.array([*summary, *extremes(buffers[str(key)])]))


def extremes(tensor: torch.Tensor) -> tuple[float, float]:
    return float(tensor.min()), float(tensor.max())


def compare_hidden(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], prefix: str) -> None:
    names = expected[f"{prefix}/hidden/names"]
    assert len(names) >= 6
    for i, key in enumerate(map(str, names)):
        # the published activation works in place on what the first layer of the gate gives
        values = found["attention.2" if key == "attention.1" else key]
        shape = tuple(int(size) for size in str(expected[f"{prefix}/hidden/shape"][i]).strip("()").split(",") if size)
        if values.shape != shape:
            # ours has channels last
            values = np.swapaxes(values, 1, 2)
        assert values.shape == shape
        assert_statistics(values, expected[f"{prefix}/hidden/stats"][i])
        if f"{prefix}/hidden/probe" in expected:
            probe = expected[f"{prefix}/hidden/probe"][i]
            places = np.linspace(0, values.size - 1, 257).astype(np.int64)[::8]
            atol = 1e-4 * np.abs(values).max()
            np.testing.assert_allclose(values.reshape(-1)[places], probe, atol=atol, rtol=0)


def test_order_inside_a_window_only_reorders_its_result() -> None:
    torch.manual_seed(0)
    attention = WindowAttention(16).eval()
    tokens = torch.randn(1, 3 * cmdr.WINDOW, 16)
    order = torch.arange(3 * cmdr.WINDOW)
    order[cmdr.WINDOW : 2 * cmdr.WINDOW] = cmdr.WINDOW + torch.randperm(cmdr.WINDOW)
    with torch.no_grad():
        plain, reordered = attention(tokens), attention(tokens[:, order])
    torch.testing.assert_close(reordered, plain[:, order])
    assert torch.equal(reordered[:, : cmdr.WINDOW], plain[:, : cmdr.WINDOW])
    assert torch.equal(reordered[:, 2 * cmdr.WINDOW :], plain[:, 2 * cmdr.WINDOW :])


def test_a_window_does_not_see_another() -> None:
    torch.manual_seed(0)
    attention = WindowAttention(16).eval()
    tokens = torch.randn(1, 2 * cmdr.WINDOW + 5, 16)
    changed = tokens.clone()
    changed[:, cmdr.WINDOW + 3] += 1
    with torch.no_grad():
        differs = (attention(tokens) != attention(changed)).any(dim=2)[0]
    assert differs[cmdr.WINDOW : 2 * cmdr.WINDOW].all()
    assert not differs[: cmdr.WINDOW].any() and not differs[2 * cmdr.WINDOW :].any()


def test_full_image_is_cut_into_392_full_windows() -> None:
    assert 392 * cmdr.WINDOW == 224 * 224


def test_point_decoder_doubles_five_times() -> None:
    assert 1568 * SHORTENING == 224 * 224
    decoder = PointDecoder(64, channels=8)
    assert decoder.projection[0].out_features == 2
    assert decoder(torch.randn(2, 64, 8)).shape == (2, 64, 8)


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    block, tokens = AttentionBlock(16), torch.randn(1, cmdr.WINDOW, 16)
    with torch.no_grad():
        assert not torch.equal(block.train()(tokens), block(tokens))
        assert torch.equal(block.eval()(tokens), block(tokens))


def test_convolutions_are_the_transposed_ones() -> None:
    torch.manual_seed(0)
    same = cmdr._SameConvolution(5, 4)
    maps = torch.randn(2, 5, 7, 6)
    expected = nn.functional.conv_transpose2d(maps, same.weight, same.bias, padding=1)
    torch.testing.assert_close(same(maps), expected)
    doubling = cmdr._DoublingConvolution(5, 4)
    rows = torch.randn(2, 9, 5)
    expected = nn.functional.conv_transpose1d(rows.mT, doubling.weight, doubling.bias, stride=2, padding=1).mT
    torch.testing.assert_close(doubling(rows), expected)


def test_rows_asked_for_are_those_of_the_whole() -> None:
    torch.manual_seed(0)
    decoder, features = RGBDecoder(6).eval(), torch.randn(2, 144, 6)
    kept = torch.rand(2, 144) < 0.3
    with torch.no_grad():
        torch.testing.assert_close(decoder(features, kept), decoder(features)[kept])


def test_reconstructed_point_features_are_bounded() -> None:
    torch.manual_seed(0)
    out = PointDecoder(32, channels=6)(100 * torch.randn(1, 32, 6))
    assert out.shape == (1, 32, 6) and float(out.detach().abs().max()) < 1


@pytest.mark.parametrize("positions", [0, 31, 100])
def test_positions_that_do_not_divide_are_refused(positions: int) -> None:
    with pytest.raises(ValueError, match=f"positions.*{positions}"):
        PointDecoder(positions)


def test_features_of_no_square_image_are_refused() -> None:
    with pytest.raises(ValueError, match="square image, got 150"):
        RGBDecoder(6)(torch.zeros(1, 150, 6))


def test_networks_come_from_the_current_random_stream() -> None:
    torch.manual_seed(3)
    one = new_networks(6, 8, 8)
    torch.manual_seed(3)
    again = new_networks(6, 8, 8, names=("rgb_to_points",))
    assert list(again) == ["rgb_to_points"]
    assert torch.equal(next(one["rgb_to_points"].parameters()), next(again["rgb_to_points"].parameters()))


def test_wrong_tensors_are_named() -> None:
    mapper = Mapper(6, 8)
    tensors = dict(mapper.state_dict())
    tensors["output.bias"] = torch.zeros(9)
    with pytest.raises(WeightsError, match=r"some file: not the tensors of a Mapper.*output\.bias"):
        load_tensors(mapper, tensors, "some file")

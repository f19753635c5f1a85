"""Losses of CMDR-IAD and five training steps against the published code's numbers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mmad_cli.methods.cmdr_iad import learner as cmdr_learner
from mmad_cli.methods.cmdr_iad.config import PUBLISHED_NAMES, NetworkName
from mmad_cli.methods.cmdr_iad.learner import CmdrLearner
from mmad_cli.methods.cmdr_iad.losses import masked_loss, row_loss
from mmad_cli.methods.cmdr_iad.networks import load_tensors, new_networks
from mmad_cli.methods.mapping.dense import DenseFeatures

Golden = Callable[[str], dict[str, np.ndarray]]

# order of the columns of the stored losses
COLUMNS: tuple[NetworkName, ...] = ("points_to_rgb", "rgb_to_points", "rgb_decoder", "point_decoder")


def before_batch_norm(network: nn.Module) -> set[str]:
    """Biases that batch normalisation takes away again: their gradients are rounding noise."""
    found = set()
    for prefix, module in network.named_modules():
        if isinstance(module, nn.Sequential):
            children = list(module.named_children())
            for (name, _), (_, after) in itertools.pairwise(children):
                if isinstance(after, nn.BatchNorm1d | nn.BatchNorm2d):
                    found.add(f"{prefix}.{name}.bias")
    return found


@pytest.mark.parametrize(("ours", "published"), [("cosine", "cos"), ("l2", "l2")])
@pytest.mark.parametrize("stream", ["rgb", "xyz"])
def test_published_loss(golden_arrays: Golden, golden_sample: Any, ours: Any, published: str, stream: str) -> None:
    """Value and gradient of a sample's features against another's."""
    expected, prefix = golden_arrays("cmdr_iad"), f"loss_unit/{published}/{stream}"
    sample, other = golden_sample(0, 56), golden_sample(1, 56)
    valid = torch.from_numpy(sample["xyz"].sum(axis=1) != 0)
    predicted = torch.from_numpy(np.array(sample[stream])).requires_grad_()
    loss = masked_loss(predicted, torch.from_numpy(np.array(other[stream])), valid, ours)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected[f"{prefix}/value"]), rel=1e-4)
    assert predicted.grad is not None
    rows = expected[f"{prefix}/grad_tok"]
    found = predicted.grad[expected["loss_unit/tok"], ::4]
    np.testing.assert_allclose(found, rows, atol=1e-4 * np.abs(rows).max(), rtol=0)
    length = float(predicted.grad.double().norm())
    assert length == pytest.approx(expected[f"{prefix}/grad_stats"][2], rel=1e-4)


def test_nothing_valid_costs_nothing() -> None:
    predicted = torch.randn(5, 3, requires_grad=True)
    loss = masked_loss(predicted, torch.randn(5, 3), torch.zeros(5, dtype=torch.bool))
    loss.backward()
    assert float(loss.detach()) == 0
    assert predicted.grad is not None and not predicted.grad.any()


def test_losses_of_parts_add_up() -> None:
    one, other = torch.randn(10, 4), torch.randn(10, 4)
    for loss in ("cosine", "l2"):
        parts = sum(row_loss(one[i : i + 3], other[i : i + 3], loss, 10) for i in range(0, 10, 3))
        torch.testing.assert_close(parts, row_loss(one, other, loss))


def test_loss_refuses_shapes_that_do_not_belong_together() -> None:
    with pytest.raises(ValueError, match="predicted, observed, valid"):
        masked_loss(torch.zeros(5, 3), torch.zeros(5, 3), torch.ones(4, dtype=torch.bool))


@pytest.mark.slow
def test_published_training(golden_arrays: Golden, dense: Any, golden_state: Any, golden_shapes: Any) -> None:
    """First gradients, losses of five steps and the networks after them."""
    expected = golden_arrays("cmdr_iad")
    networks = new_networks(side=56, dropout=0.0)
    for name, network in networks.items():
        other = PUBLISHED_NAMES[name]
        state = golden_state(other, golden_shapes["cmdr_56"][other])
        load_tensors(network.train(), {key: torch.from_numpy(value) for key, value in state.items()}, other)
    start = {name: copy.deepcopy(network.state_dict()) for name, network in networks.items()}
    learner = CmdrLearner(networks)
    optimisers = [torch.optim.Adam(network.parameters(), lr=1e-3) for network in networks.values()]
    samples = [dense(index, 56) for index in (0, 1)]
    losses = []
    for step in range(5):
        for optimiser in optimisers:
            optimiser.zero_grad()
        terms = learner.backward([samples[step % 2]])
        losses.append([terms[name]["cosine"] for name in COLUMNS])
        if step == 0:
            for name, network in networks.items():
                assert_gradients(network, expected, f"small/grad/{PUBLISHED_NAMES[name]}")
        for optimiser in optimisers:
            optimiser.step()
    np.testing.assert_allclose(losses[0], expected["small/losses"][0], rtol=1e-4)
    np.testing.assert_allclose(losses, expected["small/losses"], rtol=1e-3)
    for name, network in networks.items():
        assert_trained(network, start[name], expected, f"small/final/{PUBLISHED_NAMES[name]}")


def assert_gradients(network: nn.Module, expected: dict[str, np.ndarray], prefix: str) -> None:
    parameters, noise = dict(network.named_parameters()), before_batch_norm(network)
    names = [str(key) for key in expected[f"{prefix}/names"]]
    assert set(names) == set(parameters)
    for key, (_, magnitude, length) in zip(names, expected[f"{prefix}/sum_abs_l2"], strict=True):
        gradient = parameters[key].grad
        assert gradient is not None
        if key in noise:
            assert float(gradient.norm()) < 1e-6
        else:
            assert float(gradient.double().norm()) == pytest.approx(length, rel=1e-4), key
            assert float(gradient.double().abs().sum()) == pytest.approx(magnitude, rel=1e-4), key


def assert_trained(network: nn.Module, start: dict[str, Any], expected: dict[str, np.ndarray], prefix: str) -> None:
    state, noise = network.state_dict(), before_batch_norm(network)
    names = [str(key) for key in expected[f"{prefix}/names"]]
    assert set(names) == set(state)
    rows = zip(names, expected[f"{prefix}/sum_abs_l2"], expected[f"{prefix}/delta_l2"], strict=True)
    for key, (_, _, length), moved in rows:
        value = state[key].double()
        # Adam turns the noise in these biases into steps of its own size; nothing depends on where they end
        if key not in noise:
            assert float(value.norm()) == pytest.approx(length, rel=1e-3, abs=1e-9), key
            assert float((value - start[key].double()).norm()) == pytest.approx(moved, rel=1e-2, abs=1e-9), key


def tiny(channels: int = 6, side: int = 8) -> tuple[dict[NetworkName, nn.Module], list[DenseFeatures]]:
    torch.manual_seed(0)
    networks = new_networks(channels, channels + 2, side, dropout=0.0)
    samples = []
    for _ in range(2):
        valid = torch.rand(side * side) < 0.5
        points = torch.randn(side * side, channels + 2) * valid[:, None]
        samples.append(DenseFeatures(torch.randn(side * side, channels), points, valid, side))
    return networks, samples


def test_learner_equals_the_losses_on_whole_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and gradients on a batch of two, with mappers in tiles and the head on valid pixels only."""
    networks, samples = tiny()
    monkeypatch.setattr(cmdr_learner, "_TILE", 7)
    plain = copy.deepcopy(networks)
    found = CmdrLearner(networks).backward(samples)
    rgb, points, valid = (torch.stack([getattr(s, name) for s in samples]) for name in ("rgb", "points", "valid"))
    for name, network in plain.items():
        inputs = rgb if name.startswith("rgb") else points
        targets = points if name in ("rgb_to_points", "point_decoder") else rgb
        loss = masked_loss(network(inputs), targets, valid)
        loss.backward()
        assert found[name] == {"cosine": pytest.approx(float(loss.detach()), rel=1e-5)}
        for ours, expected in zip(networks[name].parameters(), network.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, expected.grad, atol=1e-6, rtol=1e-3)


def test_learner_groups_every_network_by_itself() -> None:
    networks, _ = tiny()
    assert dict(CmdrLearner(networks).groups) == networks


def test_learner_without_a_valid_pixel_moves_nothing() -> None:
    networks, samples = tiny()
    empty = DenseFeatures(samples[0].rgb, samples[0].points, torch.zeros(64, dtype=torch.bool), 8)
    losses = CmdrLearner(networks).backward([empty])
    assert losses == {name: {"cosine": 0.0} for name in networks}
    for network in networks.values():
        assert all(p.grad is None or not p.grad.any() for p in network.parameters())


def test_fewer_pixels_are_drawn_anew_in_each_step() -> None:
    networks, samples = tiny()
    learner = CmdrLearner(networks, pixels=10)
    valid = torch.stack([sample.valid for sample in samples])
    one, other = learner._chosen(valid), learner._chosen(valid)
    assert int(one.sum()) == int(other.sum()) == 10
    assert not (one & ~valid).any() and not torch.equal(one, other)
    assert learner._chosen(torch.zeros_like(valid)).sum() == 0


def test_learner_names_a_missing_stream() -> None:
    networks, samples = tiny()
    with pytest.raises(ValueError, match="points is needed"):
        CmdrLearner(networks).backward([DenseFeatures(samples[0].rgb, None, samples[0].valid, 8)])

"""The fusion block and its training against the published code's numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmad_cli.errors import WeightsError
from mmad_cli.methods.m3dm import uff, uff_training
from mmad_cli.methods.m3dm.patches import on_point_grid, repeated_cells, scrambled_cells
from mmad_cli.methods.m3dm.uff_training import Batch, Training, annealed_rate, batches, train

Golden = Callable[[str], dict[str, np.ndarray]]


def plain_loss(queries: torch.Tensor, keys: torch.Tensor, temperature: float) -> torch.Tensor:
    target = torch.arange(len(queries))
    return 2 * temperature * torch.nn.functional.cross_entropy(queries @ keys.T / temperature, target)


def test_network_has_the_published_tensors(uff_tensors: dict[str, Any]) -> None:
    network = uff.FusionNetwork()
    assert {k: v.shape for k, v in network.state_dict().items()} == {k: v.shape for k, v in uff_tensors.items()}
    assert sum(p.numel() for p in network.parameters()) == 15_840_896


def test_fused_feature(golden: Golden, uff_tensors: dict[str, Any]) -> None:
    expected = golden("uff")
    network = uff.network_from_tensors(uff_tensors, "stand-in")
    points, rgb = expected["xyz"].astype(np.float32), expected["rgb"].astype(np.float32)
    fused = uff.fuse(network, points, rgb, np.arange(len(rgb)))
    assert not points.any(axis=1).all()
    np.testing.assert_allclose(fused, expected["fusion"], atol=1e-4 * np.abs(expected["fusion"]).max())


def test_distinct_patches_go_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network = uff.new_network(4, 3, seed=1)
    random = np.random.default_rng(0)
    points, rgb = random.standard_normal((3136, 4), np.float32), random.standard_normal((784, 3), np.float32)
    points[1000:] = 0
    fused = uff.fuse(network, points, rgb, repeated_cells(28))
    with torch.inference_mode():
        doubled = rgb.reshape(28, 28, 3).repeat(2, axis=0).repeat(2, axis=1).reshape(-1, 3)
        expected = network(torch.from_numpy(points), torch.from_numpy(doubled)).numpy()
    np.testing.assert_allclose(fused, expected, atol=1e-6)


def test_without_a_network_both_features_stand_side_by_side() -> None:
    points, rgb = np.ones((3136, 2), np.float32), np.arange(784 * 2, dtype=np.float32).reshape(784, 2)
    fused = uff.fuse(None, points, *on_point_grid(rgb, 28))
    assert fused.shape == (3136, 4)
    np.testing.assert_array_equal(fused[56 * 3 + 5, 2:], rgb[28 * 1 + 2])


def test_rgb_grid_that_does_not_divide_56_is_averaged() -> None:
    tokens = np.random.default_rng(0).standard_normal((37 * 37, 2), np.float32)
    distinct, spread = on_point_grid(tokens, 37)
    image = torch.from_numpy(tokens.T.reshape(1, 2, 37, 37))
    expected = torch.nn.functional.adaptive_avg_pool2d(image, 56)[0].reshape(2, -1).T.numpy()
    np.testing.assert_allclose(distinct[spread], expected, atol=1e-6)


def test_published_training_pairs_are_scrambled(golden: Golden) -> None:
    expected = golden("uff")["rgb_patch_of_row"]
    np.testing.assert_array_equal(scrambled_cells(784), expected)
    assert (scrambled_cells(784) == repeated_cells(28)).sum() == 8


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_tiled_loss_equals_cross_entropy(monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    monkeypatch.setattr(uff, "_LOGIT_TILE", 7 * 50)
    generator = torch.Generator().manual_seed(0)
    pair = [torch.randn(50, 8, generator=generator, dtype=torch.float64) for _ in range(2)]
    queries, keys = (torch.nn.functional.normalize(x, dim=1).requires_grad_() for x in pair)
    tiled = uff.contrastive_loss(queries, keys, temperature)
    plain = plain_loss(queries, keys, temperature)
    torch.testing.assert_close(tiled, plain)
    ours, expected = (torch.autograd.grad(3 * loss, (queries, keys)) for loss in (tiled, plain))
    torch.testing.assert_close(ours, expected)


def test_pairs_with_a_zero_in_the_point_feature_are_left_out() -> None:
    network = uff.new_network(4, 3, seed=1)
    points, rgb = torch.randn(20, 4), torch.randn(20, 3)
    expected = network.loss(points[:15], rgb[:15], 1.0)
    points[15:18] = 0
    points[18:, 1] = 0
    torch.testing.assert_close(network.loss(points, rgb, 1.0), expected)
    nothing = network.loss(torch.zeros(5, 4), torch.randn(5, 3), 1.0)
    nothing.backward()
    assert float(nothing.detach()) == 0


def test_loss_refuses_what_it_cannot_compute() -> None:
    rows = torch.ones(3, 2)
    with pytest.raises(ValueError, match="queries, keys"):
        uff.contrastive_loss(rows, rows[:2])
    with pytest.raises(ValueError, match="temperature"):
        uff.contrastive_loss(rows, rows, 0.0)


def test_wrong_tensors_are_named(uff_tensors: dict[str, Any]) -> None:
    without = {k: v for k, v in uff_tensors.items() if k != "rgb_mlp.fc1.weight"}
    with pytest.raises(WeightsError, match=r"some file.*rgb_mlp\.fc1\.weight"):
        uff.network_from_tensors(without, "some file")


@pytest.mark.parametrize(("name", "per_epoch", "accumulate"), [("train", 3, 1), ("train_accum2", 4, 2)])
def test_published_learning_rates(golden: Golden, name: str, per_epoch: int, accumulate: int) -> None:
    plan = list(batches(2 * per_epoch, Training(batch=2, accumulate=accumulate), seed=0))
    np.testing.assert_allclose([batch.rate for batch in plan], golden(f"uff/{name}")["lr"], rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "order", "accumulate"),
    [("train", [0, 1, 2, 3, 4, 5], 1), ("train_accum2", [0, 1, 2, 3, 4, 5, 1, 2], 2)],
)
def test_published_training(
    golden: Golden,
    uff_tensors: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    order: list[int],
    accumulate: int,
) -> None:
    """Losses of every batch and the trained weights, on the batches of the published run."""
    monkeypatch.setattr(uff_training, "_order", lambda count, seed: list(range(count)))
    expected = golden("uff")
    bits = expected["train/high"].astype(np.uint16) << 8 | expected["train/low"]
    samples = torch.from_numpy(bits.view(np.float16).astype(np.float32))
    network = uff.network_from_tensors(uff_tensors, "stand-in")
    settings = Training(batch=2, accumulate=accumulate)

    def pairs(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        sample = samples[order[index]]
        return sample[:, :1152], sample[:, 1152:]

    losses = train(network, pairs, len(order), settings, seed=0)
    np.testing.assert_allclose(losses, expected[f"{name}/loss"], rtol=1e-4)
    if name == "train":
        norms = {key: float(value.double().norm()) for key, value in network.named_parameters()}
        for key, norm in zip(expected["train/param_keys"], expected["train/param_norm_after"], strict=True):
            assert norms[str(key)] == pytest.approx(norm, rel=1e-4)


def test_official_training_makes_30_updates_on_2656_samples() -> None:
    plan = list(batches(2656, Training(), seed=0))
    assert len(plan) == 3 * 166
    assert sum(batch.last for batch in plan) == 30
    assert len({sample for batch in plan[:166] for sample in batch.samples}) == 2656
    assert plan[0].samples != plan[166].samples


def test_a_set_smaller_than_a_batch_is_trained_on() -> None:
    plan = list(batches(3, Training(), seed=0))
    assert [len(batch.samples) for batch in plan] == [3, 3, 3]
    assert all(batch.first and batch.last for batch in plan)


def test_corrected_training_has_a_fixed_length_and_anneals() -> None:
    settings = Training(recipe="corrected", steps=20, cycle=10, batch=2)
    plan = list(batches(7, settings, seed=0))
    assert [batch.rate for batch in plan] == [annealed_rate(step, settings) for step in range(20)]
    assert plan[0].rate == plan[10].rate == settings.rate
    assert plan[9].rate < 0.03 * settings.rate
    assert len({sample for batch in plan[:3] for sample in batch.samples}) == 6
    assert plan[0] == Batch(plan[0].samples, settings.rate, True, True, 1)


class InterruptedTrainingError(Exception):
    pass


def test_interrupted_training_goes_on_with_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uff_training, "_CHECKPOINT_SECONDS", 0.0)
    data = torch.randn(6, 10, 7, generator=torch.Generator().manual_seed(0))
    calls = []

    def pairs(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(index)
        return data[index, :, :4], data[index, :, 4:]

    def breaking(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if len(calls) == 9:
            raise InterruptedTrainingError
        return pairs(index)

    settings = Training(recipe="corrected", steps=8, cycle=4, batch=2, temperature=0.1)
    whole = uff.new_network(4, 3, seed=5)
    losses = train(whole, pairs, 6, settings, seed=2)
    calls.clear()
    with pytest.raises(InterruptedTrainingError):
        train(uff.new_network(4, 3, seed=5), breaking, 6, settings, seed=2, folder=tmp_path)
    assert (tmp_path / uff_training.CHECKPOINT).is_file()
    resumed = uff.new_network(4, 3, seed=5)
    rest = train(resumed, pairs, 6, settings, seed=2, folder=tmp_path)
    assert rest == losses[4:]
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not (tmp_path / uff_training.CHECKPOINT).exists()


def test_a_checkpoint_of_other_settings_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uff_training, "_CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(uff_training._Saver, "remove", lambda self: None)
    data = torch.randn(2, 10, 7)
    settings = Training(recipe="corrected", steps=3, cycle=3, batch=1)
    for identity, count in (("a", 3), ("a", 0), ("b", 3)):
        done = train(
            uff.new_network(4, 3, seed=5),
            lambda index: (data[index, :, :4], data[index, :, 4:]),
            2,
            settings,
            seed=2,
            folder=tmp_path,
            identity=identity,
        )
        assert len(done) == count


def test_half_a_checkpoint_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / uff_training.CHECKPOINT).write_bytes(b"\x10\x00")
    data = torch.randn(1, 10, 7)
    settings = Training(recipe="corrected", steps=1, batch=1)
    network = uff.new_network(4, 3, seed=5)
    pair = (data[0, :, :4], data[0, :, 4:])
    assert len(train(network, lambda _: pair, 1, settings, seed=2, folder=tmp_path)) == 1

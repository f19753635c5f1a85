"""Networks and losses of the importance-aware fusion: sizes, starting point, and every loss against its formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mmad_cli.methods.iaenet import losses
from mmad_cli.methods.iaenet.config import IAENetConfig
from mmad_cli.methods.iaenet.networks import FeatureNetwork, Fusion, ScoreNetwork, context, over_foreground
from mmad_cli.methods.iaenet.training import false_positive_rate

KINDS = ("softmax", "sigmoid", "scaled")


class TestNetworks:
    def test_size_for_three_experts(self) -> None:
        # 9 -> 32 -> 32 with 3 x 3, 32 -> 3 with 1 x 1, each with a bias
        expected = (9 * 9 * 32 + 32) + (9 * 32 * 32 + 32) + (32 * 3 + 3)
        assert sum(p.numel() for p in ScoreNetwork(3).parameters()) == expected == 11_971

    def test_sizes_of_the_network_that_sees_features(self) -> None:
        network = FeatureNetwork([768, 33])
        assert [tuple(layer.weight.shape) for layer in network.direction] == [(64, 768), (64, 33)]
        assert [tuple(layer.weight.shape) for layer in network.prototype] == [(64, 768), (64, 33)]
        assert tuple(network.joined[0][1].weight.shape) == (128, 144)
        assert tuple(network.joined[0][4].weight.shape) == (64, 128)
        assert tuple(network.scorer[0].weight.shape) == (64, 128)

    def test_context(self) -> None:
        scores = torch.rand(1, 2, 5, 5)
        maps = context(scores)
        levels = torch.log1p(scores)
        torch.testing.assert_close(maps[:, 0], levels)
        torch.testing.assert_close(maps[0, 1, 1, 2, 3], levels[0, 1, 1:4, 2:5].mean())
        torch.testing.assert_close(maps[0, 2, 1, 2, 3], levels[0, 1, 1:4, 2:5].max())
        # a corner has four cells, not nine of which five are empty
        torch.testing.assert_close(maps[0, 1, 0, 0, 0], levels[0, 0, :2, :2].mean())

    @pytest.mark.parametrize("kind", KINDS)
    def test_an_untrained_fusion_is_the_plain_mean(self, kind: str) -> None:
        torch.manual_seed(0)
        fusion = Fusion(ScoreNetwork(3), 3, kind)  # type: ignore[arg-type]
        logits = fusion.network(torch.rand(2, 3, 6, 6))
        torch.testing.assert_close(fusion.weights(logits.permute(0, 2, 3, 1)), torch.full((2, 6, 6, 3), 1 / 3))

    @pytest.mark.parametrize("kind", KINDS)
    def test_ranges_of_the_weights(self, kind: str) -> None:
        weights = Fusion(ScoreNetwork(2), 2, kind).weights(10 * torch.randn(500, 2))  # type: ignore[arg-type]
        assert weights.min() >= 0
        if kind == "softmax":
            torch.testing.assert_close(weights.sum(-1), torch.ones(500))
        elif kind == "sigmoid":
            assert weights.max() <= 1
        else:
            assert weights.min() >= math.exp(-1) / 2
            assert weights.max() <= math.e / 2

    def test_probability_is_a_half_at_the_false_alarm_level(self) -> None:
        fusion = Fusion(ScoreNetwork(2), 2)
        assert float(fusion.log_odds(torch.tensor(1.0)).detach()) == pytest.approx(0, abs=1e-5)
        assert float(fusion.log_odds(torch.tensor(1.5)).detach()) > 0

    def test_weights_of_a_whole_scan(self) -> None:
        logits, front = torch.randn(2, 3, 4, 4), torch.rand(2, 4, 4) < 0.5
        patchwise = over_foreground(logits, front, "patch")
        torch.testing.assert_close(patchwise[0], logits[0, :, *torch.nonzero(front[0])[0].tolist()])
        whole = over_foreground(logits, front, "image")
        first = int(front[0].sum())
        assert len(whole) == int(front.sum())
        torch.testing.assert_close(whole[:first], logits[0][:, front[0]].mean(1).expand(first, 3))


@pytest.fixture
def patches() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """u (n, 3), weights (n, 3), fused (n,), label (n,)."""
    rng = np.random.default_rng(0)
    u, weights = rng.uniform(0.05, 3, (60, 3)), rng.dirichlet([1, 1, 1], 60)
    return u, weights, (u * weights).sum(1), rng.random(60) < 0.3


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in arrays]


class TestLosses:
    """Each against a loop that follows the formula patch by patch."""

    def test_detection(self) -> None:
        log_odds, label = np.array([-1.0, 0.5, 2.0, 0.1]), np.array([False, True, True, False])
        p = 1 / (1 + np.exp(-log_odds))
        expected = -0.5 * (np.log(p[label]).mean() + np.log(1 - p[~label]).mean())
        assert float(losses.detection(*tensors(log_odds, label))) == pytest.approx(expected)

    def test_collective(self, patches: tuple[np.ndarray, ...]) -> None:
        u, _, fused, label = patches
        below = [max(row.mean() - s, 0) / (1 + row.mean()) for row, s in zip(u[label], fused[label], strict=True)]
        above = [max(s - row.mean(), 0) / (1 + row.mean()) for row, s in zip(u[~label], fused[~label], strict=True)]
        assert float(losses.collective(*tensors(u, fused, label))) == pytest.approx(np.mean(below) + np.mean(above))
        assert float(losses.collective(*tensors(u, u.mean(1), label))) == pytest.approx(0)

    def test_strengths(self, patches: tuple[np.ndarray, ...]) -> None:
        u, _, fused, label = patches
        lost = [
            (r.max() > 1) * max(0.8 * r.max() - s, 0) / r.max() for r, s in zip(u[label], fused[label], strict=True)
        ]
        loud = [(r.max() > 1 and r.min() <= 1) * max(s - 0.9, 0) for r, s in zip(u[~label], fused[~label], strict=True)]
        assert sum(loud) > 0
        assert float(losses.strengths(*tensors(u, fused, label))) == pytest.approx(np.mean(lost) + np.mean(loud))

    def test_importance(self, patches: tuple[np.ndarray, ...]) -> None:
        u, weights, _, label = patches
        kinds: dict[bool, list[float]] = {True: [], False: []}
        for row, given, anomalous in zip(u, weights, label, strict=True):
            if row.max() <= 1.2 * row.min():
                continue
            target = np.exp((1 if anomalous else -1) * np.log(row) / 0.5)
            target /= target.sum()
            kinds[bool(anomalous)].append(float((target * np.log(target / given)).sum()))
        expected = np.mean([np.mean(values) for values in kinds.values()])
        got = losses.importance(*tensors(u, weights, label), 0.5)
        assert float(got) == pytest.approx(expected)

    def test_importance_leaves_agreement_alone(self) -> None:
        u, weights = torch.tensor([[1.0, 1.1]]), torch.tensor([[0.9, 0.1]])
        assert float(losses.importance(u, weights, torch.tensor([True]), 0.5)) == 0

    def test_balance(self, patches: tuple[np.ndarray, ...]) -> None:
        _, weights, _, label = patches
        mean = (weights[label].mean(0) + weights[~label].mean(0)) / 2
        expected = (mean * np.log(mean * 3)).sum()
        assert float(losses.balance(*tensors(weights, label))) == pytest.approx(expected)
        assert float(losses.balance(torch.full((4, 2), 0.5), torch.tensor([True, False] * 2))) == pytest.approx(0)

    def test_the_total_weighs_each_term(self, patches: tuple[np.ndarray, ...]) -> None:
        u, weights, fused, label = tensors(*patches)
        config = IAENetConfig(loss_det=2, loss_col=3, loss_str=5, loss_imp=7, loss_bal=11)
        total, terms = losses.total(u, fused, weights, fused - 1, label, config)
        parts = {"det": 2, "col": 3, "str": 5, "imp": 7, "bal": 11}
        assert float(total) == pytest.approx(sum(factor * terms[name] for name, factor in parts.items()))
        assert terms["total"] == pytest.approx(float(total))

    def test_one_kind_of_patch_alone(self, patches: tuple[np.ndarray, ...]) -> None:
        u, weights, fused, label = tensors(*patches)
        for chosen in (label, ~label):
            kept = [value[chosen] for value in (u, fused, weights, fused - 1, label)]
            total, _ = losses.total(*kept, IAENetConfig())
            assert math.isfinite(float(total))


def test_false_positive_rate() -> None:
    fused = np.arange(40, dtype=np.float32)
    label = np.zeros(40, dtype=bool)
    label[20:] = True
    assert false_positive_rate(fused, label) == 0
    # 19 of 20 anomalous patches are at 21 or above; the one at 0 need not be found
    swapped = fused.copy()
    swapped[[0, 20]] = swapped[[20, 0]]
    assert false_positive_rate(swapped, label) == 0
    # now one at 10 must be: above it are the normal patches at 11 to 19, and those at 20 and 21
    swapped[[10, 21]] = swapped[[21, 10]]
    assert false_positive_rate(swapped, label) == 11 / 20
    assert false_positive_rate(fused, np.zeros(40, dtype=bool)) == 1

"""G2SF: size of the network, every loss term against its formula, training, inference."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mmad_cli.errors import DataError, UsageError
from mmad_cli.methods import build_config, get_method
from mmad_cli.methods.checks import GeneratedFeatures, generated_sample
from mmad_cli.methods.g2sf import losses
from mmad_cli.methods.g2sf.config import G2SFConfig
from mmad_cli.methods.g2sf.method import G2SF
from mmad_cli.methods.g2sf.network import LocalScaleNetwork, metric
from mmad_cli.methods.g2sf.pool import Pool, Side
from mmad_cli.methods.g2sf.training import _shuffled, _Trainer, balanced, divide, train

RANKS = 11


class TestNetwork:
    def test_parameters_at_the_published_size(self) -> None:
        network = LocalScaleNetwork(768 + 1152)
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in network.named_children()}
        # 1920 -> 512 -> 128 twice, 256 -> 256 -> 2
        assert counts == {"direction": 1_049_216, "prototype": 1_049_216, "head": 66_306}
        assert sum(counts.values()) == 2_164_738
        assert network.global_scale.numel() == 2
        assert [tuple(weight.shape) for weight in network.linear_weights()] == [
            (512, 1920), (128, 512), (512, 1920), (128, 512), (256, 256), (2, 256)
        ]  # fmt: skip

    def test_output_is_the_exponential_of_a_hyperbolic_tangent(self) -> None:
        torch.manual_seed(0)
        network = LocalScaleNetwork(6).eval()
        difference, prototypes = torch.randn(2, 5, 3, 6)
        w = {name: value.double().numpy() for name, value in network.state_dict().items()}

        def perceptron(name: str, x: np.ndarray) -> np.ndarray:
            hidden = np.maximum(x @ w[f"{name}.0.weight"].T + w[f"{name}.0.bias"], 0)
            return hidden @ w[f"{name}.3.weight"].T + w[f"{name}.3.bias"]

        d, m = difference.double().numpy(), prototypes.double().numpy()
        direction = 5 * d / np.maximum(np.linalg.norm(d, axis=-1, keepdims=True), 1e-3)
        joined = np.concatenate([perceptron("direction", direction), perceptron("prototype", m)], -1)
        expected = np.exp(np.tanh(perceptron("head", joined)))
        got = network(difference, prototypes).detach().numpy()
        np.testing.assert_allclose(got, expected, rtol=1e-5)
        assert got.min() >= math.exp(-1)
        assert got.max() <= math.e

    def test_a_tiny_difference_is_not_blown_up(self) -> None:
        """The length is not divided out below 1e-3."""
        network = LocalScaleNetwork(4).eval()
        zeros = torch.zeros(1, 4)
        near = network(torch.full((1, 4), 1e-9), zeros)
        torch.testing.assert_close(near, network(zeros, zeros), atol=1e-5, rtol=0)

    def test_global_scales_start_equal_and_sum_to_one(self) -> None:
        network = LocalScaleNetwork(4)
        assert network.global_scales().tolist() == [0.5, 0.5]
        network.global_scale.data = torch.tensor([0.7, -0.2])
        share = 0.5 * (np.tanh([0.7, -0.2]) + 1)
        np.testing.assert_allclose(network.global_scales().detach(), share / share.sum(), rtol=1e-6)

    def test_with_scales_of_one_the_metric_is_the_weighted_sum(self) -> None:
        distances = torch.rand(4, 3, 2)
        got = metric(torch.ones(4, 3, 2), distances, torch.tensor([0.3, 0.7]))
        torch.testing.assert_close(got, 0.3 * distances[..., 0] + 0.7 * distances[..., 1])


@pytest.fixture
def batch() -> SimpleNamespace:
    rng = np.random.default_rng(0)
    return SimpleNamespace(q=rng.uniform(0.1, 4, 40), label=rng.random(40) < 0.4, local=rng.uniform(0.4, 2.7, (40, 2)))


def tensors(batch: SimpleNamespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.from_numpy(batch.q), torch.from_numpy(batch.label), torch.from_numpy(batch.local)


class TestLosses:
    """Each against a loop that follows the formula patch by patch."""

    @pytest.mark.parametrize("weighted", [True, False])
    def test_separation(self, batch: SimpleNamespace, weighted: bool) -> None:
        largest, total = 2.5, 0.0
        for q, anomalous in zip(batch.q, batch.label, strict=True):
            inverse = 1 / (q + 1e-5)
            if anomalous:
                total += (min(max(inverse**2, 0.33), 3) if weighted else 1) * max(inverse - 1 / largest, 0)
            else:
                total += (min(max(q**2, 0.33), 3) if weighted else 1) * q
        q, label, _ = tensors(batch)
        assert float(losses.separation(q, label, largest, weighted=weighted)) == pytest.approx(total / 40)

    def test_weights_of_separation_carry_gradient(self) -> None:
        q = torch.tensor([1.0], requires_grad=True)
        losses.separation(q, torch.tensor([False]), 1.0, weighted=True).backward()
        # d(q^2 q) / dq, not d(q) / dq
        assert float(q.grad) == pytest.approx(3.0)

    def test_margin(self, batch: SimpleNamespace) -> None:
        scaled = batch.q / batch.q[~batch.label].max()
        lowest = scaled[batch.label].min()
        total = sum(max(v - lowest, 0) for v in scaled[~batch.label]) + sum(max(1 - v, 0) for v in scaled[batch.label])
        q, label, _ = tensors(batch)
        assert float(losses.margin(q, label)) == pytest.approx(total / 40)
        assert float(losses.margin(q, torch.zeros_like(label))) == 0
        apart = torch.tensor([1.0, 2.0, 5.0, 9.0], dtype=torch.float64)
        assert float(losses.margin(apart, torch.tensor([False, False, True, True]))) == 0

    def test_consistency(self) -> None:
        rng = np.random.default_rng(1)
        metrics, distances = rng.uniform(0.5, 2, (7, RANKS)), np.sort(rng.uniform(0.5, 2, (7, RANKS)), 1)
        near = sum(
            np.mean([max(m[j] - 1.2 * s[j] / s[0] * m[0], 0) for m, s in zip(metrics, distances, strict=True)])
            for j in range(1, 6)
        )
        far = sum(np.mean([max(m[0] - m[j], 0) for m in metrics]) for j in range(6, 11))
        got = losses.consistency(torch.from_numpy(metrics), torch.from_numpy(distances), 5, 1.2)
        assert float(got) == pytest.approx(near / 5 + far / 5)

    def test_scale(self, batch: SimpleNamespace) -> None:
        expected = np.mean(math.e - batch.local[batch.label]) + np.mean(np.maximum(batch.local[~batch.label] - 1, 0))
        _, label, local = tensors(batch)
        assert float(losses.scale(local, label)) == pytest.approx(expected)
        assert float(losses.scale(local, torch.zeros_like(label))) == pytest.approx(
            np.maximum(batch.local - 1, 0).mean()
        )

    def test_cross_modal_and_l1(self, batch: SimpleNamespace) -> None:
        _, _, local = tensors(batch)
        assert float(losses.cross_modal(local)) == pytest.approx(math.e - batch.local.mean())
        assert float(losses.l1([torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0]])])) == 6


def make_pool(count: int = 400, seed: int = 0) -> Pool:
    """Normal patches near their prototypes, anomalous ones far from them in one modality."""
    rng = torch.Generator().manual_seed(seed)
    anomalous = torch.rand(count, generator=rng) < 0.2
    sides = []
    for width in (4, 3):
        bank = torch.randn(30, width, generator=rng)
        noise = torch.randn(count, width, generator=rng)
        far = anomalous & (torch.rand(count, generator=rng) < 0.7)
        rows = bank[torch.randint(30, (count,), generator=rng)] + noise * torch.where(far, 2.0, 0.3)[:, None]
        distances, neighbours = torch.cdist(rows, bank).topk(RANKS, largest=False)
        sides.append(Side(rows, torch.arange(count), neighbours, distances[:, 0], bank))
    group = torch.arange(count) % 4
    return Pool((sides[0], sides[1]), anomalous, group, torch.arange(count) % 8)


def directed_pool(count: int, seed: int = 0) -> Pool:
    """Anomalous patches are about as far from their prototypes as normal ones, but always on the same side."""
    rng = torch.Generator().manual_seed(seed)
    anomalous = torch.rand(count, generator=rng) < 0.3
    sides = []
    for width in (4, 3):
        bank = 20 * torch.randn(30, width, generator=rng)
        step = 0.5 * torch.nn.functional.normalize(torch.randn(count, width, generator=rng), dim=1)
        step[:, 0] = torch.where(anomalous, 0.6, -0.1)
        rows = bank[torch.randint(30, (count,), generator=rng)] + step
        distances, neighbours = torch.cdist(rows, bank).topk(RANKS, largest=False)
        sides.append(Side(rows, torch.arange(count), neighbours, distances[:, 0], bank))
    group = torch.arange(count) % 4
    return Pool((sides[0], sides[1]), anomalous, group, torch.arange(count) % 8)


SMALL = {"variant": "cnn+fpfh", "epochs": 4, "batch": 64, "batch_share": 1.0}


class TestTraining:
    def test_the_total_is_the_weighted_sum_of_its_terms(self) -> None:
        pool = make_pool()
        trainer = _Trainer(pool, G2SFConfig(**SMALL, noise=0.0, dropout=0.0))
        network, patches = trainer.network, torch.arange(60)
        torch.manual_seed(5)
        total = float(trainer.loss(patches).detach())
        around = trainer.tuples(patches, RANKS)
        scales, label = network.global_scales(), pool.anomalous[patches]
        local = around.local(network, slice(None))
        metrics = metric(local, around.distances, scales)
        q = metrics[:, 0] ** 2
        torch.manual_seed(5)
        mismatched = trainer._mismatched(trainer.tuples(patches, 1))
        expected = (
            losses.separation(q, label, trainer.largest, weighted=True)
            + 10 * losses.margin(q, label)
            + 40 * losses.consistency(metrics, around.distances.mean(-1), 5, 1.2)
            + 3 * losses.scale(local[:, 0], label)
            + 20 * losses.cross_modal(mismatched)
            + 5e-4 * losses.l1(network.linear_weights())
        )
        assert total == pytest.approx(float(expected.detach()), rel=1e-5)

    def test_units_and_bound_come_from_the_training_half(self) -> None:
        pool = make_pool()
        trainer = _Trainer(pool, G2SFConfig(**SMALL))
        normal = [i for i in trainer.train.tolist() if not pool.anomalous[i]]
        anomalous = [i for i in trainer.train.tolist() if pool.anomalous[i]]
        for side, unit in zip(pool.sides, trainer.units, strict=True):
            assert unit == pytest.approx(float(side.nearest[normal].mean()), rel=1e-5)
        largest = max(float(s.nearest[anomalous].max()) / u for s, u in zip(pool.sides, trainer.units, strict=True))
        assert trainer.largest == pytest.approx(2 * largest)

    def test_batch_size_is_a_share_of_the_training_half(self) -> None:
        assert _Trainer(make_pool(), G2SFConfig()).size == int(0.035 * 200)
        assert _Trainer(make_pool(), G2SFConfig(batch=5)).size == 5

    def test_distances_are_those_of_the_tuples(self) -> None:
        pool = make_pool()
        trainer = _Trainer(pool, G2SFConfig(**SMALL))
        patches = torch.arange(20)
        plain = trainer.tuples(patches, 3, noisy=False)
        for m, (side, unit) in enumerate(zip(pool.sides, trainer.units, strict=True)):
            torch.testing.assert_close(plain.distances[:, 0, m], side.nearest[:20] / unit)
        noisy = trainer.tuples(patches, 3)
        width = pool.sides[0].bank.shape[1]
        moved = (noisy.features - plain.features)[:, :width]
        assert (moved >= 0).all()
        assert 0 < float(moved.norm(dim=-1).max()) <= 0.1 * trainer.units[0] * 1.001
        assert (noisy.prototypes[:, 0] != plain.prototypes[:, 0]).any()
        again = (noisy.features[:, None] - noisy.prototypes)[..., :width].norm(dim=-1) / trainer.units[0]
        torch.testing.assert_close(noisy.distances[..., 0], again)

    def test_mismatched_modalities(self) -> None:
        rows = torch.arange(40).float().repeat_interleave(3).reshape(40, 3)
        torch.manual_seed(0)
        mixed = _shuffled(rows, 2)
        assert sorted(mixed[:, 0].tolist()) == sorted(mixed[:, 2].tolist()) == list(range(40))
        assert (mixed[:, 0] == mixed[:, 1]).all()
        assert (mixed[:, 0] != mixed[:, 2]).sum() > 30

    def test_draws_are_balanced(self) -> None:
        pool = make_pool()
        torch.manual_seed(0)
        drawn = balanced(pool, torch.arange(100, 400), 4000)
        assert drawn.min() >= 100
        assert pool.anomalous[drawn].float().mean() == pytest.approx(0.5, abs=0.03)
        normal = drawn[~pool.anomalous[drawn]]
        counts = torch.bincount(normal, minlength=400)[100:][~pool.anomalous[100:]]
        assert (counts > 0).all()
        assert counts.float().mean() == pytest.approx(2000 / len(counts), rel=0.05)

    @pytest.mark.parametrize("split", ["patch", "sample"])
    def test_split(self, split: str) -> None:
        pool = make_pool()
        torch.manual_seed(0)
        first, second = divide(pool, split)
        assert sorted([*first.tolist(), *second.tolist()]) == list(range(400))
        assert len(first) == 200
        shared = set(pool.group[first].tolist()) & set(pool.group[second].tolist())
        assert shared == (set() if split == "sample" else {0, 1, 2, 3})

    def test_one_training_scan_is_divided_by_its_pseudo_anomalies(self) -> None:
        pool = make_pool()
        alone = Pool(pool.sides, pool.anomalous, torch.zeros_like(pool.group), pool.drawn)
        first, second = divide(alone, "sample")
        assert not set(pool.drawn[first].tolist()) & set(pool.drawn[second].tolist())

    def test_a_half_without_defects_is_replaced(self) -> None:
        pool = make_pool()
        one = Pool(pool.sides, pool.group == 0, pool.group, pool.drawn)
        halves = divide(one, "sample")
        assert sorted(len(half) for half in halves) == [200, 400]

    def test_seed_decides_and_streams_are_left_alone(self) -> None:
        pool, config = make_pool(), G2SFConfig(**SMALL)
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first = train(pool, config, seed=3)
        assert torch.equal(before, torch.get_rng_state())
        torch.manual_seed(99)
        again, other = train(pool, config, seed=3), train(pool, config, seed=4)
        assert first.history == again.history != other.history
        for name, value in first.network.state_dict().items():
            assert torch.equal(value, again.network.state_dict()[name])

    def test_training_separates_and_keeps_the_best_epoch(self) -> None:
        pool = directed_pool(800)
        # without the alignment loss: seven channels do not tell mismatched modalities from matching ones, and it rules
        config = G2SFConfig(**{**SMALL, "epochs": 25, "mu": 0})
        trained = train(pool, config, seed=0)
        assert min(trained.history) < 0.8 * trained.history[0]
        # the validation loss of the network that is kept, on the same fixed batches
        with torch.random.fork_rng():
            torch.manual_seed(0)
            trainer = _Trainer(pool, config)
            checks = torch.split(balanced(pool, trainer.validation, len(trainer.validation)), trainer.size)
        trainer.network.load_state_dict(trained.network.state_dict())
        assert trainer._validate(checks) == pytest.approx(min(trained.history), rel=1e-6)

    def test_a_pool_without_defects_is_refused(self) -> None:
        pool = make_pool()
        with pytest.raises(ValueError, match="0 anomalous of 400"):
            train(Pool(pool.sides, torch.zeros(400, dtype=torch.bool), pool.group, pool.drawn), G2SFConfig(), seed=0)


def data(method: G2SF, split: str, count: int) -> GeneratedFeatures:
    specs = {name: s for name, s in method.features().items() if split == "train" or s.augmentation is None}
    return GeneratedFeatures([generated_sample(specs, f"{split}/good/{i:03d}") for i in range(count)])


FAST = {"coreset_fraction": 0.02, "pseudo_per_sample": 1, "batch_share": 1.0, "batch": 256, "consistency_share": 0.05}


class TestMethod:
    def fitted(self, **settings: object) -> G2SF:
        method = G2SF(G2SFConfig(variant="cnn+fpfh", **{**FAST, **settings}))  # type: ignore[arg-type]
        method.fit(data(method, "train", 2), GeneratedFeatures([]), seed=0)
        return method

    def test_without_training_it_is_the_sum_of_both_scores(self) -> None:
        method = self.fitted(epochs=0, aggregation="nearest")
        (sample,) = data(method, "test", 1)
        assert method.network_ is None
        maps = [expert.score_map(sample) / unit for expert, unit in zip(method.experts_, method.units_, strict=True)]
        np.testing.assert_allclose(method.patch_scores(sample), 0.5 * maps[0] + 0.5 * maps[1], rtol=1e-5)
        prediction = method.predict(sample)
        assert prediction.image_score == pytest.approx(float(method.patch_scores(sample).max()))

    def test_scores_of_a_trained_network(self) -> None:
        """Patch by patch from banks, network and units; background keeps scales of 1."""
        method = self.fitted(epochs=1)
        (sample,) = data(method, "test", 1)
        assert method.network_ is not None
        cells = [expert.cells(sample) for expert in method.experts_]
        shares = method.network_.global_scales().numpy()
        scores = method.patch_scores(sample)
        front = np.flatnonzero(cells[1].filled)
        for cell in (0, int(front[0]), int(front[300])):
            metrics = []
            for rank in range(6):
                features, prototypes, distances = [], [], []
                for expert, one, unit in zip(method.experts_, cells, method.units_, strict=True):
                    row = expert.bank_.normalise(one.rows[one.row[cell]][None])
                    distance, index = expert.bank_.nearest(row, 6)
                    features.append(row[0])
                    prototypes.append(expert.bank_.rows_[index[0, rank]])
                    distances.append(distance[0, rank] / unit)
                x, m = (torch.from_numpy(np.concatenate(part)) for part in (features, prototypes))
                local = method.network_(x - m, m).numpy() if cell in front else np.ones(2)
                metrics.append(float((local * distances * shares).sum()))
            assert scores[cell] == pytest.approx(min(metrics), rel=1e-4)

    @pytest.mark.parametrize("aggregation", ["min", "nearest", "mean", "max"])
    def test_aggregation(self, aggregation: str) -> None:
        method = self.fitted(epochs=0, aggregation=aggregation)
        (sample,) = data(method, "test", 1)
        metrics = method._metrics([expert.cells(sample) for expert in method.experts_], 6)
        picked = {"min": metrics.min(1), "nearest": metrics[:, 0], "mean": metrics.mean(1), "max": metrics.max(1)}
        np.testing.assert_allclose(method.patch_scores(sample), picked[aggregation], rtol=1e-6)

    def test_pseudo_anomalies_without_a_defect_are_named(self) -> None:
        method = G2SF(G2SFConfig(variant="cnn+fpfh", **FAST))  # type: ignore[arg-type]
        train_set = data(method, "train", 1)
        (sample,) = train_set.samples
        sample.arrays["points_pseudo0"]["pseudo_mask"] = np.zeros((224, 224), bool)
        with pytest.raises(DataError, match="pseudo anomalies"):
            method.fit(train_set, GeneratedFeatures([]), seed=0)

    def test_published_defaults(self) -> None:
        config = G2SFConfig()
        assert (config.alpha, config.beta, config.gamma, config.mu, config.l1) == (10, 40, 3, 20, 5e-4)
        assert (config.rate, config.global_rate, config.weight_decay, config.epochs) == (1.5e-4, 5e-3, 1e-4, 80)
        assert (config.batch, config.batch_share, config.pseudo_samples, config.groups) == (8192, 0.035, 800, 512)
        assert (config.proximal, config.distal, config.neighbours, config.noise) == (5, 10, 5, 0.1)
        specs = G2SF(config).features()
        assert specs["rgb"].params["model"] == "vit_base_patch8_224.dino"
        assert specs["points"].params["groups"] == 512

    def test_pseudo_anomalies_of_all_training_samples_at_most_800(self) -> None:
        for count in (210, 361):
            made = sum(a.wanted(i, count) for a in G2SFConfig().augmentations for i in range(count))
            assert made == 800

    def test_wrong_switches(self) -> None:
        with pytest.raises(UsageError, match="distal"):
            build_config(get_method("g2sf"), None, "official", {"distal": 5})

    def test_memory_estimate_at_the_published_size(self) -> None:
        estimate = G2SF(G2SFConfig()).memory_estimate(266)
        assert 5e9 < estimate < 30e9

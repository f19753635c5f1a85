"""Training of the local scale network on patches of pseudo anomalies."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmad_cli.methods.g2sf import losses
from mmad_cli.methods.g2sf.config import G2SFConfig
from mmad_cli.methods.g2sf.network import LocalScaleNetwork, metric
from mmad_cli.methods.g2sf.pool import Pool

_SMALLEST = 1e-12


@dataclass(frozen=True)
class Trained:
    """The network of the best epoch, None without epochs; unit of distance of each modality; validation losses."""

    network: LocalScaleNetwork | None
    units: tuple[float, float]
    history: list[float]


@dataclass(frozen=True)
class Tuples:
    """Features, prototypes and their distances of some patches.

    features: (b, C) of RGB and points side by side; prototypes (b, J, C) likewise; distances (b, J, 2) in units.
    """

    features: Tensor
    prototypes: Tensor
    distances: Tensor

    def local(self, network: LocalScaleNetwork, ranks: slice) -> Tensor:
        """Local scales (b, j, 2) for some ranks of prototypes."""
        prototypes = self.prototypes[:, ranks]
        out: Tensor = network(self.features[:, None] - prototypes, prototypes)
        return out


def train(pool: Pool, config: G2SFConfig, *, seed: int, progress: Callable[[int, int], None] | None = None) -> Trained:
    """Train on one half of the patches and keep the epoch that is best on the other.

    Everything random comes from `seed`; the global random streams are left as they were. Raises ValueError for a pool
    without normal or without anomalous patches.
    """
    if pool.anomalous.all() or not pool.anomalous.any():
        anomalous = int(pool.anomalous.sum())
        raise ValueError(f"pool: must hold normal and anomalous patches, got {anomalous} anomalous of {len(pool)}")
    device = pool.anomalous.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return _Trainer(pool, config).run(progress)


def divide(pool: Pool, split: str) -> tuple[Tensor, Tensor]:
    """Patches for training and for validation, half each; draws from the global stream.

    `patch`: at random. `sample`: by training scan; by pseudo anomaly where there is one scan only. A half without
    anomalous or without normal patches is replaced by all of them.
    """
    everything = torch.arange(len(pool), device=pool.anomalous.device)
    if split == "patch":
        chosen = torch.randperm(len(pool)).to(everything.device) < len(pool) // 2
    else:
        key = pool.group if bool((pool.group != pool.group[0]).any()) else pool.drawn
        names = torch.unique(key)
        first = names[torch.randperm(len(names)).to(names.device)[: max(1, len(names) // 2)]]
        chosen = torch.isin(key, first)
    halves = everything[chosen], everything[~chosen]
    sound = [bool(len(h)) and bool(pool.anomalous[h].any()) and not bool(pool.anomalous[h].all()) for h in halves]
    return tuple(half if fine else everything for half, fine in zip(halves, sound, strict=True))  # type: ignore[return-value]


def balanced(pool: Pool, patches: Tensor, count: int) -> Tensor:
    """`count` of the patches with replacement, both kinds equally likely; draws from the global stream."""
    label = pool.anomalous[patches].double().cpu()
    weight = torch.where(label > 0, 1 / label.sum(), 1 / (1 - label).sum())
    # by cumulated weights: torch.multinomial takes 2^24 kinds at most
    edges = weight.cumsum(0)
    places = torch.searchsorted(edges, torch.rand(count, dtype=torch.float64) * edges[-1], right=True)
    return patches[places.clamp_max(len(patches) - 1).to(patches.device)]


class _Trainer:
    """One training."""

    def __init__(self, pool: Pool, config: G2SFConfig) -> None:
        self.pool, self.config = pool, config
        self.train, self.validation = divide(pool, config.split)
        normal = self.train[~pool.anomalous[self.train]]
        anomalous = self.train[pool.anomalous[self.train]]
        self.units = tuple(max(float(side.first_distance(normal).double().mean()), _SMALLEST) for side in pool.sides)
        farthest = [
            float(side.first_distance(anomalous).max()) / unit
            for side, unit in zip(pool.sides, self.units, strict=True)
        ]
        self.largest = max(2 * max(farthest), _SMALLEST)
        channels = sum(side.bank.shape[1] for side in pool.sides)
        self.network = LocalScaleNetwork(channels, config.dropout).to(pool.anomalous.device)
        weights = [p for name, p in self.network.named_parameters() if name != "global_scale"]
        groups = [
            {"params": weights, "lr": config.rate},
            {"params": [self.network.global_scale], "lr": config.global_rate},
        ]
        self.optimiser = torch.optim.Adam(groups, weight_decay=config.weight_decay)
        self.size = max(2, min(config.batch, int(config.batch_share * len(self.train))))

    def run(self, progress: Callable[[int, int], None] | None) -> Trained:
        """All epochs; the one with the lowest validation loss is kept."""
        config = self.config
        if not config.epochs:
            return Trained(None, (self.units[0], self.units[1]), [])
        steps = math.ceil(len(self.train) / self.size)
        checks = torch.split(balanced(self.pool, self.validation, len(self.validation)), self.size)
        history: list[float] = []
        best = copy.deepcopy(self.network.state_dict())
        for epoch in range(config.epochs):
            self.network.train()
            for step, patches in enumerate(torch.split(balanced(self.pool, self.train, len(self.train)), self.size)):
                self._step(patches)
                if progress is not None:
                    progress(epoch * steps + step + 1, config.epochs * steps)
            history.append(self._validate(checks))
            if history[-1] <= min(history):
                best = copy.deepcopy(self.network.state_dict())
        self.network.load_state_dict(best)
        return Trained(self.network.eval().requires_grad_(False), (self.units[0], self.units[1]), history)

    def _step(self, patches: Tensor) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        self.loss(patches).backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()

    def loss(self, patches: Tensor) -> Tensor:
        """L_sep + alpha L_mar + beta L_cns + gamma L_sc + mu L_cma + l1 L_1 of a batch of patches (B,)."""
        config, network = self.config, self.network
        label = self.pool.anomalous[patches]
        shared = max(1, math.ceil(config.consistency_share * len(patches)))
        scales = network.global_scales()
        near = self.tuples(patches, 1)
        local = near.local(network, slice(0, 1))[:, 0]
        q = metric(local, near.distances[:, 0], scales) ** config.metric_power
        total = losses.separation(q, label, self.largest, weighted=config.separation_weights == "clamped")
        total = total + config.alpha * losses.margin(q, label) + config.gamma * losses.scale(local, label)
        if config.beta:
            around = self.tuples(patches[:shared], config.distal + 1)
            metrics = metric(around.local(network, slice(None)), around.distances, scales)
            total = total + config.beta * losses.consistency(
                metrics, around.distances.mean(dim=-1), config.proximal, config.proximal_factor
            )
        if config.mu:
            total = total + config.mu * losses.cross_modal(self._mismatched(near))
        return total + config.l1 * losses.l1(network.linear_weights())

    def tuples(self, patches: Tensor, ranks: int, *, noisy: bool = True) -> Tuples:
        """Features and prototypes, each moved by a random non-negative vector of up to `noise` units."""
        features, prototypes, distances = [], [], []
        for side, unit in zip(self.pool.sides, self.units, strict=True):
            feature, prototype = side.gather(patches, ranks)
            if noisy and self.config.noise:
                feature = _moved(feature, self.config.noise * unit)
                prototype = _moved(prototype, self.config.noise * unit)
            features.append(feature)
            prototypes.append(prototype)
            distances.append((feature[:, None] - prototype).norm(dim=-1) / unit)
        return Tuples(torch.cat(features, -1), torch.cat(prototypes, -1), torch.stack(distances, -1))

    def _mismatched(self, tuples: Tuples) -> Tensor:
        """Local scales of mismatched modalities: of features in one half of the tuples, of prototypes in the other."""
        width = self.pool.sides[0].bank.shape[1]
        half = len(tuples.features) // 2
        features, prototypes = tuples.features, tuples.prototypes[:, 0]
        mixed_features = torch.cat([_shuffled(features[:half], width), features[half:]])
        mixed_prototypes = torch.cat([prototypes[:half], _shuffled(prototypes[half:], width)])
        out: Tensor = self.network(mixed_features - mixed_prototypes, mixed_prototypes)
        return out

    def _validate(self, checks: tuple[Tensor, ...]) -> float:
        """L_sep without weights + alpha L_mar, over fixed balanced batches without noise and dropout."""
        self.network.eval()
        total = 0.0
        with torch.no_grad():
            scales = self.network.global_scales()
            for patches in checks:
                label, near = self.pool.anomalous[patches], self.tuples(patches, 1, noisy=False)
                local = near.local(self.network, slice(0, 1))[:, 0]
                q = metric(local, near.distances[:, 0], scales) ** self.config.metric_power
                value = losses.separation(q, label, self.largest, weighted=False)
                total += float(value + self.config.alpha * losses.margin(q, label)) * len(patches)
        return total / sum(len(patches) for patches in checks)


def _moved(vectors: Tensor, length: float) -> Tensor:
    direction = torch.rand(vectors.shape, device=vectors.device)
    step = length * torch.rand((*vectors.shape[:-1], 1), device=vectors.device)
    return vectors + step * torch.nn.functional.normalize(direction, dim=-1)


def _shuffled(rows: Tensor, width: int) -> Tensor:
    """Rows (n, C) whose first `width` channels and whose other channels are permuted independently of each other."""
    first, second = (torch.randperm(len(rows), device=rows.device) for _ in range(2))
    return torch.cat([rows[first, :width], rows[second, width:]], dim=-1)

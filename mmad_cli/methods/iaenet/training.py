"""Training of the importance-aware fusion on pseudo anomalies whose experts have given their scores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from mmad_cli.errors import DataError
from mmad_cli.methods.base import ProgressCallback
from mmad_cli.methods.experts import GRID, Scan
from mmad_cli.methods.iaenet import losses
from mmad_cli.methods.iaenet.networks import FeatureNetwork, Fusion, ScoreNetwork, context, over_foreground
from mmad_cli.methods.mapping.config import TrainerConfig
from mmad_cli.methods.mapping.trainer import train as run_training
from mmad_cli.types import FloatArray

if TYPE_CHECKING:
    from mmad_cli.methods.iaenet.config import IAENetConfig

GROUP = "fusion"

RATES = {"iaf_s": 1e-3, "iaf_f": 1.5e-4}
TRUE_POSITIVES = 0.95

# patches that one epoch is judged on at most, and that go through a network at a time
_JUDGED = 65536
_TILE = 8192


@dataclass(frozen=True)
class Patches:
    """Foreground patches: scores u (n, K), label bool (n,), and the logits (n, K) that a network has for them."""

    u: Tensor
    label: Tensor
    logits: Tensor


class Material(Protocol):
    """What a fusion is trained on, for the shared trainer; `judged` has the patches that epochs are compared on."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> list[Any]:
        """What a step is made of."""

    def patches(self, network: nn.Module, batch: Sequence[Any]) -> Patches:
        """Its patches, with the logits of a network."""

    def judged(self) -> list[list[Any]]:
        """Batches of the other half."""


@dataclass(frozen=True)
class Maps:
    """Whole pseudo anomalies: u (N, K, G, G) on the common scale, front and label bool (N, G, G)."""

    u: Tensor
    front: Tensor
    label: Tensor
    train: tuple[int, ...]
    validation: tuple[int, ...]
    level: str = "patch"
    size: int = 8

    def __len__(self) -> int:
        return len(self.train)

    def batch(self, indices: Sequence[int]) -> list[int]:
        """Numbers of pseudo anomalies."""
        return [self.train[index] for index in indices]

    def patches(self, network: nn.Module, batch: Sequence[int]) -> Patches:
        """All foreground patches of some pseudo anomalies."""
        chosen = torch.as_tensor(list(batch), device=self.u.device)
        u, front = self.u[chosen], self.front[chosen]
        logits = over_foreground(network(u), front, self.level)
        return Patches(u.permute(0, 2, 3, 1)[front], self.label[chosen][front], logits)

    def judged(self) -> list[list[int]]:
        """The validation half."""
        return [list(self.validation[i : i + self.size]) for i in range(0, len(self.validation), self.size)]


@dataclass(frozen=True)
class FeatureSide:
    """One expert: distinct rows (m, C), their nearest prototype (m,) among `bank` (M, C), the row of each patch (N,).

    size: by which both are divided, so that experts with large numbers do not drown the others.
    """

    rows: Tensor
    prototype: Tensor
    row: Tensor
    bank: Tensor
    size: float

    def gather(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Features and prototypes (b, C) of patches."""
        rows = self.row[patches]
        return self.rows[rows].float() / self.size, self.bank[self.prototype[rows]] / self.size


@dataclass(frozen=True)
class Rows:
    """Single patches with what the experts looked at. u (N, K), contexts (N, K, 3), label bool (N,)."""

    u: Tensor
    contexts: Tensor
    label: Tensor
    sides: tuple[FeatureSide, ...]
    train: Tensor
    validation: Tensor

    def __len__(self) -> int:
        return len(self.train)

    def batch(self, indices: Sequence[int]) -> list[Tensor]:
        """As many patches, drawn with replacement, both kinds equally likely; from the global stream."""
        label = self.label[self.train]
        kinds = [torch.nonzero(label).squeeze(1), torch.nonzero(~label).squeeze(1)]
        anomalous = int((torch.rand(len(indices)) < 0.5).sum())
        drawn = [
            kind[torch.randint(len(kind), (count,)).to(kind.device)]
            for kind, count in zip(kinds, (anomalous, len(indices) - anomalous), strict=True)
        ]
        return [self.train[torch.cat(drawn)]]

    def patches(self, network: nn.Module, batch: Sequence[Tensor]) -> Patches:
        """The patches of a batch."""
        chosen = torch.cat(list(batch))
        features, prototypes = zip(*(side.gather(chosen) for side in self.sides), strict=True)
        logits = network(features, prototypes, self.contexts[chosen])
        return Patches(self.u[chosen], self.label[chosen], logits)

    def judged(self) -> list[list[Tensor]]:
        """The validation half, evenly thinned out where it is large."""
        step = math.ceil(len(self.validation) / _JUDGED)
        return [[part] for part in torch.split(self.validation[::step], _TILE)]


class Learner(nn.Module):
    """A fusion in training and its best epoch so far, as buffers, so that a checkpoint has both."""

    fusion: Fusion
    steps: Tensor
    best: Tensor
    best_value: Tensor
    best_epoch: Tensor

    def __init__(self, fusion: Fusion, material: Material, config: IAENetConfig, batch_size: int) -> None:
        super().__init__()
        self.fusion = fusion
        self.material, self.config = material, config
        self.steps_per_epoch = math.ceil(len(material) / batch_size)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("best", parameters_to_vector(fusion.parameters()).detach().clone())
        self.register_buffer("best_value", torch.full((2,), math.inf, dtype=torch.float64))
        self.register_buffer("best_epoch", torch.zeros((), dtype=torch.long))

    @property
    def groups(self) -> Mapping[str, nn.Module]:
        """One optimiser for all."""
        return {GROUP: self}

    def backward(self, batch: Sequence[Any]) -> dict[str, dict[str, float]]:
        """Add the gradients of a batch. The first step of an epoch judges the epoch before it."""
        if self.steps and not self.steps % self.steps_per_epoch:
            self.judge()
        self.steps += 1
        patches = self.material.patches(self.fusion.network, batch)
        weights = self.fusion.weights(patches.logits)
        fused = (weights * patches.u).sum(dim=-1)
        loss, terms = losses.total(patches.u, fused, weights, self.fusion.log_odds(fused), patches.label, self.config)
        loss.backward()  # type: ignore[no-untyped-call]
        return {GROUP: dict(terms)}

    def judge(self) -> None:
        """Keep the fusion as it is if it is the best yet on the validation half."""
        value = torch.tensor(self.value(), dtype=torch.float64)
        if tuple(value.tolist()) < tuple(self.best_value.tolist()):
            self.best_value.copy_(value)
            self.best_epoch.copy_(self.steps // self.steps_per_epoch)
            self.best.copy_(parameters_to_vector(self.fusion.parameters()).detach())

    def value(self) -> tuple[float, float]:
        """False-positive rate at 95 % of the pseudo-anomalous patches, and the detection loss; lower is better."""
        was_training = self.fusion.training
        self.fusion.eval()
        with torch.no_grad():
            parts = [self.material.patches(self.fusion.network, batch) for batch in self.material.judged()]
            u, label, logits = (torch.cat([getattr(part, name) for part in parts]) for name in ("u", "label", "logits"))
            fused = (self.fusion.weights(logits) * u).sum(dim=-1)
            detection = float(losses.detection(self.fusion.log_odds(fused), label))
        self.fusion.train(was_training)
        return false_positive_rate(fused.cpu().numpy(), label.cpu().numpy()), detection

    def finish(self) -> Fusion:
        """The fusion of the epoch that is kept, for inference."""
        self.judge()
        if self.config.keep == "best":
            vector_to_parameters(self.best, self.fusion.parameters())
        return self.fusion.eval().requires_grad_(False)


def false_positive_rate(fused: FloatArray, label: np.ndarray[Any, np.dtype[np.bool_]]) -> float:
    """Share of normal patches at or above the score that 95 % of the anomalous reach; 1 where a kind is missing."""
    if label.all() or not label.any():
        return 1.0
    anomalous = np.sort(fused[label])[::-1]
    threshold = anomalous[math.ceil(TRUE_POSITIVES * len(anomalous)) - 1]
    return float((fused[~label] >= threshold).mean())


def divide(scans: Sequence[Scan], groups: Sequence[int], seed: int) -> tuple[list[int], list[int]]:
    """Pseudo anomalies for training and for validation, half each, all of a training scan on one side.

    groups: the training scan of each. By pseudo anomaly where there is one training scan only; all on both sides where
    a half has no anomalous or no normal patch.
    """
    rng = np.random.default_rng(seed)
    keys = np.asarray(groups) if len(np.unique(groups)) > 1 else np.arange(len(scans))
    names = rng.permutation(np.unique(keys))
    first = np.isin(keys, names[: max(1, len(names) // 2)])
    halves = [np.flatnonzero(first).tolist(), np.flatnonzero(~first).tolist()]
    for number, half in enumerate(halves):
        kinds = {bool(kind) for i in half for kind in np.unique(scans[i].labels()[scans[i].front])}
        if kinds != {True, False}:
            halves[number] = list(range(len(scans)))
    return halves[0], halves[1]


def as_maps(
    scans: Sequence[Scan],
    groups: Sequence[int],
    u: Sequence[FloatArray],
    config: IAENetConfig,
    *,
    seed: int,
    device: str,
) -> Maps:
    """Material of IAF-S. u: scores (K, 3136) of each scan on the common scale; background counts as 0."""
    first, second = divide(scans, groups, seed)
    grid = (GRID, GRID)
    front = np.stack([scan.front for scan in scans])
    scores = np.where(front[:, None], np.stack(u), np.float32(0))
    return Maps(
        u=torch.from_numpy(scores.reshape(len(u), -1, *grid)).to(device),
        front=torch.from_numpy(front.reshape(-1, *grid)).to(device),
        label=torch.from_numpy(np.stack([scan.labels() for scan in scans]).reshape(-1, *grid)).to(device),
        train=tuple(first),
        validation=tuple(second),
        level=config.level,
        size=config.batch_samples,
    )


def as_rows(
    scans: Sequence[Scan],
    groups: Sequence[int],
    u: Sequence[FloatArray],
    rows: Sequence[Sequence[FloatArray]],
    banks: Sequence[FloatArray],
    *,
    seed: int,
    device: str,
) -> Rows:
    """Material of IAF-F. rows: features (m, C) that each expert looked up, of each scan; banks: prototypes (M, C)."""
    first, second = divide(scans, groups, seed)
    number = np.concatenate([np.full(int(scan.front.sum()), i) for i, scan in enumerate(scans)])
    scores = torch.from_numpy(np.concatenate([one[:, scan.front].T for one, scan in zip(u, scans, strict=True)]))
    contexts = torch.cat([patch_contexts(one, scan.front) for one, scan in zip(u, scans, strict=True)])
    label = torch.from_numpy(np.concatenate([scan.labels()[scan.front] for scan in scans]))
    train, validation = (torch.from_numpy(np.flatnonzero(np.isin(number, half))) for half in (first, second))
    return Rows(
        u=scores.to(device),
        contexts=contexts.to(device),
        label=label.to(device),
        sides=tuple(_side(scans, [of[k] for of in rows], k, bank, device) for k, bank in enumerate(banks)),
        train=train.to(device),
        validation=validation.to(device),
    )


def feature_tiles(
    u: FloatArray, scan: Scan, rows: Sequence[FloatArray], banks: Sequence[FloatArray], device: str
) -> Iterator[tuple[list[Tensor], list[Tensor], Tensor]]:
    """What IAF-F reads of the foreground patches of a scan, some at a time: features, prototypes, contexts."""
    contexts = patch_contexts(u, scan.front).to(device)
    sides = [_side([scan], [one], k, bank, device) for k, (one, bank) in enumerate(zip(rows, banks, strict=True))]
    for tile in torch.split(torch.arange(len(contexts), device=device), _TILE):
        features, prototypes = zip(*(side.gather(tile) for side in sides), strict=True)
        yield list(features), list(prototypes), contexts[tile]


def patch_contexts(u: FloatArray, front: np.ndarray[Any, np.dtype[np.bool_]]) -> Tensor:
    """Context (n, K, 3) of the foreground patches of one scan, from u (K, 3136) and front (3136,)."""
    maps = context(torch.from_numpy(np.where(front, u, 0).astype(np.float32)).reshape(1, -1, GRID, GRID))
    return maps[0].flatten(2)[:, :, torch.from_numpy(front.copy())].permute(2, 1, 0)


def prototype_size(bank: FloatArray) -> float:
    """Root mean square length of prototypes (M, C); 1 where they are all zero."""
    size = float(np.sqrt(np.square(bank, dtype=np.float64).sum(axis=1).mean()))
    return size if size > 0 else 1.0


def new_fusion(config: IAENetConfig, channels: Sequence[int], *, seed: int) -> Fusion:
    """An untrained fusion of experts with so many channels, which gives the plain mean; drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dropout = {} if config.dropout is None else {"dropout": config.dropout}
        network: nn.Module
        if config.variant == "iaf_f":
            network = FeatureNetwork(channels, **dropout)
        else:
            network = ScoreNetwork(len(channels), **dropout)
        return Fusion(network, len(channels), config.weights).eval().requires_grad_(False)


def train(
    fusion: Fusion,
    material: Material,
    config: IAENetConfig,
    *,
    seed: int,
    folder: Path | None = None,
    device: str = "cpu",
    progress: ProgressCallback | None = None,
) -> tuple[Fusion, dict[str, list[float]]]:
    """Train a fusion in place, from a checkpoint in `folder` if there is one; with the mean of each loss per epoch.

    Raises DataError when no pseudo anomaly has normal and anomalous patches.
    """
    batch_size = config.batch_patches if config.variant == "iaf_f" else config.batch_samples
    learner = Learner(fusion, material, config, batch_size)
    _require_both_kinds(material)
    settings = TrainerConfig(
        epochs=config.epochs,
        batch_size=batch_size,
        rate=config.rate or RATES["iaf_f" if config.variant == "iaf_f" else "iaf_s"],
        weight_decay=config.weight_decay,
    )
    # the trainer passes batches through as they are; its types name those of the methods that it was made for
    curves = run_training(
        cast(Any, learner),
        cast(Any, material),
        settings,
        seed=seed,
        folder=folder,
        identity=config.model_dump_json(),
        device=device,
        progress=progress,
    )
    trained = learner.finish()
    return trained, {**curves, f"{GROUP}/kept_epoch": [float(learner.best_epoch)]}


def _require_both_kinds(material: Material) -> None:
    label = material.label[material.front] if isinstance(material, Maps) else cast(Rows, material).label
    if bool(label.all()) or not bool(label.any()):
        raise DataError(
            f"the pseudo anomalies cannot be used: {int(label.sum())} of {label.numel()} patches are anomalous"
        )


def _side(scans: Sequence[Scan], rows: Sequence[FloatArray], expert: int, bank: FloatArray, device: str) -> FeatureSide:
    prototype, row, count = [], [], 0
    for scan, features in zip(scans, rows, strict=True):
        look = scan.looks[expert]
        prototype.append(torch.from_numpy(look.neighbours[:, 0].copy()))
        row.append(torch.from_numpy(look.row + count))
        count += len(features)
    return FeatureSide(
        # half precision: the features of all pseudo anomalies are held at once
        rows=torch.cat([torch.from_numpy(features).to(torch.float16) for features in rows]).to(device),
        prototype=torch.cat(prototype).to(device),
        row=torch.cat(row).to(device),
        bank=torch.from_numpy(bank).to(device),
        size=prototype_size(bank),
    )

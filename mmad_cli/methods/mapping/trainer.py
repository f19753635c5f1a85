"""The training loop of the mapping and reconstruction methods: an optimiser per group, checkpoints after each epoch.

What an epoch draws (order of samples, dropout) depends on the seed and the epoch only, so a training that goes on from
a checkpoint ends with the weights of an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mmad_cli.errors import DataError
from mmad_cli.files import atomic_write
from mmad_cli.methods.base import ProgressCallback
from mmad_cli.methods.mapping.config import TrainerConfig
from mmad_cli.methods.mapping.dense import DenseFeatures

CHECKPOINT = "training.safetensors"

_PROGRESS_SECONDS = 0.5

# loss terms of each group in one step
StepLosses = Mapping[str, Mapping[str, float]]


class DataSource(Protocol):
    """Dense features of the training samples, assembled batch by batch."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> list[DenseFeatures]:
        """Dense features of several samples."""


class Learner(Protocol):
    """What is trained: networks, grouped by the optimiser they share, and their losses on a batch."""

    @property
    def groups(self) -> Mapping[str, nn.Module]:
        """Networks with an optimiser of their own, by name."""

    def backward(self, batch: Sequence[DenseFeatures]) -> StepLosses:
        """Add the gradients of a batch, in parts where that saves memory; returns the terms of each group's loss."""


@dataclass
class _State:
    """Where a training is."""

    epoch: int = 0
    curves: dict[str, list[float]] = field(default_factory=dict)


def train(
    learner: Learner,
    data: DataSource,
    config: TrainerConfig,
    *,
    seed: int,
    folder: Path | None = None,
    identity: str = "",
    device: str = "cpu",
    progress: ProgressCallback | None = None,
) -> dict[str, list[float]]:
    """Train the learner's networks in place; returns the mean of every loss term per epoch, named `group/term`.

    With a `folder` the state after each epoch is kept there, and a later call with the same config, seed and
    `identity` (a digest of data and configuration) goes on from it; what such a call returns and leaves in the
    networks is what one call would have. The file is removed at the end. Progress counts batches. Raises DataError
    when there is no sample, or for a loss that is not finite under `stop`.
    """
    if len(data) == 0:
        raise DataError("there are no training samples; training needs at least one good sample")
    groups = dict(learner.groups)
    for module in groups.values():
        module.to(device).requires_grad_(True).train()
    optimisers = {name: _optimiser(module, config) for name, module in groups.items()}
    saver = _Saver(folder, json.dumps([vars(config), seed, len(data), identity], sort_keys=True))
    state = saver.restore(groups, optimisers)
    steps = math.ceil(len(data) / config.batch_size)
    tell = _Teller(progress, config.epochs * steps)
    cuda = [torch.device(device)] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=cuda):
        for epoch in range(state.epoch, config.epochs):
            torch.manual_seed(_epoch_seed(seed, epoch))
            sums: dict[str, list[float]] = {}
            for number, indices in enumerate(batches(len(data), config.batch_size, seed, epoch), start=1):
                for name, value in _step(learner, optimisers, data.batch(indices), config, epoch).items():
                    sums.setdefault(name, []).append(value)
                tell(epoch * steps + number)
            for name, values in sums.items():
                state.curves.setdefault(name, []).append(math.fsum(values) / len(values))
            state.epoch = epoch + 1
            saver.save(groups, optimisers, state)
    saver.remove()
    for module in groups.values():
        module.requires_grad_(False).eval()
    return state.curves


def batches(count: int, size: int, seed: int, epoch: int) -> Iterator[list[int]]:
    """Sample indices of each batch of an epoch: all samples in random order, a last one that is not full included."""
    generator = torch.Generator().manual_seed(_epoch_seed(seed, epoch))
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    for begin in range(0, count, size):
        yield order[begin : begin + size]


def _epoch_seed(seed: int, epoch: int) -> int:
    return (seed * 1_000_003 + epoch) % (1 << 63)


def _optimiser(module: nn.Module, config: TrainerConfig) -> torch.optim.Optimizer:
    if config.optimiser == "adamw":
        return torch.optim.AdamW(module.parameters(), lr=config.rate, weight_decay=config.weight_decay)
    return torch.optim.Adam(module.parameters(), lr=config.rate, weight_decay=config.weight_decay)


def _step(
    learner: Learner,
    optimisers: Mapping[str, torch.optim.Optimizer],
    batch: list[DenseFeatures],
    config: TrainerConfig,
    epoch: int,
) -> dict[str, float]:
    for optimiser in optimisers.values():
        optimiser.zero_grad(set_to_none=True)
    losses = learner.backward(batch)
    for name, terms in losses.items():
        if all(math.isfinite(value) for value in terms.values()):
            optimisers[name].step()
        elif config.non_finite == "stop":
            raise DataError(
                f"the loss of {name} is not finite in epoch {epoch + 1}: {dict(terms)}; check the features of the "
                "training samples (`mmad cache verify`), or lower the learning rate with --set rate="
            )
    return {
        f"{name}/{term}": value
        for name, terms in losses.items()
        for term, value in terms.items()
        if math.isfinite(value)
    }


class _Teller:
    """Progress, told a few times a second at most."""

    def __init__(self, callback: ProgressCallback | None, total: int) -> None:
        self.callback, self.total, self.told = callback, total, 0.0

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if self.callback is not None and (done == self.total or now - self.told > _PROGRESS_SECONDS):
            self.told = now
            self.callback(done, self.total)


class _Saver:
    """The checkpoint of an interrupted training: networks, buffers, optimisers, curves."""

    def __init__(self, folder: Path | None, identity: str) -> None:
        self.path = None if folder is None else folder / CHECKPOINT
        self.identity = identity

    def restore(self, groups: Mapping[str, nn.Module], optimisers: Mapping[str, torch.optim.Optimizer]) -> _State:
        """Read the state back; a fresh one without a checkpoint of this very training."""
        if self.path is None or not self.path.is_file():
            return _State()
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self.path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("identity") != self.identity:
                    return _State()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):
            # half a file cannot come from us, but must not stop a training that can start afresh
            return _State()
        for name, module in groups.items():
            module.load_state_dict(_below(tensors, f"network/{name}/"))
            optimiser = optimisers[name]
            for index, parameter in enumerate(module.parameters()):
                values = _below(tensors, f"optimiser/{name}/{index}/")
                if values:
                    # the step count stays where PyTorch keeps it, on the CPU
                    optimiser.state[parameter] = {
                        part: value if part == "step" else value.to(parameter.device) for part, value in values.items()
                    }
        told: dict[str, Any] = json.loads(metadata["state"])
        return _State(told["epoch"], told["curves"])

    def save(
        self, groups: Mapping[str, nn.Module], optimisers: Mapping[str, torch.optim.Optimizer], state: _State
    ) -> None:
        """Write the state after an epoch."""
        if self.path is None:
            return
        from safetensors.torch import save

        tensors: dict[str, Tensor] = {}
        for name, module in groups.items():
            for key, value in module.state_dict().items():
                tensors[f"network/{name}/{key}"] = value.detach().cpu().contiguous()
            for index, parameter in enumerate(module.parameters()):
                for part, value in optimisers[name].state.get(parameter, {}).items():
                    tensors[f"optimiser/{name}/{index}/{part}"] = value.detach().cpu().contiguous()
        told = json.dumps({"epoch": state.epoch, "curves": state.curves})
        atomic_write(self.path, save(tensors, metadata={"identity": self.identity, "state": told}))

    def remove(self) -> None:
        """Drop the checkpoint of a training that is finished."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

"""Training of the feature fusion block: schedules, and a loop that an interruption does not lose."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmad_cli.files import atomic_write
from mmad_cli.methods.base import ProgressCallback
from mmad_cli.methods.m3dm.uff import FusionNetwork

CHECKPOINT = "uff_training.safetensors"
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.01

_CHECKPOINT_SECONDS = 60.0
_PROGRESS_SECONDS = 0.5

# index of a training sample -> its point patches (P, C_pt) and RGB patches (P, C_rgb)
Pairs = Callable[[int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Training:
    """How the block is trained.

    `official`: AdamW, 3 epochs, the rate rising linearly over `warmup_epochs` and falling as a half cosine to 0 over
    the rest, set when an accumulation of `accumulate` batches starts; batches that do not fill an accumulation at the
    end of an epoch are lost. With the 2656 training samples of MVTec 3D-AD that makes 30 updates.
    `corrected`: one batch per update, `steps` updates in all, the rate falling as a half cosine to 0 within every
    `cycle` updates. The stop is fixed, so nothing is chosen by results.

    Rates are those of the published script; its own weight decay option is ignored there, so PyTorch's default acts.
    """

    recipe: Literal["official", "corrected"] = "official"
    temperature: float = 1.0
    rate: float = 0.003
    batch: int = 16
    accumulate: int = 16
    epochs: int = 3
    warmup_epochs: int = 1
    steps: int = 750
    cycle: int = 250


@dataclass(frozen=True)
class Batch:
    """One step of the loop: samples, learning rate, and whether an update ends it."""

    samples: list[int]
    rate: float
    first: bool
    last: bool
    of: int


def official_rate(position: float, settings: Training) -> float:
    """Learning rate at `position`, in epochs: linear warm-up, then a half cosine to 0."""
    if position < settings.warmup_epochs:
        return settings.rate * position / settings.warmup_epochs
    share = (position - settings.warmup_epochs) / max(settings.epochs - settings.warmup_epochs, 1)
    return settings.rate * 0.5 * (1.0 + math.cos(math.pi * share))


def annealed_rate(step: int, settings: Training) -> float:
    """Learning rate of update `step` (from 0): a half cosine to 0 within every `cycle` updates."""
    share = (step % settings.cycle) / settings.cycle
    return settings.rate * 0.5 * (1.0 + math.cos(math.pi * share))


def batches(count: int, settings: Training, seed: int) -> Iterator[Batch]:
    """Every batch of the training, from the start; which samples it holds depends on count, settings and seed only."""
    if count < 1:
        raise ValueError(f"count: must be at least 1, got {count}")
    size = min(settings.batch, count)
    yield from (_official if settings.recipe == "official" else _corrected)(count // size, size, count, settings, seed)


def train(
    network: FusionNetwork,
    pairs: Pairs,
    count: int,
    settings: Training,
    *,
    seed: int,
    folder: Path | None = None,
    identity: str = "",
    device: str = "cpu",
    progress: ProgressCallback | None = None,
) -> list[float]:
    """Train `network` in place on `count` samples; returns the loss of every batch that this call worked through.

    pairs: gives the patch pairs of a sample, never all held at once. With a `folder` a checkpoint is written there
    about once a minute, and a later call with the same settings, seed, count and `identity` (a digest of the data)
    goes on from it; the file is removed at the end. Raises ValueError for a count below 1.
    """
    plan = list(batches(count, settings, seed))
    network.to(device).requires_grad_(True).train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=settings.rate, betas=BETAS, weight_decay=WEIGHT_DECAY)
    saver = _Saver(folder, {**asdict(settings), "seed": seed, "count": count, "identity": identity})
    losses: list[float] = []
    told = 0.0
    for number in range(saver.restore(network, optimiser), len(plan)):
        losses.append(_step(network, optimiser, pairs, plan[number], settings, device))
        if plan[number].last:
            saver.maybe_save(network, optimiser, number + 1)
        if progress is not None and (time.monotonic() - told > _PROGRESS_SECONDS or number + 1 == len(plan)):
            told = time.monotonic()
            progress(number + 1, len(plan))
    saver.remove()
    network.requires_grad_(False).eval()
    return losses


def _step(
    network: FusionNetwork,
    optimiser: torch.optim.Optimizer,
    pairs: Pairs,
    batch: Batch,
    settings: Training,
    device: str,
) -> float:
    if batch.first:
        optimiser.zero_grad()
        for group in optimiser.param_groups:
            group["lr"] = batch.rate
    drawn = [pairs(sample) for sample in batch.samples]
    points, rgb = (torch.cat([pair[i] for pair in drawn]).to(device) for i in (0, 1))
    loss = network.loss(points, rgb, settings.temperature)
    (loss / batch.of).backward()  # type: ignore[no-untyped-call]
    if batch.last:
        optimiser.step()
    return float(loss.detach())


def _official(per_epoch: int, size: int, count: int, settings: Training, seed: int) -> Iterator[Batch]:
    # a set too small to fill one accumulation would never be trained on
    together = min(settings.accumulate, per_epoch)
    for epoch in range(settings.epochs):
        order = _order(count, seed + epoch)
        rate = 0.0
        for i in range(per_epoch):
            first = i % together == 0
            rate = official_rate(epoch + i / per_epoch, settings) if first else rate
            yield Batch(order[i * size : (i + 1) * size], rate, first, (i + 1) % together == 0, together)


def _corrected(per_epoch: int, size: int, count: int, settings: Training, seed: int) -> Iterator[Batch]:
    order: list[int] = []
    for step in range(settings.steps):
        epoch, i = divmod(step, per_epoch)
        if i == 0:
            order = _order(count, seed + epoch)
        yield Batch(order[i * size : (i + 1) * size], annealed_rate(step, settings), True, True, 1)


def _order(count: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


class _Saver:
    """The checkpoint of an interrupted training."""

    def __init__(self, folder: Path | None, identity: dict[str, Any]) -> None:
        self.path = None if folder is None else folder / CHECKPOINT
        self.identity = json.dumps(identity, sort_keys=True)
        self.saved = time.monotonic()

    def restore(self, network: FusionNetwork, optimiser: torch.optim.AdamW) -> int:
        """Read the state back; the number of batches done, 0 without a checkpoint of this very training."""
        if self.path is None or not self.path.is_file():
            return 0
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self.path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("identity") != self.identity:
                    return 0
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):
            # half a file cannot come from us, but must not stop a training that can start afresh
            return 0
        device = network.xyz_norm.weight.device
        for name, parameter in network.named_parameters():
            parameter.detach().copy_(tensors[f"network/{name}"])
            optimiser.state[parameter] = {
                part: tensors[f"{part}/{name}"].to(device if part != "step" else "cpu")
                for part in ("step", "exp_avg", "exp_avg_sq")
            }
        return int(metadata["done"])

    def maybe_save(self, network: FusionNetwork, optimiser: torch.optim.AdamW, done: int) -> None:
        """Write the state when the last one is old enough."""
        if self.path is None or time.monotonic() - self.saved < _CHECKPOINT_SECONDS:
            return
        from safetensors.torch import save

        tensors = {}
        for name, parameter in network.named_parameters():
            tensors[f"network/{name}"] = parameter.detach().cpu().contiguous()
            for part, value in optimiser.state[parameter].items():
                tensors[f"{part}/{name}"] = value.detach().cpu().contiguous()
        atomic_write(self.path, save(tensors, metadata={"identity": self.identity, "done": str(done)}))
        self.saved = time.monotonic()

    def remove(self) -> None:
        """Drop the checkpoint of a training that is finished."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

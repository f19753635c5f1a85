"""The training loop: seeded, logged, and going on where it was interrupted.

Every step draws from a generator of its own, seeded by the run's seed and the number of the step, so the only state
to be kept is that of the network and of the optimiser.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from mmad_cli.errors import WeightsError
from mmad_cli.files import atomic_write
from mmad_cli.pretraining.config import HERE, Network, PointsConfig, RgbConfig, TrainingConfig

LOG_FIELDS = ("step", "loss", "separation")
_CHECKPOINT = "checkpoint.safetensors"
_LOG = "log.csv"
_CHECKPOINT_SECONDS = 30.0
_GRADIENT_LIMIT = 1.0
# a loss is as logged within this, relative, at the first step and growing with each: rounding differs by processor
_TOLERANCE = 1e-4
_TOLERANCE_PER_STEP = 5e-4
Tell = Callable[[int, int], None]


class Task(Protocol):
    """What is trained: a network and its loss at a step."""

    def network(self) -> torch.nn.Module:
        """A network with random weights."""

    def loss(
        self, network: torch.nn.Module, step: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss, and how well altered places are told apart (0.5 to 1)."""


@dataclass(frozen=True)
class LogLine:
    """One step: its loss, and the area under the ROC curve of telling altered places."""

    step: int
    loss: float
    separation: float


def task(network: Network, config: TrainingConfig) -> Task:
    """The task of a network. Raises TypeError for the configuration of the other one."""
    if network == "rgb" and isinstance(config, RgbConfig):
        from mmad_cli.pretraining.rgb import RgbTask

        return RgbTask(config)
    if network == "points" and isinstance(config, PointsConfig):
        from mmad_cli.pretraining.points import PointsTask

        return PointsTask(config)
    raise TypeError(f"config: {type(config).__name__} does not belong to network {network!r}")


def initial(what: Task, seed: int) -> torch.nn.Module:
    """The network before its first step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return what.network()


def train(
    what: Task,
    config: TrainingConfig,
    *,
    folder: Path | None = None,
    stop: int | None = None,
    device: str = "cpu",
    tell: Tell | None = None,
) -> tuple[torch.nn.Module, list[LogLine]]:
    """Train from the start or from the checkpoint in `folder`; returns the network and the log of all steps.

    `stop`: end after so many steps of the schedule; `tell` is called with (steps done, steps in all). With a folder
    the log is kept as `log.csv` and the state as a checkpoint, every half minute and at the end; a checkpoint of
    another configuration is not taken.
    """
    network = initial(what, config.seed).to(device).train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=config.rate, weight_decay=config.weight_decay)
    keeper = _Keeper(folder, config)
    log = keeper.restore(network, optimiser)
    last = config.steps if stop is None else min(stop, config.steps)
    with _threads(config.threads):
        for step in range(len(log), last):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step, config)
            loss, separation = what.loss(network, step, step_generator(config.seed, step))
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(network.parameters(), _GRADIENT_LIMIT)
            optimiser.step()
            log.append(LogLine(step, float(loss.detach()), float(separation)))
            if tell is not None:
                tell(step + 1, last)
            keeper.maybe_save(network, optimiser, log, step + 1 == last)
    return network.eval().requires_grad_(False), log


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Rate of a step: warm-up, half cosine, and the straight line down to 0 at the end."""
    if step < config.warmup:
        return config.rate * (step + 1) / config.warmup
    share = min((step - config.warmup) / max(config.horizon - config.warmup, 1), 1.0)
    left = min((config.steps - step) / config.cooldown, 1.0)
    return config.rate * 0.5 * (1 + math.cos(math.pi * share)) * left


def step_generator(seed: int, step: int) -> torch.Generator:
    """Everything random in a step comes from here."""
    digest = hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def write_log(path: Path, log: Iterable[LogLine], every: int = 1, whole: int = 0) -> None:
    """The log as CSV: each of the first `whole` steps, then every `every`-th."""
    from io import StringIO

    text = StringIO()
    writer = csv.DictWriter(text, LOG_FIELDS, lineterminator="\n")
    writer.writeheader()
    for line in log:
        if line.step < whole or line.step % every == 0:
            writer.writerow({name: _rounded(value) for name, value in asdict(line).items()})
    atomic_write(path, text.getvalue().encode())


def read_log(path: Path) -> list[LogLine]:
    """What `write_log` wrote."""
    with path.open(encoding="utf-8", newline="") as file:
        return [LogLine(int(row["step"]), float(row["loss"]), float(row["separation"])) for row in csv.DictReader(file)]


def shipped_log(network: Network) -> list[LogLine]:
    """The log of the training that made the shipped weights."""
    return read_log(HERE / f"{network}_log.csv")


def deviations(log: Sequence[LogLine], reference: Sequence[LogLine]) -> dict[str, Any]:
    """Losses against a reference at the steps that both have: `steps`, the `largest` relative deviation, `outside`.

    The tolerance is 1e-4 and grows by 5e-4 per step, since rounding differs between processors and grows in training.
    """
    expected = {line.step: line.loss for line in reference}
    pairs = [(line.step, abs(line.loss / expected[line.step] - 1)) for line in log if line.step in expected]
    outside = sum(not deviation <= _TOLERANCE + _TOLERANCE_PER_STEP * step for step, deviation in pairs)
    return {"steps": len(pairs), "largest": max((value for _, value in pairs), default=0.0), "outside": outside}


def export(network: torch.nn.Module) -> bytes:
    """The network as safetensors, numbers in half precision, counters left out."""
    from safetensors.torch import save

    state = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    return save({name: value.detach().cpu().half().contiguous() for name, value in state.items()})


def _rounded(value: float) -> Any:
    return value if isinstance(value, int) else f"{value:.6f}"


class _Keeper:
    """Log and checkpoint of a training in a folder; nothing without one."""

    def __init__(self, folder: Path | None, config: TrainingConfig) -> None:
        self.folder = folder
        self.identity = json.dumps(config.model_dump(mode="json"), sort_keys=True)
        self.saved = time.monotonic()

    def restore(self, network: torch.nn.Module, optimiser: torch.optim.AdamW) -> list[LogLine]:
        """Read the state back; the log of the steps that are done."""
        if self.folder is None or not (self.folder / _CHECKPOINT).is_file():
            return []
        from safetensors import SafetensorError, safe_open

        path = self.folder / _CHECKPOINT
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path}: damaged ({error}); remove it to train from the start") from error
        if metadata.get("identity") != self.identity:
            raise WeightsError(f"{path}: belongs to another configuration; remove it or choose another folder")
        network.load_state_dict({name: tensors[f"network/{name}"] for name in network.state_dict()})
        for name, parameter in network.named_parameters():
            state = {part: tensors[f"{part}/{name}"].to(parameter.device) for part in ("exp_avg", "exp_avg_sq")}
            optimiser.state[parameter] = {**state, "step": tensors[f"step/{name}"]}
        lines = json.loads(metadata["log"])
        return [LogLine(int(step), loss, told) for step, loss, told in lines]

    def maybe_save(
        self, network: torch.nn.Module, optimiser: torch.optim.AdamW, log: list[LogLine], last: bool
    ) -> None:
        """Write log and state when the last time is long enough ago, and at the end."""
        if self.folder is None or not (last or time.monotonic() - self.saved > _CHECKPOINT_SECONDS):
            return
        from safetensors.torch import save

        tensors = {f"network/{name}": value for name, value in network.state_dict().items()}
        for name, parameter in network.named_parameters():
            for part, value in optimiser.state[parameter].items():
                tensors[f"{part}/{name}"] = value
        content = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        lines = json.dumps([[line.step, line.loss, line.separation] for line in log])
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write(self.folder / _CHECKPOINT, save(content, metadata={"identity": self.identity, "log": lines}))
        write_log(self.folder / _LOG, log)
        self.saved = time.monotonic()

"""M3DM: making a memory bank against the form of the published code, and peak memory of a fit, on generated features.

Generated features have the sizes of ViT-B/8 and Point-MAE. The published form holds all rows of a bank, normalises and
projects them together, and picks with a loop of norms over all rows; its loop runs on a part of the picks and its time
is scaled up in proportion (every pick costs the same).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.machine import PeakMemory
from benchmarks.turns import Bar, Row, row, timed, turns_of

TRAINING_SAMPLES = 244
MEMORY_BAR = 6.0
CHANNELS = {"points": 1152, "rgb": 768}


class GeneratedScan:
    """Features of one scan; tokens are read from files each time they are asked for, as a feature set of the store."""

    def __init__(self, folder: Path, number: int) -> None:
        self.id = f"train/good/{number:03d}"
        self.number = number
        self.folder = folder

    def __getitem__(self, name: str) -> dict[str, np.ndarray]:
        tokens = {"tokens": np.load(self.folder / f"{self.number}-{name}.npy")}
        return {**tokens, "grid": np.array([28, 28], np.int32)} if name == "rgb" else {**tokens, **_geometry()}


class GeneratedScans:
    """A feature set of generated scans in a folder."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> GeneratedScan:
        return GeneratedScan(self.folder, index)

    def __iter__(self) -> Iterator[GeneratedScan]:
        return (self[index] for index in range(self.count))


def write_scans(folder: Path, count: int) -> None:
    for number in range(count):
        random = np.random.default_rng(number)
        for name, rows in (("points", 1024), ("rgb", 784)):
            np.save(folder / f"{number}-{name}.npy", _mixture(random, rows, CHANNELS[name]))


@cache
def _geometry() -> dict[str, np.ndarray]:
    """A disc of 15 % of the pixels; each lies between three groups near each other, so that a patch draws from few."""
    y, x = np.mgrid[:224, :224] - 112
    pixel = np.flatnonzero(x * x + y * y < 50**2)
    centre = (pixel // 224 // 7) * 32 + pixel % 224 // 7
    weights = np.random.default_rng(0).dirichlet(np.ones(3), len(pixel))
    return {
        "pixel": pixel.astype(np.int32),
        "neighbours": np.stack([centre, (centre + 1) % 1024, (centre + 32) % 1024], axis=1).astype(np.int16),
        "weights": weights.astype(np.float32),
    }


def _mixture(random: np.random.Generator, rows: int, channels: int) -> np.ndarray:
    """Rows around 100 centres that all scans share, on 32 directions."""
    shared = np.random.default_rng(channels)
    directions = shared.standard_normal((32, channels), dtype=np.float32)
    centres = shared.standard_normal((100, 32), dtype=np.float32)
    place = centres[random.integers(0, 100, rows)] + 0.05 * random.standard_normal((rows, 32), dtype=np.float32)
    return place @ directions + 0.02 * random.standard_normal((rows, channels), dtype=np.float32)


def _method(**settings: Any) -> Any:
    from mmad_cli.methods import build_config, get_method

    definition = get_method("m3dm")
    variant = settings.pop("variant", None)
    return definition.build(build_config(definition, variant, "official", {"uff": "concat", **settings}), "cpu")


def published_bank(rows: np.ndarray, part: int) -> float:
    """Seconds for a bank in the form of the published code, the picks after the first `part` scaled up."""
    import torch
    from sklearn.random_projection import SparseRandomProjection

    begin = time.perf_counter()
    bank = torch.from_numpy(rows)
    bank = (bank - bank.mean()) / bank.std()
    projected = torch.from_numpy(SparseRandomProjection(eps=0.9, random_state=0).fit_transform(bank.numpy())).float()
    last = projected[:1]
    smallest = torch.linalg.norm(projected - last, dim=1, keepdim=True)
    fixed = time.perf_counter() - begin
    begin = time.perf_counter()
    picks = int(0.1 * len(rows)) - 1
    for _ in range(part):
        smallest = torch.minimum(torch.linalg.norm(projected - last, dim=1, keepdim=True), smallest)
        at = int(torch.argmax(smallest))
        last = projected[at : at + 1]
        smallest[at] = 0
    return fixed + (time.perf_counter() - begin) * picks / part


def bank_row(samples: int, part: int, turns: int) -> Row:
    """The point bank of some samples: rows at hand in both forms, so that no features are timed."""
    from mmad_cli.memory import BankConfig, MemoryBank, scalar_moments
    from mmad_cli.methods.m3dm.patches import point_patches

    with tempfile.TemporaryDirectory() as name:
        write_scans(Path(name), samples)
        parts = [point_patches(sample) for sample in GeneratedScans(Path(name), samples)]
    rows = np.concatenate(parts)

    def ours() -> None:
        mean, std = scalar_moments(lambda: iter(parts))
        bank = MemoryBank(BankConfig(fraction=0.1, coreset_dtype="float32"))
        bank.fit(lambda: iter(parts), len(rows), rows.shape[1], random_state=0, mean=mean, std=std)

    both = [(published_bank(rows, part), timed(ours)[0]) for _ in range(turns)]
    return row(
        f"M3DM point bank, {len(rows)} x {rows.shape[1]}, 10 % / norm loop",
        [seconds for _, seconds in both],
        [seconds for seconds, _ in both],
        bar=Bar(ratio=40),
        note=f"published form scaled from {part} picks",
    )


class FitCost(NamedTuple):
    """Seconds of a three-bank fit, bytes that it takes at its peak beyond libraries and files, seconds of a score."""

    fit: float
    memory: int
    predict: float


def fit_costs(samples: int, fraction: float, turns: int, at_once: bool = False) -> list[FitCost]:
    """Measured in a process per turn, in turn or at the same time on one thread each.

    Raises CalledProcessError where one fails.
    """
    environment = {**os.environ, **({"OMP_NUM_THREADS": "1"} if at_once else {})}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(turns if at_once else 1) as pool:
        write_scans(Path(folder), samples)
        command = [sys.executable, "-m", "benchmarks.bench_m3dm", folder, str(samples), str(fraction)]

        def cost(_: int) -> FitCost:
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            fit, memory, predict = done.stdout.split()
            return FitCost(float(fit), int(memory), float(predict))

        return list(pool.map(cost, range(turns)))


def _fit_cost(folder: Path, samples: int, fraction: float) -> FitCost:
    warnings.simplefilter("ignore")
    # few epochs: how long the one-class machine takes depends on them, its memory does not
    method = _method(coreset_fraction=fraction, ocsvm_maxiter=2)
    train, none = GeneratedScans(folder, samples), GeneratedScans(folder, 0)
    # libraries are loaded before the count begins
    _method(coreset_fraction=0.001, ocsvm_maxiter=2).fit([train[0]], none, seed=0)
    memory = PeakMemory()
    seconds, _ = timed(lambda: method.fit(train, none, seed=0))
    taken = memory.taken()
    return FitCost(seconds, taken, min(timed(lambda: method.predict(train[0]))[0] for _ in range(3)))


def memory_row(samples: int, fraction: float, turns: int) -> Row:
    """Peak memory of a fit of the published method, each time in a process of its own; these run at the same time.

    Scoring the samples against full banks takes an hour on a CPU, so fewer rows are kept; what the others would take is
    known and added.
    """
    added = _bank_bytes(samples, 0.1) - _bank_bytes(samples, fraction)
    costs = fit_costs(samples, fraction, turns, at_once=True)
    largest = max(cost.memory for cost in costs)
    return row(
        f"peak memory of an M3DM fit, {samples} samples, three banks",
        [cost.fit for cost in costs],
        figures=[(cost.memory + added) / 1e9 for cost in costs],
        unit="GB",
        bar=Bar(figure=MEMORY_BAR),
        note=(
            f"{largest / 1e9:.2f} GB measured beyond the libraries with {fraction:.1%} of the rows kept; computed and "
            f"added: {added / 1e9:.2f} GB of bank rows and their search structure for 10 %; "
            f"estimate of the method itself {_method().memory_estimate(samples) / 1e9:.2f} GB"
        ),
    )


def _bank_bytes(samples: int, fraction: float) -> int:
    """Bytes of the three banks and their search structures."""
    points = int(fraction * 3136 * samples)
    chained = int(fraction * points)
    return 2 * 4 * (points * CHANNELS["points"] + chained * (CHANNELS["rgb"] + sum(CHANNELS.values())))


def run(quick: bool = False) -> list[Row]:
    """Both; quick takes fewer samples."""
    turns = turns_of(quick)
    memory = memory_row(12, 0.02, turns) if quick else memory_row(TRAINING_SAMPLES, 0.002, turns)
    return [bank_row(10, 10 if quick else 40, turns), memory]


if __name__ == "__main__":
    # the process of its own that `fit_costs` starts
    print(*_fit_cost(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))

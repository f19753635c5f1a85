"""What the store and the running of tasks cost per sample, beyond the work itself."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.turns import Bar, Row, row, turns_of
from mmad_cli.files import atomic_write
from mmad_cli.stages.progress import SilentReporter
from mmad_cli.stages.tasks import Outcome, run_all
from mmad_cli.stages.timing import Stopwatch
from mmad_cli.store import Artefact, Store

BAR = Bar(seconds=0.005)


def per_sample(store: Store, count: int, turn: int) -> tuple[float, float, float]:
    """Seconds per sample: a bare write that is flushed to the disk, storing one by a task, reading it again."""
    arrays = {"tokens": np.zeros((196, 384), np.float32)}
    items = [Artefact("extract", "part", f"{turn}-{i:038d}") for i in range(count)]

    def task(item: Artefact) -> Outcome:
        store.tensors_or_compute(item, lambda: (arrays, {}), lambda _: None)
        return Outcome()

    def everything() -> float:
        begin = time.perf_counter()
        run_all(task, items, total=count, title="", executor=None, reporter=SilentReporter(), watch=Stopwatch())
        return (time.perf_counter() - begin) / count

    data = bytes(arrays["tokens"].nbytes)
    begin = time.perf_counter()
    for i in range(count):
        atomic_write(store.root / "bare" / f"{turn}-{i}", data)
    flush = (time.perf_counter() - begin) / count
    return flush, everything(), everything()


def run(quick: bool = False) -> list[Row]:
    """Storing beyond a bare write with its flush, which depends on the disk; storing with it; reading again."""
    with tempfile.TemporaryDirectory() as name:
        store = Store(Path(name))
        turns = [per_sample(store, 20 if quick else 100, turn) for turn in range(turns_of(quick))]
    flush, stored, read = zip(*turns, strict=True)
    name = "store and tasks per sample of 0.3 MB, {}"
    return [
        row(
            name.format("stored, beyond a bare flushed write"),
            [max(0.0, whole - bare) for bare, whole, _ in turns],
            bar=BAR,
        ),
        row(name.format("stored / a bare flushed write alone"), stored, flush, note="with the flush to the disk"),
        row(name.format("read again"), read, bar=BAR),
    ]

"""How long work took, what it is called in the store's timings, and how long more of it will take."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import BaseModel

    from mmad_cli.backbones.specs import FeatureSpec
    from mmad_cli.preprocessing.config import PreprocessConfig
    from mmad_cli.stages.clean import CleanJob
    from mmad_cli.stages.plan import MethodRun
    from mmad_cli.stages.session import Session

# Less says more about starting than about the work
_FEWEST_ITEMS = 2


class Stopwatch:
    """Wall time of work on several items; the first ones, which load libraries and networks, count only if alone.

    at_once: items that are worked on at the same time.
    """

    def __init__(self, at_once: int = 1) -> None:
        self._at_once = at_once
        self._start = self._last = self._warm = (0, time.perf_counter())

    def lap(self, done: int) -> None:
        """Say that so many items are finished by now."""
        self._last = (done, time.perf_counter())
        if self._warm[0] < self._at_once:
            self._warm = self._last

    def measured(self) -> tuple[int, float] | None:
        """Items and the seconds that they took; None for too few items."""
        if self._last[0] < _FEWEST_ITEMS:
            return None
        first = self._warm if self._last[0] > self._warm[0] else self._start
        return self._last[0] - first[0], self._last[1] - first[1]

    def record(self, session: Session, name: str, per_item: float = 1.0) -> None:
        """Keep the result in the store under a name; `per_item` is the size of an item in the name's unit."""
        measured = self.measured()
        if measured is not None:
            session.timings.record(name, measured[0] * per_item, measured[1])


def raw_megabytes(job: CleanJob) -> float:
    """Size of a raw scan: what cleaning time goes by, since scans of one dataset differ several times in size."""
    try:
        return sum(path.stat().st_size for path in job.ref.files.values()) / 1e6
    except OSError:
        # a file that vanished meanwhile is reported by what reads it; nothing is learned from no size
        return 0.0


def preprocess_name(config: PreprocessConfig, workers: int) -> str:
    """Cleaning, per megabyte of raw scan."""
    # what protocol and background do to the time is in the name of the protocol
    return _in_pool(f"preprocess {config.protocol}{_changes(config, ('protocol', 'rgb_background', 'seed'))}", workers)


def extract_name(spec: FeatureSpec, device: str, workers: int) -> str:
    """Features, per sample."""
    backbone = f"timm:{spec.params['model']}" if spec.backbone == "timm" else spec.backbone
    return _in_pool(f"extract {backbone}{_changes(spec.settings, ('model', 'norm'))} {device}", workers)


def method_name(stage: str, run: MethodRun, device: str, trained: int) -> str:
    """Fitting or scoring, per sample, by how many samples were learned from.

    Banks grow with the samples and the time to select from them with the square, so what was learned from a few
    samples says nothing about hundreds: counts share a name from one power of two to the next.
    """
    low = 1 << (max(trained, 1).bit_length() - 1)
    changes = _changes(run.config, ("variant",))
    name = f"{run.definition.name} {run.config.variant}{changes}"
    return f"{stage} {name} {device}, {low} to {2 * low - 1} training samples"


def metrics_name(full_resolution: bool) -> str:
    """Metrics of a category, per test sample."""
    return "evaluate full-resolution" if full_resolution else "evaluate"


def seconds_for(known: Mapping[str, float], name: str, items: float, workers: int = 1) -> float | None:
    """Estimate for so many items; None when nothing like it was measured.

    Work in a pool that was measured with another number of workers only is taken as sharing out evenly.
    """
    if not items:
        return 0.0
    if name in known:
        return items * known[name]
    base = name.removesuffix(_pool_suffix(workers))
    measured = {1: known[base]} if base in known else {}
    for other, rate in known.items():
        count = other.removeprefix(f"{base}, ").removesuffix(" workers")
        if count.isdecimal() and other == _in_pool(base, int(count)):
            measured[int(count)] = rate
    if not measured:
        return None
    nearest = min(measured, key=lambda count: abs(count - workers))
    return items * measured[nearest] * nearest / workers


def _pool_suffix(workers: int) -> str:
    return f", {workers} workers" if workers > 1 else ""


def _in_pool(name: str, workers: int) -> str:
    return name + _pool_suffix(workers)


def _changes(settings: BaseModel, without: tuple[str, ...]) -> str:
    """Fields that are not at their defaults, since any of them may change the time."""
    fields = type(settings).model_fields
    values = {name: getattr(settings, name) for name in sorted(fields) if name not in without}
    return "".join(f" {name}={value}" for name, value in values.items() if value != fields[name].default)

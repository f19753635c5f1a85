"""Mean and spread over runs that differ in nothing but their seed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mmad_cli.results.schema import RunResult


@dataclass(frozen=True)
class Spread:
    """One number under several seeds: `values` maps those seeds to it that have it."""

    values: Mapping[int, float] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of seeds that have a value."""
        return len(self.values)

    @property
    def mean(self) -> float | None:
        """Mean over the seeds; None where none has a value."""
        return statistics.fmean(self.values.values()) if self.values else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation, with n - 1 in the denominator; None for fewer than two values."""
        return statistics.stdev(self.values.values()) if self.count > 1 else None


@dataclass(frozen=True)
class SeedGroup:
    """Runs by rising seed, and the spread of every metric: per category, and of the mean over categories."""

    runs: tuple[RunResult, ...]
    categories: Mapping[str, Mapping[str, Spread]]
    mean: Mapping[str, Spread]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds, rising."""
        return tuple(run.seed for run in self.runs)


def group_by_seed(runs: Iterable[RunResult]) -> list[SeedGroup]:
    """The groups of `group_runs` that hold at least two runs."""
    return [group for group in group_runs(runs) if len(group.runs) > 1]


def group_runs(runs: Iterable[RunResult]) -> list[SeedGroup]:
    """Groups of runs with different seeds and all else equal, in the order of their first runs.

    Equal are method with variant, recipe, version and configuration, dataset with its content, preprocessing,
    shots, limit, resolution and weights. Of several runs with one seed the latest counts.

    A seed without a value (failed category, undefined metric) is left out of that number. The mean over categories
    is taken from those seeds only whose mean is over every category that any of the runs has a value for; a mean
    over fewer would add the difference between categories to the spread.
    """
    groups: dict[str, dict[int, RunResult]] = {}
    for run in runs:
        by_seed = groups.setdefault(_all_but_seed(run), {})
        earlier = by_seed.get(run.seed)
        if earlier is None or run.created >= earlier.created:
            by_seed[run.seed] = run
    return [_group([by_seed[seed] for seed in sorted(by_seed)]) for by_seed in groups.values()]


def _all_but_seed(run: RunResult) -> str:
    """Everything that tells runs apart, without the seed, in a form that can be compared."""
    return json.dumps(
        [
            run.method.model_dump(mode="json"),
            run.dataset.name,
            run.dataset.digest,
            run.preprocessing.model_dump(mode="json"),
            run.shots,
            run.shot_choice,
            run.limit,
            run.full_resolution,
            sorted([weights.name, weights.sha256 or ""] for weights in run.weights),
        ],
        sort_keys=True,
    )


def _group(runs: Sequence[RunResult]) -> SeedGroup:
    names = list(dict.fromkeys(name for run in runs for name in run.categories))
    results = [result for run in runs for result in run.categories.values()]
    metrics = list(dict.fromkeys(metric for result in results for metric in result.metrics))
    return SeedGroup(
        runs=tuple(runs),
        categories={name: {metric: _category_spread(runs, name, metric) for metric in metrics} for name in names},
        mean={metric: _mean_spread(runs, metric) for metric in metrics},
    )


def _category_spread(runs: Sequence[RunResult], category: str, metric: str) -> Spread:
    defined = {run.seed: _defined(run, metric) for run in runs}
    return Spread({seed: values[category] for seed, values in defined.items() if category in values})


def _mean_spread(runs: Sequence[RunResult], metric: str) -> Spread:
    defined = {run.seed: _defined(run, metric) for run in runs}
    everywhere = set().union(*defined.values())
    complete = {seed: values for seed, values in defined.items() if values and values.keys() == everywhere}
    return Spread({seed: statistics.fmean(values.values()) for seed, values in complete.items()})


def _defined(run: RunResult, metric: str) -> dict[str, float]:
    """The values of a metric, by category."""
    found = {name: result.metrics.get(metric) for name, result in run.categories.items() if result.status == "ok"}
    return {name: value for name, value in found.items() if value is not None}

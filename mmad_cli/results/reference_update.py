"""Writing the numbers of a run as a reference, and what that changes of an earlier one.

The file is the plain form of a reference, `{"categories": ..., "mean": ...}`, with `made_from` to say which run it was:
small, and a change of a number is one line of a diff.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mmad_cli.errors import DataError, UsageError, unknown_name
from mmad_cli.files import atomic_write
from mmad_cli.results.compare import MEAN
from mmad_cli.results.metric_names import METRICS, label
from mmad_cli.results.reference import MetricTable, ReferenceTable, match_category, read_reference_file
from mmad_cli.results.schema import SUMMARY, RunResult

OPTION = "--update-reference"


class Change(NamedTuple):
    """One number of a reference before and after; None where there is none. The mean is category `mean`."""

    category: str
    metric: str
    before: float | None
    after: float | None

    def __str__(self) -> str:
        name = f"{self.category} {label(self.metric)}"
        if self.before is None or self.after is None:
            value = self.after if self.before is None else self.before
            return f"{name} {'added' if self.before is None else 'removed'}: {value:.4f}"
        return f"{name} {self.before:.4f} -> {self.after:.4f} ({self.after - self.before:+.4f})"


@dataclass(frozen=True)
class ReferenceNumbers:
    """The numbers of a reference file."""

    rows: MetricTable = field(default_factory=dict)
    mean: Mapping[str, float] = field(default_factory=dict)


def update_reference(
    run: RunResult, file: Path, metrics: Sequence[str] | None = None, categories: Sequence[str] | None = None
) -> list[Change]:
    """Write the numbers of a run to a reference file, atomically; returns what changed, in the order of the file.

    `metrics` are those to keep; without them those that the file has, and all that the run has where there is no file
    yet. `categories` likewise limits the categories, and the file then has no mean. A file that has no mean, or
    nothing else, stays like that.

    Raises UsageError when categories of the run failed or are missing (they would no longer be checked) and none are
    chosen, for a category that the run does not have, and for the summary of a run; DataError when the file cannot be
    read.
    """
    before = _earlier(file)
    earlier = ReferenceNumbers() if before is None else ReferenceNumbers(before.rows, before.mean)
    names = _categories(run, categories)
    keys = metrics or (_metrics_of(earlier) if before is not None else _metrics_of_run(run))
    rows = _defined({name: {key: run.categories[name].metrics.get(key) for key in keys} for name in names})
    mean = _defined({MEAN: {key: run.mean.get(key) for key in keys}}).get(MEAN, {})
    made = ReferenceNumbers(
        rows={} if before is not None and not earlier.rows else rows,
        mean={} if categories or (before is not None and not earlier.mean) else mean,
    )
    if not made.rows and not made.mean:
        raise UsageError(f"{OPTION} {file}: the run has none of these numbers: {', '.join(keys) or 'no metric'}")
    atomic_write(file, _text(run, made).encode("utf-8", errors="backslashreplace"))
    return list(_changes(earlier, made))


def _earlier(file: Path) -> ReferenceTable | None:
    if file.name == SUMMARY and file.exists():
        raise UsageError(f"{OPTION} {file}: is the summary of a run; name a file of your own, as in reference/btf.json")
    if file.is_dir():
        raise UsageError(f"{OPTION} {file}: is a folder; name a file")
    if not file.exists():
        return None
    try:
        return read_reference_file(file)
    except DataError as error:
        raise DataError(f"{OPTION}: {error}; remove the file to write it anew") from error


def _categories(run: RunResult, chosen: Sequence[str] | None) -> list[str]:
    lost = [*run.failed_categories, *run.missing_categories]
    if chosen is None:
        if lost:
            raise UsageError(
                f"{OPTION}: the run has no numbers for {', '.join(lost)}, which would then no longer be checked; "
                "complete the run, or choose categories with --category"
            )
        return list(run.categories)
    found = {name: match_category(name, run.categories) for name in chosen}
    for name, match in found.items():
        if match is None:
            raise unknown_name("category", name, run.categories, "--category")
        if match in lost:
            raise UsageError(f"{OPTION}: the run has no numbers for {match}: {run.categories[match].error}")
    return [match for match in found.values() if match is not None]


def _metrics_of(numbers: ReferenceNumbers) -> list[str]:
    has = {*numbers.mean, *(key for row in numbers.rows.values() for key in row)}
    return [key for key in METRICS if key in has]


def _metrics_of_run(run: RunResult) -> list[str]:
    has = {key for result in run.categories.values() for key in result.metrics}
    return [key for key in METRICS if key in has]


def _defined(rows: Mapping[str, Mapping[str, float | None]]) -> MetricTable:
    kept = {name: {key: value for key, value in row.items() if value is not None} for name, row in rows.items()}
    return {name: row for name, row in kept.items() if row}


def _text(run: RunResult, numbers: ReferenceNumbers) -> str:
    made_from = {
        "run_id": run.run_id,
        "method": run.method.name,
        "variant": run.method.variant,
        "recipe": run.method.recipe,
        "dataset": run.dataset.name,
        "protocol": run.preprocessing.protocol,
        "shots": run.shots,
        "seed": run.seed,
        "mmad": run.environment.mmad,
    }
    data: dict[str, Any] = {"made_from": made_from, "categories": numbers.rows}
    if numbers.mean:
        data["mean"] = dict(numbers.mean)
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _changes(before: ReferenceNumbers, after: ReferenceNumbers) -> Iterator[Change]:
    old, new = _flat(before), _flat(after)
    for category, metric in dict.fromkeys([*new, *old]):
        values = old.get((category, metric)), new.get((category, metric))
        if values[0] != values[1]:
            yield Change(category, metric, *values)


def _flat(numbers: ReferenceNumbers) -> dict[tuple[str, str], float]:
    tables = [*numbers.rows.items(), (MEAN, numbers.mean)]
    return {(name, key): value for name, row in tables for key, value in row.items()}

"""Comparison of a run with published numbers, another run or a file: what moved, and by how much."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mmad_cli.errors import UsageError
from mmad_cli.results.metric_names import METRICS, check_metrics, label
from mmad_cli.results.reference import ReferenceTable, fold, match_category, mismatches
from mmad_cli.results.schema import RunResult

# Half a percentage point: above the rounding of three printed decimals and the spread of a re-run with
# another seed for most categories, below what a defect in a method moves.
DEFAULT_TOLERANCE = 0.005

# Decimal fractions are not exact in binary: |0.848 - 0.843| is 0.005000000000000004.
_ROUNDING = 1e-9

MEAN = "mean"

Status = Literal["ok", "out", "missing"]

EXIT_OK, EXIT_OUT, EXIT_MISSING = 0, 1, 3


@dataclass(frozen=True)
class Tolerances:
    """Largest allowed absolute difference, in fractions of 1: by metric, else the default."""

    default: float = DEFAULT_TOLERANCE
    by_metric: Mapping[str, float] = field(default_factory=dict)

    def of(self, metric: str) -> float:
        """Tolerance of one metric."""
        return self.by_metric.get(metric, self.default)


def parse_tolerances(texts: Iterable[str], option: str = "--tolerance", base: Tolerances | None = None) -> Tolerances:
    """Tolerances from texts such as `["0.01", "i_auroc=0.02"]`.

    A number is for all metrics, `metric=number` for one; of several for the same the last one counts. `base` holds
    where the texts say nothing; a number for all metrics replaces all of it.

    Raises UsageError for an unknown metric and for what is no number between 0 and 1.
    """
    default: float | None = None
    by_metric: dict[str, float] = {}
    for text in texts:
        metric, separator, number = text.rpartition("=")
        if not separator:
            default = _parse_number(number, text, option)
            continue
        check_metrics([metric.strip()], option)
        by_metric[metric.strip()] = _parse_number(number, text, option)
    if default is not None:
        return Tolerances(default, by_metric)
    base = base or Tolerances()
    return Tolerances(base.default, {**base.by_metric, **by_metric})


def _parse_number(number: str, text: str, option: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise UsageError(f"{option} {text}: should be a number between 0 and 1, or metric=number, as in i_auroc=0.01")
    return value


@dataclass(frozen=True)
class ComparisonRow:
    """One compared number. `obtained` is None where the run has no value; the note says why."""

    category: str
    metric: str
    obtained: float | None
    expected: float
    tolerance: float
    status: Status
    note: str = ""
    is_mean: bool = False

    @property
    def difference(self) -> float | None:
        """Obtained minus expected."""
        return None if self.obtained is None else self.obtained - self.expected


@dataclass(frozen=True)
class Comparison:
    """All compared numbers of one run, changed ones first.

    `remarks` say why the two may not be comparable and stand at the head of a report; `not_compared` names
    metrics of the reference that this tool does not compute, and metrics asked for that the reference does
    not have.
    """

    run_id: str
    reference: ReferenceTable
    rows: tuple[ComparisonRow, ...]
    remarks: tuple[str, ...] = ()
    not_compared: tuple[str, ...] = ()

    def count(self, status: Status) -> int:
        """Number of rows with a status."""
        return sum(row.status == status for row in self.rows)

    @property
    def exit_code(self) -> int:
        """1 when a number is out of tolerance, else 3 when one is missing or nothing was compared, else 0.

        Out of tolerance goes first: a number that moved is the finding, a category that failed is reported
        beside it.
        """
        if self.count("out"):
            return EXIT_OUT
        if self.count("missing") or not self.rows:
            return EXIT_MISSING
        return EXIT_OK


def compare(
    run: RunResult,
    reference: ReferenceTable,
    tolerances: Tolerances | None = None,
    metrics: Sequence[str] | None = None,
    categories: Collection[str] | None = None,
) -> Comparison:
    """Compare every number of the reference with the run's.

    `metrics` limits the comparison to these keys (default: all of the reference that the tool computes),
    `categories` to these categories, and then without the mean. A mean is compared only when both are over
    the same categories. Category names agree without case, hyphens, underscores and spaces.

    Raises UsageError when the reference has none of the metrics, or does not have a category asked for.
    """
    tolerances = tolerances or Tolerances()
    wanted = _wanted_metrics(reference, metrics)
    rows = [
        _category_row(run, name, metric, row[metric], tolerances.of(metric))
        for name, row in _wanted_rows(reference, categories).items()
        for metric in wanted
        if metric in row
    ]
    if categories is None:
        rows += [
            _mean_row(run, reference, metric, tolerances.of(metric)) for metric in wanted if metric in reference.mean
        ]
    asked = dict.fromkeys([*(metrics or ()), *(m for m in reference.metrics if m not in METRICS)])
    not_compared = [metric for metric in asked if metric not in wanted]
    return Comparison(
        run_id=run.run_id,
        reference=reference,
        rows=tuple(sorted(rows, key=_changed_first)),
        remarks=tuple(mismatches(run, reference)),
        not_compared=tuple(not_compared),
    )


def _wanted_metrics(reference: ReferenceTable, metrics: Sequence[str] | None) -> list[str]:
    if metrics is None:
        return [metric for metric in METRICS if metric in reference.metrics]
    wanted = [metric for metric in metrics if metric in reference.metrics]
    if not wanted:
        has = ", ".join(reference.metrics) or "none"
        raise UsageError(f"--metric {', '.join(metrics)}: not in {reference.name}, which has: {has}")
    return wanted


def _wanted_rows(reference: ReferenceTable, categories: Collection[str] | None) -> dict[str, dict[str, float]]:
    if categories is None:
        return reference.rows
    found = {name: match_category(name, reference.rows) for name in categories}
    lost = [name for name, match in found.items() if match is None]
    if lost:
        has = ", ".join(reference.rows) or "means only"
        raise UsageError(f"--category {', '.join(lost)}: not in {reference.name}, which has: {has}")
    return {match: reference.rows[match] for match in found.values() if match is not None}


def _changed_first(row: ComparisonRow) -> tuple[int, float]:
    """Out of tolerance by size, then missing, then the rest by size; ties keep the reference's order."""
    rank = {"out": 0, "missing": 1, "ok": 2}[row.status]
    return rank, -abs(row.difference or 0.0)


def _row(category: str, metric: str, obtained: float, expected: float, tolerance: float) -> ComparisonRow:
    inside = abs(obtained - expected) <= tolerance + _ROUNDING
    return ComparisonRow(category, metric, obtained, expected, tolerance, "ok" if inside else "out")


def _missing(category: str, metric: str, expected: float, tolerance: float, note: str) -> ComparisonRow:
    return ComparisonRow(category, metric, None, expected, tolerance, "missing", note)


def _category_row(run: RunResult, name: str, metric: str, expected: float, tolerance: float) -> ComparisonRow:
    matched = match_category(name, run.categories)
    if matched is None:
        return _missing(name, metric, expected, tolerance, "no such category in the run")
    result = run.categories[matched]
    if result.status == "failed":
        return _missing(matched, metric, expected, tolerance, f"failed: {result.error}")
    obtained = result.metrics.get(metric)
    if obtained is None:
        reason = result.metrics_null_reasons.get(metric, "not computed by the run")
        return _missing(matched, metric, expected, tolerance, reason)
    return _row(matched, metric, obtained, expected, tolerance)


def _mean_row(run: RunResult, reference: ReferenceTable, metric: str, tolerance: float) -> ComparisonRow:
    expected = reference.mean[metric]
    over = reference.categories_of_mean(metric)
    results = run.categories.items()
    defined = [name for name, r in results if r.status == "ok" and r.metrics.get(metric) is not None]
    obtained = run.mean.get(metric)
    if obtained is None:
        row = _missing(MEAN, metric, expected, tolerance, f"the run has no mean of {label(metric)}")
    elif over is not None and set(map(fold, over)) != set(map(fold, defined)):
        note = f"the run's mean {obtained:.4f} is over {_which(defined)}, the reference's over {_which(over)}"
        row = _missing(MEAN, metric, expected, tolerance, note)
    else:
        row = _row(MEAN, metric, obtained, expected, tolerance)
    return ComparisonRow(**{**vars(row), "is_mean": True})


def _which(names: Sequence[str]) -> str:
    listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {'category' if len(names) == 1 else 'categories'} ({listed})"


def exit_code(comparisons: Iterable[Comparison]) -> int:
    """Exit code of several comparisons together: 1 goes before 3, 3 before 0."""
    codes = {comparison.exit_code for comparison in comparisons}
    return EXIT_OUT if EXIT_OUT in codes else EXIT_MISSING if EXIT_MISSING in codes else EXIT_OK

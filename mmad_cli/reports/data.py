"""Reports for programs: tidy CSV and JSON, with full precision."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmad_cli.reports.document import choose_metrics
from mmad_cli.results.compare import MEAN, Comparison, ComparisonRow
from mmad_cli.results.metric_names import METRICS
from mmad_cli.results.schema import RunResult
from mmad_cli.results.seeds import SeedGroup, Spread, group_by_seed

RUN_COLUMNS = (
    "run_id",
    "method",
    "variant",
    "recipe",
    "dataset",
    "category",
    "metric",
    "value",
    "comparable",
)
COMPARISON_COLUMNS = (
    "run_id",
    "reference",
    "category",
    "metric",
    "obtained",
    "expected",
    "difference",
    "tolerance",
    "status",
    "note",
)


def render_csv(runs: Sequence[RunResult], metrics: Sequence[str] | None, comparisons: Sequence[Comparison]) -> str:
    """One number per line: of the runs with the mean as category `mean`, or of the comparisons if there are any.

    Without `metrics` all metrics that a run has. An empty value is undefined, or its category failed. Every line is
    of one run: mean and spread over seeds are not in here, the JSON has them.
    """
    if comparisons:
        return csv_text(COMPARISON_COLUMNS, [_fields(c, row) for c in comparisons for row in c.rows])
    keys = choose_metrics(runs, metrics) if metrics else _all_metrics(runs)
    return csv_text(RUN_COLUMNS, [line for run in runs for line in _run_lines(run, keys)])


def render_json(runs: Sequence[RunResult], metrics: Sequence[str] | None, comparisons: Sequence[Comparison]) -> str:
    """`{"runs": [...], "seeds": [...], "comparisons": [...]}`, whatever the metrics.

    The runs are as in their `summary.json`. `seeds` has an entry for each group of runs that differ in nothing but
    their seed, with mean, sample standard deviation and number of values per category and metric.
    """
    if metrics:
        choose_metrics(runs, metrics)  # an unknown name is an error in every format
    data = {
        "runs": [run.model_dump(mode="json", by_alias=True) for run in runs],
        "seeds": [_seed_group(group) for group in group_by_seed(runs)],
        "comparisons": [_comparison(comparison) for comparison in comparisons],
    }
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def csv_text(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Lines of a CSV file, the first of which names the columns."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([columns, *rows])
    return text.getvalue()


def _all_metrics(runs: Sequence[RunResult]) -> list[str]:
    found = {key for run in runs for result in run.categories.values() for key in result.metrics}
    return [key for key in METRICS if key in found] + sorted(found - METRICS.keys())


def _run_lines(run: RunResult, metrics: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    head = (run.run_id, run.method.shown, run.method.variant, run.method.recipe, run.dataset.name)
    tables = [(name, result.metrics) for name, result in run.categories.items()] + [(MEAN, run.mean)]
    for name, values in tables:
        for metric in metrics:
            yield (*head, name, metric, exact(values.get(metric)), str(run.comparable).lower())


def exact(value: float | None) -> str:
    """A number that reads back as the same one; empty for none."""
    return "" if value is None else repr(value)


def _fields(comparison: Comparison, row: ComparisonRow) -> tuple[Any, ...]:
    return (
        comparison.run_id,
        comparison.reference.name,
        row.category,
        row.metric,
        exact(row.obtained),
        exact(row.expected),
        exact(row.difference),
        exact(row.tolerance),
        row.status,
        row.note,
    )


def _comparison(comparison: Comparison) -> dict[str, Any]:
    return {
        "run_id": comparison.run_id,
        "reference": {
            "name": comparison.reference.name,
            "source": comparison.reference.source,
            "notes": list(comparison.reference.notes),
        },
        "remarks": list(comparison.remarks),
        "not_compared": list(comparison.not_compared),
        "rows": [{**vars(row), "difference": row.difference} for row in comparison.rows],
        "exit_code": comparison.exit_code,
    }


def _seed_group(group: SeedGroup) -> dict[str, Any]:
    first = group.runs[0]
    return {
        "run_ids": [run.run_id for run in group.runs],
        "seeds": list(group.seeds),
        "method": first.method.shown,
        "variant": first.method.variant,
        "recipe": first.method.recipe,
        "dataset": first.dataset.name,
        "comparable": all(run.comparable for run in group.runs),
        "categories": {name: _spreads(values) for name, values in group.categories.items()},
        "mean": _spreads(group.mean),
    }


def _spreads(values: Mapping[str, Spread]) -> dict[str, Any]:
    return {key: {"mean": s.mean, "std": s.std, "n": s.count} for key, s in values.items()}

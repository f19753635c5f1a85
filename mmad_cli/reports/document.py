"""What a report says, before any format: sections of one table each, with warnings above and notes below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mmad_cli.results.compare import Comparison, ComparisonRow
from mmad_cli.results.metric_names import METRICS, check_metrics, default_metrics, higher_is_better, label
from mmad_cli.results.schema import CategoryResult, RunResult
from mmad_cli.results.seeds import SeedGroup, Spread, group_by_seed

NOT_AVAILABLE = "n/a"
NOT_COMPARABLE = "†"

Tone = Literal["plain", "good", "bad", "warn"]


@dataclass(frozen=True)
class Cell:
    """Text of one cell; `mark` refers to a note, `detail` stands below the text where a format has room for it."""

    text: str
    bold: bool = False
    mark: str = ""
    tone: Tone = "plain"
    detail: str = ""


@dataclass(frozen=True)
class Section:
    """One table. The first `text_columns` columns are text, the others numbers; `rule_before` is the mean row.

    `transposable`: a terminal that is too narrow may show rows as columns.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    text_columns: int = 1
    rule_before: int | None = None
    subtitle: str = ""
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    transposable: bool = False


@dataclass(frozen=True)
class Document:
    """All sections of a report."""

    sections: tuple[Section, ...] = ()


@dataclass
class Notes:
    """Notes below a table; one text gets one mark, however often it is used."""

    marks: dict[str, str] = field(default_factory=dict)

    def mark(self, text: str) -> str:
        """The mark that stands for a text."""
        return self.marks.setdefault(text, str(len(self.marks) + 1))

    def lines(self) -> tuple[str, ...]:
        """The notes, each after its mark."""
        return tuple(f"({mark}) {text}" for text, mark in self.marks.items())


def build_document(
    runs: Sequence[RunResult], metrics: Sequence[str] | None = None, comparisons: Sequence[Comparison] = ()
) -> Document:
    """Sections for the runs, one table per dataset and metric when there are several, then the comparisons.

    Runs that differ only in their seed get a table of mean and spread after those of their dataset.
    """
    keys = choose_metrics(runs, metrics)
    sections: list[Section] = []
    for group in _by_dataset(runs):
        sections += [_run_section(group[0], keys)] if len(group) == 1 else _group_sections(group, keys)
        sections += [_seeds_section(seeds, keys) for seeds in group_by_seed(group)]
    sections += [_comparison_section(comparison) for comparison in comparisons]
    return Document(tuple(sections))


def choose_metrics(runs: Sequence[RunResult], metrics: Sequence[str] | None) -> list[str]:
    """Metrics of the columns: those asked for, else the default ones as far as any run has them.

    Raises UsageError for a metric that is neither known nor in any run.
    """
    found = dict.fromkeys(key for run in runs for result in run.categories.values() for key in result.metrics)
    if metrics:
        return check_metrics(metrics, "--metric", extra=found)
    usual = default_metrics(run.method.name for run in runs)
    return [key for key in usual if key in found] or list(found) or list(usual)


def run_label(run: RunResult) -> str:
    """Method, variant and recipe."""
    return f"{run.method.shown} {run.method.variant} ({run.method.recipe})"


def _by_dataset(runs: Sequence[RunResult]) -> list[list[RunResult]]:
    """Only runs on the same content stand in one table."""
    groups: dict[tuple[str, str], list[RunResult]] = {}
    for run in runs:
        groups.setdefault((run.dataset.name, run.dataset.digest), []).append(run)
    return list(groups.values())


def format_number(value: float) -> str:
    """Three decimals, as print has them."""
    return f"{value:.3f}"


def _value_cell(value: float | None, reason: str, notes: Notes, note: str = "") -> Cell:
    if value is None:
        return Cell(NOT_AVAILABLE, mark=notes.mark(reason))
    return Cell(format_number(value), mark=notes.mark(note) if note else "")


def _category_cell(result: CategoryResult | None, metric: str, notes: Notes) -> Cell:
    """Value of one category, or why there is none."""
    if result is not None and result.status == "failed":
        return Cell("failed", mark=notes.mark(_absence(result, metric)), tone="bad")
    value = None if result is None else result.metrics.get(metric)
    return _value_cell(value, _absence(result, metric), notes)


def _absence(result: CategoryResult | None, metric: str) -> str:
    """Why a category has no value of a metric."""
    if result is None:
        return "the run has no result for this category"
    if result.status == "failed":
        return f"failed: {result.error}"
    return result.metrics_null_reasons.get(metric, "not computed by the run")


def _mean_cell(run: RunResult, metric: str, notes: Notes) -> Cell:
    note = run.mean_notes.get(metric, "")
    return _value_cell(run.mean.get(metric), note or "no category has a value", notes, note)


def _settings(which: str, seed: str, run: RunResult) -> str:
    parts = [
        which,
        f"preprocessing {run.preprocessing.protocol}",
        seed,
        f"{run.shots} shots" if run.shots is not None else "",
        f"limit {run.limit}" if run.limit is not None else "",
        "full resolution" if run.full_resolution else "",
    ]
    return ", ".join(filter(None, parts))


def _not_comparable(run: RunResult) -> tuple[str, ...]:
    if run.comparable:
        return ()
    reasons = "; ".join(run.not_comparable) or "no reason was recorded"
    return (f"Not comparable with published numbers: {reasons}",)


def _unfinished(missing: Sequence[str]) -> tuple[str, ...]:
    return (f"No result for: {', '.join(missing)}",) if missing else ()


def _run_section(run: RunResult, metrics: Sequence[str]) -> Section:
    """One run: a row per category, then the mean."""
    notes = Notes()
    rows = [
        (Cell(name), *(_category_cell(result, metric, notes) for metric in metrics))
        for name, result in run.categories.items()
    ]
    mean = (Cell("mean"), *(_mean_cell(run, metric, notes) for metric in metrics))
    return Section(
        title=f"{run_label(run)} on {run.dataset.name}",
        subtitle=_settings(f"run {run.run_id}", f"seed {run.seed}", run),
        header=("category", *map(label, metrics)),
        rows=(*rows, mean),
        rule_before=len(rows),
        warnings=(*_not_comparable(run), *_unfinished(run.missing_categories)),
        notes=notes.lines(),
    )


def _group_sections(runs: Sequence[RunResult], metrics: Sequence[str]) -> list[Section]:
    """Several runs on one dataset: the means, then a table per metric with a column per category."""
    names = list(dict.fromkeys(name for run in runs for name in run.categories))
    labels = _distinct_labels(runs)
    warnings = tuple(
        f"{NOT_COMPARABLE} {text}: {warning}"
        for run, text in zip(runs, labels, strict=True)
        for warning in _not_comparable(run)
    )
    heads = [Cell(text, mark="" if run.comparable else NOT_COMPARABLE) for run, text in zip(runs, labels, strict=True)]
    dataset = runs[0].dataset.name
    sections = [_means_section(runs, heads, metrics, len(names), f"Means on {dataset}", warnings)]
    # The reasons stand below the means; every further table may be read, or pasted, on its own.
    short = (f"{NOT_COMPARABLE} not comparable with published numbers",) if warnings else ()
    for metric in metrics:
        title = f"{label(metric)} on {dataset}"
        sections.append(_metric_section(runs, heads, names, metric, title, short))
    return sections


def _distinct_labels(runs: Sequence[RunResult]) -> list[str]:
    """Labels; where runs would share one, with the seed if that is all they differ in, else with the run's id."""
    labels = [run_label(run) for run in runs]
    by_label = {text: [run for run in runs if run_label(run) == text] for text in labels}
    return [_distinct_label(run, by_label[text]) for run, text in zip(runs, labels, strict=True)]


def _distinct_label(run: RunResult, namesakes: Sequence[RunResult]) -> str:
    if len(namesakes) == 1:
        return run_label(run)
    only_seeds = any(len(group.runs) == len(namesakes) for group in group_by_seed(namesakes))
    return f"{run_label(run)} seed {run.seed}" if only_seeds else f"{run_label(run)} {run.run_id}"


def _means_section(
    runs: Sequence[RunResult],
    heads: Sequence[Cell],
    metrics: Sequence[str],
    categories: int,
    title: str,
    warnings: tuple[str, ...],
) -> Section:
    notes = Notes()
    columns = []
    for metric in metrics:
        cells = [_group_mean_cell(run, metric, categories, notes) for run in runs]
        columns.append(_with_best(cells, _full_means(runs, metric, categories), metric))
    return Section(
        title=title,
        header=("method", *map(label, metrics)),
        rows=tuple(zip(heads, *columns, strict=True)),
        warnings=warnings,
        notes=notes.lines(),
    )


def _metric_section(
    runs: Sequence[RunResult],
    heads: Sequence[Cell],
    names: Sequence[str],
    metric: str,
    title: str,
    warnings: tuple[str, ...],
) -> Section:
    notes = Notes()
    columns = []
    for name in names:
        results = [run.categories.get(name) for run in runs]
        cells = [_category_cell(result, metric, notes) for result in results]
        values = [r.metrics.get(metric) if r and r.status == "ok" else None for r in results]
        columns.append(_with_best(cells, values, metric))
    means = [_group_mean_cell(run, metric, len(names), notes) for run in runs]
    columns.append(_with_best(means, _full_means(runs, metric, len(names)), metric))
    return Section(
        title=title,
        header=("method", *names, "mean"),
        rows=tuple(zip(heads, *columns, strict=True)),
        warnings=warnings,
        notes=notes.lines(),
        transposable=True,
    )


def _mean_count(run: RunResult, metric: str) -> int:
    return sum(r.status == "ok" and r.metrics.get(metric) is not None for r in run.categories.values())


def _group_mean_cell(run: RunResult, metric: str, categories: int, notes: Notes) -> Cell:
    count = _mean_count(run, metric)
    if run.mean.get(metric) is None or run.mean_notes.get(metric) or count == categories:
        return _mean_cell(run, metric, notes)
    note = f"mean over {count} of the {categories} categories of this table"
    return _value_cell(run.mean[metric], "", notes, note)


def _full_means(runs: Sequence[RunResult], metric: str, categories: int) -> list[float | None]:
    """Means that are over every category of the table: only these compete for the best."""
    return [run.mean.get(metric) if _mean_count(run, metric) == categories else None for run in runs]


def _with_best(cells: Sequence[Cell], values: Sequence[float | None], metric: str) -> list[Cell]:
    """Cells with the best value in bold; equal as printed counts as equal, a single value is not a best."""
    printed = [None if value is None else format_number(value) for value in values]
    defined = [text for text in printed if text is not None]
    if len(defined) < 2:
        return list(cells)
    best = max(defined, key=float) if higher_is_better(metric) else min(defined, key=float)
    return [
        Cell(cell.text, bold=text == best, mark=cell.mark, tone=cell.tone)
        for cell, text in zip(cells, printed, strict=True)
    ]


def _seeds_section(group: SeedGroup, metrics: Sequence[str]) -> Section:
    """Mean and standard deviation over the seeds: a row per category, then the mean over categories."""
    notes = Notes()
    rows = [(Cell(name), *(_seeds_cell(group, name, metric, notes) for metric in metrics)) for name in group.categories]
    mean = (Cell("mean"), *(_seeds_mean_cell(group, metric, notes) for metric in metrics))
    first = group.runs[0]
    never = [name for name in first.dataset.categories if name not in group.categories]
    return Section(
        title=f"{run_label(first)} on {first.dataset.name} over {len(group.seeds)} seeds",
        subtitle=_settings("mean ± sample standard deviation", _seeds_text(group.seeds), first),
        header=("category", *map(label, metrics)),
        rows=(*rows, mean),
        rule_before=len(rows),
        warnings=(
            *dict.fromkeys(warning for run in group.runs for warning in _not_comparable(run)),
            *_unfinished(never),
        ),
        notes=notes.lines(),
    )


def _seeds_text(seeds: Sequence[int]) -> str:
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"


def _seeds_cell(group: SeedGroup, category: str, metric: str, notes: Notes) -> Cell:
    results = [run.categories.get(category) for run in group.runs]
    if all(result is not None and result.status == "failed" for result in results):
        return Cell("failed", mark=notes.mark(_lost_seeds(group, Spread(), category, metric)), tone="bad")
    spread = group.categories[category].get(metric, Spread())
    return _spread_cell(spread, notes, _lost_seeds(group, spread, category, metric))


def _lost_seeds(group: SeedGroup, spread: Spread, category: str, metric: str) -> str:
    """Which seeds have no value and why; empty when all have one."""
    reasons: dict[str, list[int]] = {}
    for run in group.runs:
        if run.seed not in spread.values:
            reasons.setdefault(_absence(run.categories.get(category), metric), []).append(run.seed)
    if not reasons:
        return ""
    texts = [f"{_seeds_text(seeds)}: {reason}" for reason, seeds in reasons.items()]
    return f"over {spread.count} of {len(group.seeds)} seeds; {'; '.join(texts)}"


def _seeds_mean_cell(group: SeedGroup, metric: str, notes: Notes) -> Cell:
    spread = group.mean.get(metric, Spread())
    texts = []
    left_out = [seed for seed in group.seeds if seed not in spread.values]
    if left_out:
        texts.append(f"over {spread.count} of {len(group.seeds)} seeds; {_seeds_text(left_out)}: too few categories")
    defined = sum(values[metric].count > 0 for values in group.categories.values() if metric in values)
    if defined < len(group.categories):
        texts.append(f"mean over {defined} of {len(group.categories)} categories")
    return _spread_cell(spread, notes, "; ".join(texts))


def _spread_cell(spread: Spread, notes: Notes, note: str) -> Cell:
    """`mean ± standard deviation`; a single value stands alone, and its note says that it is one."""
    if spread.mean is None or spread.std is None:
        return _value_cell(spread.mean, note or "no category has a value", notes, note)
    text = f"{format_number(spread.mean)} ± {format_number(spread.std)}"
    return Cell(text, mark=notes.mark(note) if note else "")


_TONES: Mapping[str, Tone] = {"ok": "good", "out": "bad", "missing": "warn"}


def _comparison_section(comparison: Comparison) -> Section:
    """Obtained against expected, changed ones first."""
    notes = Notes()
    rows = tuple(_comparison_cells(row, notes) for row in comparison.rows)
    counts = {"out of tolerance": "out", "missing": "missing", "within tolerance": "ok"}
    summary = ", ".join(
        f"{sum(row.status == status for row in comparison.rows)} {text}" for text, status in counts.items()
    )
    left_out = ", ".join(label(metric) for metric in comparison.not_compared)
    return Section(
        title=f"{comparison.run_id} against {comparison.reference.name}",
        subtitle=summary,
        header=("category", "metric", "obtained", "expected", "difference", "tolerance", "status"),
        rows=rows,
        text_columns=2,
        warnings=tuple(f"Compare with care: {remark}" for remark in comparison.remarks),
        notes=(
            *notes.lines(),
            *((f"Not compared: {left_out}",) if left_out else ()),
            f"Expected: {comparison.reference.source}",
            *comparison.reference.notes,
        ),
    )


def _comparison_cells(row: ComparisonRow, notes: Notes) -> tuple[Cell, ...]:
    obtained = NOT_AVAILABLE if row.obtained is None else f"{row.obtained:.4f}"
    difference = NOT_AVAILABLE if row.difference is None else f"{row.difference:+.4f}"
    return (
        Cell(row.category),
        Cell(label(row.metric) if row.metric in METRICS else row.metric),
        Cell(obtained, mark=notes.mark(row.note) if row.note else ""),
        Cell(f"{row.expected:.4f}"),
        Cell(difference),
        Cell(f"{row.tolerance:g}"),
        Cell(row.status, bold=row.status != "ok", tone=_TONES[row.status]),
    )

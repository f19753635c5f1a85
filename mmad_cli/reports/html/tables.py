"""The parts of the page that need no script: tables of metrics, costs and provenance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmad_cli.reports.document import Cell, Section, build_document, choose_metrics
from mmad_cli.reports.html.markup import element, escape, listing, text_element
from mmad_cli.results.compare import DEFAULT_TOLERANCE, MEAN, Comparison
from mmad_cli.results.metric_names import METRICS, higher_is_better
from mmad_cli.results.reference import ReferenceTable, fold, list_references, match_category, mismatches
from mmad_cli.results.schema import CategoryResult, RunResult

_MEBIBYTE = 2**20
# Beyond this a difference is no longer small: four times the tolerance of a comparison
_LARGE = 4 * DEFAULT_TOLERANCE


# -- tables of a document ----------------------------------------------------------------------------------------


def section_html(section: Section, *, heading: str = "h3") -> str:
    """Title, warnings, table and notes of a section."""
    return _framed(section, _plain_table(section), heading)


def _framed(section: Section, table: str, heading: str, controls: str = "") -> str:
    return element(
        "section",
        text_element(heading, section.title)
        + (text_element("p", section.subtitle, class_="subtitle") if section.subtitle else "")
        + listing(section.warnings, "warnings")
        + controls
        + element("div", table, {"class": "scroll", "tabindex": "0", "role": "region", "aria-label": section.title})
        + listing(section.notes, "notes"),
        {"class": "block"},
    )


def _plain_table(section: Section) -> str:
    rows = [
        "".join(_cell_html(cell, index < section.text_columns, index == 0) for index, cell in enumerate(row))
        for row in section.rows
    ]
    return _table(section.header, rows, section.rule_before, section.text_columns)


def _table(header: Sequence[str], rows: Sequence[str], foot_from: int | None = None, text_columns: int = 1) -> str:
    """A table whose columns a script can sort; rows from `foot_from` on stay at the end."""
    split = len(rows) if foot_from is None else foot_from
    heads = "".join(
        element(
            "th",
            # a remark in brackets goes on a line of its own, so that the column stays narrow
            text_element("button", name.replace(" (", "\n("), type="button"),
            {"scope": "col", "aria-sort": "none", "class": "text" if index < text_columns else None},
        )
        for index, name in enumerate(header)
    )
    body = "".join(element("tr", row) for row in rows[:split])
    foot = "".join(element("tr", row) for row in rows[split:])
    return element(
        "table",
        element("thead", element("tr", heads)) + element("tbody", body) + (element("tfoot", foot) if foot else ""),
        {"class": "sortable"},
    )


def _cell_html(cell: Cell, is_text: bool, is_head: bool, attributes: Mapping[str, object] | None = None) -> str:
    text = escape(cell.text)
    content = f"<b>{text}</b>" if cell.bold else text
    content += f"<sup>{escape(cell.mark)}</sup>" if cell.mark else ""
    classes = " ".join(filter(None, ["text" if is_text else "", "" if cell.tone == "plain" else cell.tone]))
    given = {"class": classes or None, **({"scope": "row"} if is_head else {}), **(attributes or {})}
    return element("th" if is_head else "td", content, given)


# -- summary -----------------------------------------------------------------------------------------------------


def summary_html(
    runs: Sequence[RunResult],
    metrics: Sequence[str] | None,
    comparisons: Sequence[Comparison],
    references: Sequence[Sequence[ReferenceTable]],
) -> str:
    """Tables over several runs, then each run by category with its deviation from a published row, then comparisons."""
    parts = []
    if len(runs) > 1:
        parts += [section_html(section) for section in build_document(runs, metrics).sections]
    parts += [
        run_table(index, run, metrics, tables) for index, (run, tables) in enumerate(zip(runs, references, strict=True))
    ]
    parts += [section_html(section) for section in build_document((), None, comparisons).sections]
    return "".join(parts)


def run_table(index: int, run: RunResult, metrics: Sequence[str] | None, references: Sequence[ReferenceTable]) -> str:
    """Categories x metrics of one run. Every number carries what a script needs to hold it against another row."""
    (section,) = build_document([run], metrics).sections
    keys = choose_metrics([run], metrics)
    chosen = references[0] if references else None
    rows: list[str] = []
    for name, cells in zip((*run.categories, MEAN), section.rows, strict=True):
        is_mean = len(rows) == len(run.categories)
        head, *numbers = cells
        values: Mapping[str, float | None] = run.mean if is_mean else run.categories[name].metrics
        texts = [
            _value_html(cell, key, values.get(key), expected(chosen, run, None if is_mean else name, key))
            for cell, key in zip(numbers, keys, strict=True)
        ]
        row_head = _cell_html(head, True, True, {"data-category": None if is_mean else name})
        rows.append(row_head + "".join(texts))
    table = _table(section.header, rows, section.rule_before)
    return _framed(
        section,
        element("div", table, {"class": "run-table", "data-run": index}),
        "h3",
        _reference_choice(index, references),
    )


def _value_html(cell: Cell, metric: str, value: float | None, expected_value: float | None) -> str:
    inner = f'<span class="value">{escape(cell.text)}</span>'
    inner += f"<sup>{escape(cell.mark)}</sup>" if cell.mark else ""
    if value is None:
        return element("td", inner, {"class": cell.tone if cell.tone != "plain" else None})
    kind, text = deviation(metric, value, expected_value)
    inner += text_element("span", text, class_=f"delta {kind}".strip())
    return element("td", inner, {"data-metric": metric, "data-value": repr(value)})


def deviation(metric: str, value: float, expected_value: float | None) -> tuple[str, str]:
    """How a value stands to a published one: a class for its colour, and the difference as text."""
    if expected_value is None:
        return "", ""
    difference = value - expected_value
    gain = difference if higher_is_better(metric) else -difference
    if abs(difference) <= DEFAULT_TOLERANCE:
        return "same", f"{difference:+.3f}"
    size = " large" if abs(difference) > _LARGE else ""
    return ("better" if gain > 0 else "worse") + size, f"{difference:+.3f}"


def expected(table: ReferenceTable | None, run: RunResult, category: str | None, metric: str) -> float | None:
    """The published value for a category, or with None for the mean, where that is over the run's categories."""
    if table is None:
        return None
    if category is None:
        over = table.categories_of_mean(metric)
        defined = {fold(n) for n, r in run.categories.items() if r.status == "ok" and r.metrics.get(metric) is not None}
        return table.mean.get(metric) if over is None or set(map(fold, over)) == defined else None
    name = match_category(category, table.rows)
    return None if name is None else table.rows[name].get(metric)


def _reference_choice(index: int, references: Sequence[ReferenceTable]) -> str:
    if not references:
        return ""
    name = f"reference-{index}"
    options = "".join(
        element("option", escape(table.name), {"value": number, "selected": number == 0})
        for number, table in enumerate(references)
    )
    options += '<option value="-1">none</option>'
    return element(
        "p",
        text_element("label", "Deviation from", for_=name)
        + element("select", options, {"id": name, "class": "reference", "data-run": index})
        + text_element("span", "", class_="reference-source", aria_live="polite"),
        {"class": "controls"},
    )


def fitting_references(run: RunResult, comparisons: Sequence[Comparison]) -> list[ReferenceTable]:
    """Rows to hold a run against: those it was compared with, then the published ones for its method and dataset.

    Of the published ones those come first that were made in the same way as the run, and the method's own source.
    """
    given = [comparison.reference for comparison in comparisons if comparison.run_id == run.run_id]
    method, variant = fold(run.method.name), fold(run.method.variant)
    published = [
        reference.table()
        for reference in list_references()
        if fold(reference.method) == method
        and fold(reference.dataset) in fold(run.dataset.name)
        and (not reference.variants or variant in map(fold, reference.variants))
    ]
    published.sort(key=lambda table: (len(_differences(run, table)), not fold(table.name).startswith(method)))
    known = {table.name for table in given}
    return given + [table for table in published if table.name not in known]


def _differences(run: RunResult, table: ReferenceTable) -> list[str]:
    return [remark for remark in mismatches(run, table) if not remark.startswith("the run is not comparable")]


def reference_data(run: RunResult, table: ReferenceTable) -> dict[str, Any]:
    """A row as the script needs it: numbers under the names that the run uses."""

    def numbers(category: str | None) -> dict[str, float]:
        return {key: value for key in METRICS if (value := expected(table, run, category, key)) is not None}

    return {
        "name": table.name,
        "source": table.source,
        "remarks": _differences(run, table),
        "rows": {name: numbers(name) for name in run.categories},
        "mean": numbers(None),
    }


# -- costs -------------------------------------------------------------------------------------------------------


def costs_html(runs: Sequence[RunResult], labels: Sequence[str]) -> str:
    """Seconds per stage, memory and bank sizes by category; a script adds bars."""
    return "".join(_costs_of_run(index, run, labels[index]) for index, run in enumerate(runs))


def _costs_of_run(index: int, run: RunResult, label: str) -> str:
    done = {name: result for name, result in run.categories.items() if result.status == "ok"}
    if not done:
        return ""
    stages = list(dict.fromkeys(stage for result in done.values() for stage in result.seconds))
    gpu = any(result.peak_vram_bytes is not None for result in done.values())
    header = ("category", *stages, "total", "peak memory", *(["peak GPU memory"] if gpu else []), "memory bank")
    rows = ["".join(_cost_cells(name, result, stages, gpu)) for name, result in done.items()]
    total = [sum(result.seconds.get(stage, 0.0) for result in done.values()) for stage in stages]
    rows.append(
        text_element("th", "total", scope="row", class_="text")
        + "".join(text_element("td", _seconds(value)) for value in (*total, sum(total)))
        + "<td></td>" * (3 if gpu else 2)
    )
    section = Section(
        title=f"{label} on {run.dataset.name}",
        header=header,
        rows=(),
        subtitle="seconds per stage, as when it was computed; what the store had already took no time",
    )
    table = element("div", _table(header, rows, len(done)), {"data-costs": index})
    return _framed(section, table, "h3") + _memory_of_run(section.title, done)


def _memory_of_run(title: str, done: Mapping[str, CategoryResult]) -> str:
    """Peak memory per stage; empty for runs that did not record it."""
    stages = list(dict.fromkeys(stage for result in done.values() for stage in result.peak_rss_bytes_by_stage))
    if not stages:
        return ""
    rows = [
        text_element("th", name, scope="row", class_="text")
        + "".join(_memory_cell(result.peak_rss_bytes_by_stage.get(stage)) for stage in stages)
        for name, result in done.items()
    ]
    section = Section(
        title=f"{title}: memory",
        header=("category", *stages),
        rows=(),
        subtitle="largest resident set of the main process while a stage ran, the libraries included; "
        "worker processes are not counted",
    )
    return _framed(section, _table(section.header, rows), "h3")


def _memory_cell(size: int | None) -> str:
    return text_element("td", "" if size is None else f"{size / _MEBIBYTE:,.0f} MiB", data_value=size)


def _cost_cells(name: str, result: CategoryResult, stages: Sequence[str], gpu: bool) -> Iterable[str]:
    yield text_element("th", name, scope="row", class_="text")
    for stage in stages:
        value = result.seconds.get(stage)
        yield text_element("td", "" if value is None else _seconds(value), data_value=value, data_stage=stage)
    total = sum(result.seconds.values())
    yield text_element("td", _seconds(total), data_value=total)
    for size in (result.peak_rss_bytes, *([result.peak_vram_bytes] if gpu else [])):
        yield _memory_cell(size)
    banks = ", ".join(f"{bank}: {size.rows:,} × {size.dim}" for bank, size in result.bank.items())
    yield text_element("td", banks, class_="text")


def _seconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}"


# -- provenance --------------------------------------------------------------------------------------------------


def provenance_html(runs: Sequence[RunResult], labels: Sequence[str]) -> str:
    """Where every number comes from."""
    return "".join(_provenance_of_run(run, labels[index]) for index, run in enumerate(runs))


def _provenance_of_run(run: RunResult, label: str) -> str:
    facts = {
        "run": run.run_id,
        "created": run.created.isoformat(sep=" "),
        "command": " ".join(run.argv) or "from Python",
        "method": f"{run.method.shown} {run.method.variant}, version {run.method.method_version}",
        "recipe": run.method.recipe,
        "configuration digest": run.method.config_hash,
        "dataset": run.dataset.name,
        "dataset digest": run.dataset.digest,
        "preprocessing": run.preprocessing.protocol,
        "seed": run.seed,
        "training samples": "all" if run.shots is None else f"{run.shots} per category",
        "limit": "none" if run.limit is None else f"{run.limit} samples per split and defect",
        "metrics at": "scan size" if run.full_resolution else "224 x 224",
        "comparable": "yes" if run.comparable else "no: " + "; ".join(run.not_comparable),
    }
    environment = {
        key: value for key, value in run.environment.model_dump(mode="json", by_alias=True).items() if value is not None
    }
    weights = [
        f"{item.name}: {item.sha256 or 'from no file'}, {item.source}" + (" (stand-in)" if item.stand_in else "")
        for item in run.weights
    ]
    return element(
        "section",
        text_element("h3", f"{label} on {run.dataset.name}")
        + element("div", _facts(facts) + _facts(environment), {"class": "facts"})
        + (text_element("h4", "Weights") + listing(weights, "plain") if weights else "")
        + _folded("Samples per category", _counts_table(run))
        + _folded("Configuration of the method", _facts(run.method.config))
        + _folded("Parameters of the preprocessing", _facts(run.preprocessing.parameters)),
        {"class": "block"},
    )


def _facts(values: Mapping[str, Any]) -> str:
    lines = "".join(text_element("dt", name) + text_element("dd", value) for name, value in values.items())
    return element("dl", lines)


def _folded(title: str, content: str) -> str:
    return element("details", text_element("summary", title) + content)


def _counts_table(run: RunResult) -> str:
    rows = [
        text_element("th", name, scope="row", class_="text")
        + "".join(
            text_element("td", count)
            for count in (counts.train, counts.validation, counts.test_good, counts.test_anomalous)
        )
        for name, counts in run.dataset.categories.items()
    ]
    return _table(("category", "training", "validation", "test, good", "test, defective"), rows)

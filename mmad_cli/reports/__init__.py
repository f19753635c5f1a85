"""Reports: runs and comparisons that are loaded already, as tables in several formats.

Every function here is pure. Undefined values read `n/a` with a note on why, failed categories `failed` with the
error in a note, and runs that do not compare with print say so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from mmad_cli.errors import UsageError, unknown_name
from mmad_cli.reports.data import render_csv, render_json
from mmad_cli.reports.document import Document, build_document
from mmad_cli.reports.junit import render_junit
from mmad_cli.reports.latex import render_latex
from mmad_cli.reports.leaderboard import leaderboard_csv, leaderboard_document, leaderboard_json
from mmad_cli.reports.markdown import render_markdown
from mmad_cli.results.compare import Comparison
from mmad_cli.results.leaderboard import Leaderboard
from mmad_cli.results.schema import RunResult

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["FORMATS", "JUNIT", "render", "render_leaderboards", "render_leaderboards_rich", "render_rich"]


def _render_table(document: Document) -> str:
    from mmad_cli.reports.table import table_text

    return table_text(document)


_TABLES: Mapping[str, Callable[[Document], str]] = {
    "table": _render_table,
    "markdown": render_markdown,
    "latex": render_latex,
}
_DATA: Mapping[str, Callable[[Sequence[RunResult], Sequence[str] | None, Sequence[Comparison]], str]] = {
    "csv": render_csv,
    "json": render_json,
}

FORMATS = (*_TABLES, *_DATA)
# Of comparisons only
JUNIT = "junit"


def render(
    runs: Sequence[RunResult],
    format: str,
    metrics: Sequence[str] | None = None,
    comparisons: Sequence[Comparison] = (),
) -> str:
    """Text of a report, with a newline at its end.

    One run gives a table of its categories, several runs give tables with one row per run; comparisons follow.
    Runs that differ in nothing but their seed get one more table, of mean and standard deviation over the seeds.
    `csv` is tidy, one number per line: of the runs, or, where there are comparisons, of these. `json` holds the
    runs and comparisons whole, and the spread over seeds. `junit` is XML of the comparisons alone.

    Raises UsageError for an unknown format or metric, and for `junit` without a comparison.
    """
    if format == JUNIT:
        if not comparisons:
            raise UsageError("--format junit: needs --against: its test cases are the compared numbers")
        return render_junit(comparisons)
    if format in _DATA:
        return _DATA[format](runs, metrics, comparisons)
    if format not in _TABLES:
        raise unknown_name("format", format, (*FORMATS, JUNIT), "--format")
    return _TABLES[format](build_document(runs, metrics, comparisons))


def render_rich(
    runs: Sequence[RunResult],
    metrics: Sequence[str] | None = None,
    comparisons: Sequence[Comparison] = (),
) -> RenderableType:
    """The report as a rich renderable, for a console that knows its width and colours."""
    from mmad_cli.reports.table import table_renderable

    return table_renderable(build_document(runs, metrics, comparisons))


def render_leaderboards(boards: Sequence[Leaderboard], format: str) -> str:
    """Text of leaderboards, with a newline at its end; `csv` has one number per line.

    Raises UsageError for a format that has no leaderboards.
    """
    data = {"csv": leaderboard_csv, "json": leaderboard_json}
    if format in data:
        return data[format](boards)
    if format not in _TABLES:
        raise UsageError(f"--format {format}: not for --leaderboard, which has {', '.join([*_TABLES, *data])}")
    return _TABLES[format](leaderboard_document(boards))


def render_leaderboards_rich(boards: Sequence[Leaderboard]) -> RenderableType:
    """Leaderboards as a rich renderable."""
    from mmad_cli.reports.table import table_renderable

    return table_renderable(leaderboard_document(boards))

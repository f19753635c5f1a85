"""`mmad report`: tables of runs, and comparison with published or earlier numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmad_cli.cli.console import ConsoleReporter, print_err, print_out, print_rich
from mmad_cli.cli.options import StoreOption, open_session
from mmad_cli.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from mmad_cli.results.compare import Comparison, Tolerances
    from mmad_cli.results.leaderboard import Leaderboard
    from mmad_cli.results.schema import RunResult

HTML = "html"
HTML_FILE = "report.html"
STANDARD_OUTPUT = Path("-")


def report(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUN", help="Run folders. Default: all under runs/.", show_default=False),
    ] = None,
    format: Annotated[str, typer.Option("--format", "-f", help="table, markdown, latex, csv, json, junit or html.")] = (
        "table"
    ),
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write to this file; - for standard output.", show_default=False),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric", help="Show and compare this metric, such as aupro_01; may be repeated.", show_default=False
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="REF",
            help="Compare with published numbers (`mmad list references`), a run, or a JSON file. Of runs that are not "
            "named, those that the numbers are for.",
            show_default=False,
        ),
    ] = None,
    category: Annotated[
        list[str] | None,
        typer.Option(
            "--category", "-c", help="Compare or rank by only this category; may be repeated.", show_default=False
        ),
    ] = None,
    tolerance: Annotated[
        list[str] | None,
        typer.Option(
            "--tolerance",
            metavar="[METRIC=]X",
            help="Allowed absolute difference, 0.005 if neither this nor mmad.toml says so; repeatable.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="Tolerances. Default: the nearest mmad.toml in this folder or above.",
            show_default=False,
        ),
    ] = None,
    update_reference: Annotated[
        Path | None,
        typer.Option(
            "--update-reference",
            metavar="FILE",
            help="Write the numbers of the run to this reference and say what changed.",
            show_default=False,
        ),
    ] = None,
    leaderboard: Annotated[
        bool, typer.Option("--leaderboard", help="All runs and --include in one ranked table, with intervals.")
    ] = False,
    include: Annotated[
        list[str] | None,
        typer.Option(
            "--include",
            metavar="REF",
            help="Published rows in the leaderboard: a name of `mmad list references`, its leading part, or all; "
            "repeatable.",
            show_default=False,
        ),
    ] = None,
    confidence: Annotated[
        float | None,
        typer.Option(
            "--confidence",
            help="Of the leaderboard's intervals over test images; 0.95 if not given.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="Dataset of the runs, for pictures and pixel intervals, if it was moved.",
            show_default=False,
        ),
    ] = None,
    store: StoreOption = None,
) -> int:
    """Show the tables of runs; with --against, fail when a number has moved.

    Runs that differ in nothing but their seed get one more table: mean and standard deviation over the seeds.

    Ends with 0 when all compared numbers are within tolerance, 1 when one is not, 3 when one is missing.

    Example: mmad report runs/btf-fpfh-mvtec3d-1a2b3c4d --against btf-readme --tolerance 0.01

    Example: mmad report --leaderboard --include btf-readme --include m3dm-paper --format latex

    Example: mmad report runs/ci --update-reference reference/btf-fpfh.json
    """
    from mmad_cli.reports import FORMATS, JUNIT, render, render_rich
    from mmad_cli.results.compare import exit_code

    if format not in (*FORMATS, JUNIT, HTML):
        raise unknown_name("format", format, (*FORMATS, JUNIT, HTML), "--format")
    modes = {
        "--against": against is not None,
        "--leaderboard": leaderboard,
        "--update-reference": bool(update_reference),
    }
    if sum(modes.values()) > 1:
        raise UsageError(f"{' and '.join(name for name, given in modes.items() if given)}: give one of them at a time")
    for option, given, needed in (
        ("--tolerance", tolerance, ("--against",)),
        ("--config", config, ("--against",)),
        ("--category", category, ("--against", "--leaderboard", "--update-reference")),
        ("--include", include, ("--leaderboard",)),
        ("--confidence", confidence is not None, ("--leaderboard",)),
        ("--format junit", format == JUNIT, ("--against",)),
    ):
        if given and not any(modes[name] for name in needed):
            raise UsageError(f"{option}: needs {' or '.join(needed)}")
    if output is not None and output.is_dir():
        raise UsageError(f"--output {output}: is a folder; name a file")
    metrics = _metrics(metric or [])
    if leaderboard:
        _leaderboard(runs or [], format, output, metrics, category, include or [], confidence, data, store)
        return 0
    results = _load(runs or [])
    comparisons = []
    if against is not None:
        compared = results if runs else _runs_about(against, results)
        comparisons = _compare(compared, against, _tolerances(tolerance or [], config), metrics, category)
    if update_reference is not None:
        _update(results, update_reference, metrics, category)
    if format == HTML:
        _write_html(output or Path(HTML_FILE), _folders(runs or []), metrics, comparisons, data, store)
    elif format == "table" and output in (None, STANDARD_OUTPUT):
        print_rich(render_rich(results, metrics, comparisons))
    else:
        _give(render(results, format, metrics, comparisons), output)
    return exit_code(comparisons)


def _give(text: str, output: Path | None) -> None:
    """To the file, or to standard output."""
    from mmad_cli.files import atomic_write

    if output in (None, STANDARD_OUTPUT):
        print_out(text, end="")
        return
    atomic_write(output, text.encode(errors="surrogateescape"))
    print_err(f"written: {output}")


def _leaderboard(
    runs: list[Path],
    format: str,
    output: Path | None,
    metrics: list[str] | None,
    categories: list[str] | None,
    include: list[str],
    confidence: float | None,
    data: Path | None,
    store: str | None,
) -> None:
    from mmad_cli.reports import render_leaderboards, render_leaderboards_rich

    boards = _boards(runs, metrics, categories, include, confidence, data, store)
    if format == "table" and output in (None, STANDARD_OUTPUT):
        print_rich(render_leaderboards_rich(boards))
    else:
        _give(render_leaderboards(boards, format), output)


def _boards(
    runs: list[Path],
    metrics: list[str] | None,
    categories: list[str] | None,
    include: list[str],
    confidence: float | None,
    data: Path | None,
    store: str | None,
) -> list[Leaderboard]:
    from mmad_cli.results.leaderboard import DEFAULT_CONFIDENCE, build_leaderboards, known_category
    from mmad_cli.results.reference import find_references
    from mmad_cli.stages.board import board_runs

    if confidence is not None and not 0 < confidence < 1:
        raise UsageError(f"--confidence {confidence:g}: should be between 0 and 1, as in 0.95")
    found = {reference.name: reference for name in include for reference in find_references(name, "--include")}
    folders = _folders(runs, required=not found)
    pixels = metrics is None or any(not name.startswith("i_") for name in metrics)
    with ConsoleReporter() as reporter, open_session(reporter, store) as session:
        members = board_runs(session, folders, categories=categories, data=data, pixels=pixels)
    published = list(found.values())
    if "all" in include and members:
        # all published rows for what was run, not those of further datasets
        datasets = {member.result.dataset.name for member in members}
        published = [row for row in published if row.dataset in datasets or row.name in include]
    for name in categories or []:
        known_category(name, members, published)
    return build_leaderboards(members, published, metrics, categories, confidence or DEFAULT_CONFIDENCE)


def _update(results: list[RunResult], file: Path, metrics: list[str] | None, categories: list[str] | None) -> None:
    from mmad_cli.results.reference_update import update_reference

    if len(results) != 1:
        names = ", ".join(run.run_id for run in results)
        raise UsageError(f"--update-reference {file}: needs one run, got {len(results)}: {names}; name its folder")
    is_new = not file.exists()
    changes = update_reference(results[0], file, metrics, categories)
    what = f"{len(changes) or 'no'} number{'s' if len(changes) > 1 else ''}" + ("" if is_new else " changed")
    print_err(f"written: {file}, {what}")
    for change in [] if is_new else changes:
        print_err(f"  {change}")


def _write_html(
    output: Path,
    folders: list[Path],
    metrics: list[str] | None,
    comparisons: list[Comparison],
    data: Path | None,
    store: str | None,
) -> None:
    from mmad_cli.stages.pictures import html_report

    with ConsoleReporter() as reporter, open_session(reporter, store) as session:
        text = html_report(session, folders, data=data, metrics=metrics, comparisons=comparisons)
    _give(text, output)


def _load(runs: list[Path]) -> list[RunResult]:
    from mmad_cli.results.runs import load_runs

    return load_runs(_folders(runs))


def _folders(runs: list[Path], *, required: bool = True) -> list[Path]:
    from mmad_cli.results.runs import find_runs
    from mmad_cli.stages.evaluate import RUNS

    folders = runs or find_runs(Path(RUNS))
    if required and not folders:
        raise UsageError(f"no run found under {Path(RUNS).absolute()}; name a run folder or run `mmad evaluate` first")
    return folders


def _metrics(chosen: list[str]) -> list[str] | None:
    from mmad_cli.metrics import METRIC_KEYS, VALIDATION_KEYS

    known = METRIC_KEYS + VALIDATION_KEYS
    for name in chosen:
        if name not in known:
            raise unknown_name("metric", name, known, "--metric")
    return chosen or None


def _tolerances(texts: list[str], config: Path | None) -> Tolerances:
    """Of the options, and where these say nothing of the settings file."""
    from mmad_cli.results.compare import parse_tolerances
    from mmad_cli.results.settings_file import find_settings, read_tolerances

    file = config or find_settings(Path.cwd())
    if file is not None:
        print_err(f"tolerances: {file}")
    return parse_tolerances(texts, base=None if file is None else read_tolerances(file))


def _runs_about(against: str, results: list[RunResult]) -> list[RunResult]:
    """Of runs that nobody named, those that a published table is about; all where it is about none."""
    from mmad_cli.results.reference import is_about

    about = [run for run in results if is_about(against, run)]
    if 0 < len(about) < len(results):
        others = ", ".join(run.run_id for run in results if not is_about(against, run))
        print_err(f"not compared: {others}; {against} is for another method, variant or dataset")
    return about or results


def _compare(
    results: list[RunResult],
    against: str,
    tolerances: Tolerances,
    metrics: list[str] | None,
    categories: list[str] | None,
) -> list[Comparison]:
    from mmad_cli.results.compare import compare
    from mmad_cli.results.reference import resolve_reference

    return [
        compare(result, resolve_reference(against, result), tolerances, metrics=metrics, categories=categories)
        for result in results
    ]

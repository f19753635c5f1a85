"""`mmad report`: tables of runs, and comparison with published or earlier numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmad_cli.cli.console import print_err, print_out, print_rich
from mmad_cli.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from mmad_cli.results.compare import Comparison
    from mmad_cli.results.schema import RunResult


def report(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RUN]...", help="Run folders. Default: all under runs/.", show_default=False),
    ] = None,
    format: Annotated[str, typer.Option("--format", "-f", help="table, markdown, latex, csv or json.")] = "table",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write to this file instead.", show_default=False)
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
            help="Compare with published numbers (`mmad list references`), a run, or a JSON file.",
            show_default=False,
        ),
    ] = None,
    category: Annotated[
        list[str] | None,
        typer.Option("--category", "-c", help="Compare only this category; may be repeated.", show_default=False),
    ] = None,
    tolerance: Annotated[
        list[str] | None,
        typer.Option(
            "--tolerance",
            metavar="[METRIC=]X",
            help="Allowed absolute difference, 0.005 if not given; repeatable.",
            show_default=False,
        ),
    ] = None,
) -> int:
    """Show the tables of runs; with --against, fail when a number has moved.

    Runs that differ in nothing but their seed get one more table: mean and standard deviation over the seeds.

    Ends with 0 when all compared numbers are within tolerance, 1 when one is not, 3 when one is missing.

    Example: mmad report runs/btf-fpfh-mvtec3d-1a2b3c4d --against btf-readme --tolerance 0.01
    """
    from mmad_cli.files import atomic_write
    from mmad_cli.reports import FORMATS, render, render_rich
    from mmad_cli.results.compare import exit_code

    if format not in FORMATS:
        raise unknown_name("format", format, FORMATS, "--format")
    for option, value in (("--tolerance", tolerance), ("--category", category)):
        if value and against is None:
            raise UsageError(f"{option}: needs --against")
    if output is not None and output.is_dir():
        raise UsageError(f"--output {output}: is a folder; name a file")
    results = _load(runs or [])
    metrics = _metrics(metric or [])
    comparisons = [] if against is None else _compare(results, against, tolerance or [], metrics, category)
    if output is not None:
        atomic_write(output, render(results, format, metrics, comparisons).encode(errors="surrogateescape"))
        print_err(f"written: {output}")
    elif format == "table":
        print_rich(render_rich(results, metrics, comparisons))
    else:
        print_out(render(results, format, metrics, comparisons), end="")
    return exit_code(comparisons)


def _load(runs: list[Path]) -> list[RunResult]:
    from mmad_cli.results.runs import find_runs, load_runs
    from mmad_cli.stages.evaluate import RUNS

    folders = runs or find_runs(Path(RUNS))
    if not folders:
        raise UsageError(f"no run found under {Path(RUNS).absolute()}; name a run folder or run `mmad evaluate` first")
    return load_runs(folders)


def _metrics(chosen: list[str]) -> list[str] | None:
    from mmad_cli.metrics import METRIC_KEYS

    for name in chosen:
        if name not in METRIC_KEYS:
            raise unknown_name("metric", name, METRIC_KEYS, "--metric")
    return chosen or None


def _compare(
    results: list[RunResult],
    against: str,
    tolerance: list[str],
    metrics: list[str] | None,
    categories: list[str] | None,
) -> list[Comparison]:
    from mmad_cli.results.compare import compare, parse_tolerances
    from mmad_cli.results.reference import resolve_reference

    tolerances = parse_tolerances(tolerance)
    return [
        compare(result, resolve_reference(against, result), tolerances, metrics=metrics, categories=categories)
        for result in results
    ]

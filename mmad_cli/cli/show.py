"""`mmad show`: one picture of one sample of a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from mmad_cli.cli.console import ConsoleReporter, print_err, print_out
from mmad_cli.cli.options import StoreOption, open_session
from mmad_cli.errors import UsageError


def show(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="[RUN] SAMPLE",
            help="Test sample, test/<defect>/<stem>, after its run folder. Without that: the newest run under runs/ "
            "that has the sample.",
        ),
    ],
    category: Annotated[
        str | None,
        typer.Option("--category", "-c", help="Its category, if several have such a sample.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="PNG file. Default: named after category and sample, in this folder.",
            show_default=False,
        ),
    ] = None,
    terminal: Annotated[
        bool, typer.Option("--terminal", "-t", help="Draw it here, in 24-bit colours, instead of writing a file.")
    ] = False,
    data: Annotated[
        Path | None, typer.Option("--data", help="Dataset of the run, if it was moved.", show_default=False)
    ] = None,
    store: StoreOption = None,
) -> None:
    """Draw one test sample: image, depth, ground truth, and the anomaly map with its score.

    The map comes from the run (`mmad evaluate --save-maps`) or the store, the scan from the store or the dataset.

    Example: mmad show test/dent/000 --category flange --terminal

    Example: mmad show runs/btf-fpfh-synthetic-1a2b3c4d test/dent/000 --category flange --output dent.png
    """
    from mmad_cli.files import atomic_write
    from mmad_cli.reports.picture import sample_picture, sample_text
    from mmad_cli.stages.show import show_sample
    from mmad_cli.store.store import safe_name

    if terminal and output is not None:
        raise UsageError("--terminal and --output: give one of them at a time")
    if output is not None and output.is_dir():
        raise UsageError(f"--output {output}: is a folder; name a file")
    run, sample = _run_and_sample(names)
    with ConsoleReporter() as reporter, open_session(reporter, store) as session:
        shown = show_sample(session, run, sample, category=category, data=data)
    for note in shown.missing:
        print_err(note)
    if terminal:
        columns = shutil.get_terminal_size((120, 40)).columns
        print_out(sample_text(shown.scene, shown.heat, shown.texts, columns), end="")
        return
    file = output or Path("-".join(map(safe_name, [shown.category, *sample.split("/")])) + ".png")
    atomic_write(file, sample_picture(shown.scene, shown.heat, shown.texts))
    print_err(f"written: {file}")


def _run_and_sample(names: list[str]) -> tuple[Path, str]:
    from mmad_cli.results.runs import find_runs
    from mmad_cli.stages.evaluate import RUNS
    from mmad_cli.stages.show import newest_run_with

    if len(names) > 2:
        raise UsageError(f"SAMPLE: should be one test sample, after its run folder, got {' '.join(names)}")
    if len(names) == 2:
        return Path(names[0]), names[1]
    (sample,) = names
    if Path(sample).is_dir():
        raise UsageError(f"SAMPLE: is missing after the run folder {sample}; `mmad show {sample} test/<defect>/<stem>`")
    run = newest_run_with(find_runs(Path(RUNS)), sample)
    if run is None:
        raise UsageError(f"no run found under {Path(RUNS).absolute()}; name a run folder before the sample")
    print_err(f"run: {run}")
    return run, sample

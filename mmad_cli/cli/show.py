"""`mmad show`: one picture of one sample of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmad_cli.cli.console import ConsoleReporter, print_err
from mmad_cli.cli.options import StoreOption, open_session
from mmad_cli.errors import UsageError


def show(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    sample: Annotated[str, typer.Argument(metavar="SAMPLE", help="Test sample: test/<defect>/<stem>.")],
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
    data: Annotated[
        Path | None, typer.Option("--data", help="Dataset of the run, if it was moved.", show_default=False)
    ] = None,
    store: StoreOption = None,
) -> None:
    """Draw one test sample: image, depth, ground truth, and the anomaly map with its score.

    The map comes from the run (`mmad evaluate --save-maps`) or the store, the scan from the store or the dataset.

    Example: mmad show runs/btf-fpfh-synthetic-1a2b3c4d test/dent/000 --category flange --output dent.png
    """
    from mmad_cli.files import atomic_write
    from mmad_cli.stages.show import show_sample
    from mmad_cli.store.store import safe_name

    if output is not None and output.is_dir():
        raise UsageError(f"--output {output}: is a folder; name a file")
    with ConsoleReporter() as reporter, open_session(reporter, store) as session:
        shown = show_sample(session, run, sample, category=category, data=data)
    file = output or Path("-".join(map(safe_name, [shown.category, *sample.split("/")])) + ".png")
    atomic_write(file, shown.png)
    for note in shown.missing:
        print_err(note)
    print_err(f"written: {file}")

"""`mmad synth`: write a synthetic dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmad_cli.cli.console import ConsoleReporter, print_err
from mmad_cli.cli.options import Categories, Workers
from mmad_cli.errors import DataError, StoreError
from mmad_cli.files import is_no_space


def synth(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist or be empty.")],
    category: Categories = None,
    train: Annotated[int, typer.Option("--train", help="Good training samples per category.")] = 12,
    validation: Annotated[int, typer.Option("--validation", help="Good validation samples per category.")] = 4,
    test_good: Annotated[int, typer.Option("--test-good", help="Good test samples per category.")] = 6,
    test_defect: Annotated[int, typer.Option("--test-defect", help="Test samples per kind of defect.")] = 2,
    size: Annotated[int, typer.Option("--size", help="Image side in pixels.")] = 256,
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same bytes.")] = 0,
    workers: Workers = None,
) -> None:
    """Write a synthetic dataset in the MVTec 3D-AD layout.

    Rendered scans of 3D shapes with exact defect masks: dents, bumps, holes, cuts, cracks, bends, stains.

    Example: mmad synth data/synthetic --category flange --train 20
    """
    from mmad_cli.datasets.synthetic import generate
    from mmad_cli.stages.executor import resolve_workers

    try:
        with ConsoleReporter() as reporter, reporter.task("rendering", 0) as advance:
            made = generate(
                out,
                categories=category or None,
                train=train,
                validation=validation,
                test_good=test_good,
                test_defect=test_defect,
                size=size,
                seed=seed,
                workers=resolve_workers(workers),
                progress=advance,
            )
    except DataError as error:
        if is_no_space(error.__cause__):
            # not a wrong option: the same command works once there is space
            raise StoreError(str(error)) from error
        raise
    print_err(f"{made.samples} samples of {len(made.categories)} categories in {out}")

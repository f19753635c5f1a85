"""`mmad check`: validate a dataset folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmad_cli.cli.console import ConsoleReporter, print_json, print_out, print_rich
from mmad_cli.cli.options import Categories, Data, Json, Workers

if TYPE_CHECKING:
    from rich.table import Table

    from mmad_cli.datasets.check import CheckReport

UNUSABLE = 3


def check(data: Data, category: Categories = None, workers: Workers = None, json: Json = False) -> int:
    """Check a dataset folder: layout, counts, and every file that is missing, unreadable or of the wrong kind.

    Ends with 3 when anything is unusable.

    Example: mmad check data/mvtec3d
    """
    from mmad_cli.datasets.check import check_dataset
    from mmad_cli.stages.executor import resolve_workers

    with ConsoleReporter() as reporter, reporter.task("checking", 0) as advance:
        found = check_dataset(data, categories=category or None, workers=resolve_workers(workers), progress=advance)
    if json:
        print_json(found.as_dict())
    else:
        # not as the title of the table, which is broken where the table is narrower than the path
        print_out(f"{found.root} (layout: {found.layout})")
        print_rich(_counts(found))
        for finding in found.findings:
            place = f"{finding.file}: " if finding.file else f"{finding.category}: " if finding.category else ""
            print_out(
                f"{finding.level}: {place}{finding.message}" + (f" -> {finding.advice}" if finding.advice else "")
            )
        print_out("usable" if found.usable else "not usable as it is")
    return 0 if found.usable else UNUSABLE


def _counts(found: CheckReport) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    table.add_column("category")
    table.add_column("split")
    table.add_column("defect")
    table.add_column("samples", justify="right")
    for name, splits in found.counts.items():
        for split, defects in splits.items():
            for defect, number in defects.items():
                table.add_row(escape(name), split, escape(defect), str(number))
    return table

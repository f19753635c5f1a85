"""`mmad cache`: the store."""

from __future__ import annotations

from typing import Annotated

import typer

from mmad_cli.cli.console import ConsoleReporter, print_json, print_out, print_rich
from mmad_cli.cli.options import Json, StoreOption

app = typer.Typer(
    no_args_is_help=True,
    help="The store: what it holds, whether it is sound, removing what is not needed.\n\nExample: mmad cache info",
)

DAMAGED = 3


@app.command("info")
def info(store: StoreOption = None, json: Json = False) -> None:
    """Files and bytes per stage and category.

    Example: mmad cache info
    """
    from dataclasses import asdict

    from rich.table import Table

    from mmad_cli.store import open_store

    place = open_store(store)
    usage = place.usage()
    if json:
        print_json({"root": place.address, "usage": [asdict(line) for line in usage]})
        return
    table = Table()
    table.add_column("stage")
    table.add_column("category")
    table.add_column("files", justify="right")
    table.add_column("MB", justify="right")
    for line in usage:
        table.add_row(line.stage, line.category, str(line.files), f"{line.bytes / 1e6:.1f}")
    table.add_row("all", "", str(sum(u.files for u in usage)), f"{sum(u.bytes for u in usage) / 1e6:.1f}")
    print_out(f"store {place.address}")
    print_rich(table)


@app.command("verify")
def verify(store: StoreOption = None, json: Json = False) -> int:
    """Read every stored file and compare it with its digest; ends with 3 when one is damaged.

    A damaged file is computed again by the next command that needs it.

    Example: mmad cache verify
    """
    from mmad_cli.store import open_store

    with ConsoleReporter() as reporter, reporter.task("verifying", 0) as advance:
        problems = open_store(store).verify(advance)
    if json:
        print_json([{"file": str(problem.path), "reason": problem.reason} for problem in problems])
    else:
        for problem in problems:
            print_out(f"damaged: {problem.reason}")
        print_out(f"{len(problems)} damaged" if problems else "all sound")
    return DAMAGED if problems else 0


@app.command("prune")
def prune(
    store: StoreOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go, remove nothing.")] = False,
    json: Json = False,
) -> None:
    """Remove what no existing run folder needs, and what killed processes left behind.

    Example: mmad cache prune --dry-run
    """
    from mmad_cli.store import open_store

    paths, size = open_store(store).prune(dry_run=dry_run)
    if json:
        print_json({"files": [str(path) for path in paths], "bytes": size, "removed": not dry_run})
        return
    verb = "would remove" if dry_run else "removed"
    print_out(f"{verb} {len(paths)} files, {size / 1e6:.1f} MB")

"""The application: sub-commands, and what every ending means for the exit code."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import click
import typer

from mmad_cli._version import __version__
from mmad_cli.cli import (
    cache,
    check,
    doctor,
    evaluate,
    extract,
    fit,
    listing,
    preprocess,
    report,
    synth,
    weights,
)
from mmad_cli.errors import MmadError

INTERRUPTED = 130

app = typer.Typer(
    name="mmad",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Benchmark for multimodal (RGB + 3D point cloud) industrial anomaly detection.\n\n"
        "Point it at a dataset folder and get the per-category table of a published method:\n\n"
        "Example: mmad evaluate data/mvtec3d --method btf --variant fpfh"
    ),
)
app.command("synth")(synth.synth)
app.command("check")(check.check)
app.command("preprocess")(preprocess.preprocess)
app.command("extract")(extract.extract)
app.command("fit")(fit.fit)
app.command("evaluate")(evaluate.evaluate)
app.command("report")(report.report)
app.add_typer(listing.app, name="list")
app.add_typer(weights.app, name="weights")
app.add_typer(cache.app, name="cache")
app.command("doctor")(doctor.doctor)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"mmad {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None:
    """Options of `mmad` itself."""


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit code: 0, 1, 2, 3 or 130 as documented."""
    try:
        outcome = app(arguments, standalone_mode=False, prog_name="mmad")
    except MmadError as error:
        typer.echo(f"error: {error}", err=True)
        return error.exit_code
    except click.exceptions.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.exceptions.Abort):
        typer.echo("interrupted; what was finished is kept, the same command resumes", err=True)
        return INTERRUPTED
    except BrokenPipeError:
        # the reader of our output has gone; nothing is left to say to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return outcome if isinstance(outcome, int) else 0

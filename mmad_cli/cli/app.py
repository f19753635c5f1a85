"""The application: sub-commands, and what every ending means for the exit code."""

from __future__ import annotations

import traceback
from typing import Annotated, Any

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
    pretrain,
    report,
    show,
    synth,
    synth_preview,
    weights,
)
from mmad_cli.cli.console import accept_all_characters, print_err, print_out
from mmad_cli.errors import MmadError
from mmad_cli.files import is_no_space

WRONG_INPUT = 2
UNFINISHED = 3
INTERRUPTED = 130

# Recent releases of typer carry a copy of click, whose errors are not those of an installed click
_ClickError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

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
app.command("synth-preview")(synth_preview.synth_preview)
app.command("check")(check.check)
app.command("preprocess")(preprocess.preprocess)
app.command("extract")(extract.extract)
app.command("fit")(fit.fit)
app.command("evaluate")(evaluate.evaluate)
app.command("report")(report.report)
app.command("show")(show.show)
app.add_typer(listing.app, name="list")
app.add_typer(weights.app, name="weights")
app.add_typer(cache.app, name="cache")
app.command("pretrain")(pretrain.pretrain)
app.command("doctor")(doctor.doctor)


def _version(value: bool) -> None:
    if value:
        print_out(f"mmad {__version__}")
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
    accept_all_characters()
    try:
        outcome = app(arguments, standalone_mode=False, prog_name="mmad")
    except MmadError as error:
        print_err(f"error: {error}")
        return error.exit_code
    except _ClickError as error:
        error.show()
        return int(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        outcome = INTERRUPTED
    except SystemExit:
        # typer and rich end like this when the reader of a help text has gone
        return 0
    except ImportError as error:
        print_err(f"error: {error}; `mmad doctor` says what to install")
        return UNFINISHED
    except Exception as error:  # noqa: BLE001
        # The last resort: the interpreter would end with 1, which tells CI that a number is out of tolerance
        return _unforeseen(error)
    if outcome == INTERRUPTED:
        print_err("interrupted; what was finished is kept, the same command resumes")
    return outcome if isinstance(outcome, int) else 0


def _unforeseen(error: BaseException) -> int:
    if isinstance(error, OSError) and error.strerror is not None:
        print_err(f"error: {error.filename or 'output'}: {error.strerror}")
        return UNFINISHED if is_no_space(error) else WRONG_INPUT
    print_err("".join(traceback.format_exception(error)).rstrip())
    print_err("error: this is a defect of mmad; please report the lines above. What was finished is kept")
    return UNFINISHED

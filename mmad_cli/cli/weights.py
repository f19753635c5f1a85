"""`mmad weights`: pretrained weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmad_cli.cli.console import print_err
from mmad_cli.cli.options import Json

if TYPE_CHECKING:
    from mmad_cli.backbones.weights import WeightsStatus

app = typer.Typer(
    no_args_is_help=True,
    help="Pretrained weights: where they are, download, import, check.\n\nExample: mmad weights list",
)

DAMAGED = 3


@app.command("list")
def list_(json: Json = False) -> None:
    """Known weights and which are here.

    Example: mmad weights list
    """
    from mmad_cli.backbones.weights import list_weights
    from mmad_cli.cli.listing import show

    show([_row(status) for status in list_weights()], json)


@app.command("fetch")
def fetch(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names; see `mmad weights list`.")],
) -> None:
    """Download weights, check them and keep them in `$MMAD_WEIGHTS`.

    Example: mmad weights fetch wide_resnet50_2.tv_in1k
    """
    from mmad_cli.backbones.weights import fetch as fetch_one

    for name in names:
        record = fetch_one(name, progress=True)
        print_err(f"{name}: {record.path}")


@app.command("import")
def import_(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the weights; see `mmad weights list`.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .safetensors or PyTorch file; never executed.")],
) -> None:
    """Take weights from a local file, after checking keys and shapes.

    Example: mmad weights import resnet18.tv_in1k resnet18.safetensors
    """
    from mmad_cli.backbones.weights import import_file

    record = import_file(name, file)
    note = "the published file" if record.official else "not the published file: runs with it are not comparable"
    print_err(f"{name}: {record.path} ({note})")


@app.command("verify")
def verify(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="Names; default: all that are here.", show_default=False),
    ] = None,
    json: Json = False,
) -> int:
    """Compare stored weights with their recorded digest; ends with 3 when one is damaged or missing.

    Example: mmad weights verify
    """
    from mmad_cli.backbones.weights import verify as verify_weights
    from mmad_cli.cli.listing import show

    checks = [status for name in names for status in verify_weights(name)] if names else verify_weights()
    show([_row(status) for status in checks], json)
    return 0 if all(status.state == "ready" for status in checks) else DAMAGED


def _row(status: WeightsStatus) -> dict[str, Any]:
    record = status.record
    return {
        "name": status.name,
        "state": status.state,
        "official": None if record is None else record.official,
        "sha256": None if record is None else record.sha256,
        "source": None if record is None else record.source,
        "folder": str(status.folder),
        "licence": status.licence,
        "what": status.description if status.problem is None else status.problem,
    }

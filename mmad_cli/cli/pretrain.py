"""`mmad pretrain`: train a built-in backbone again, or one of your own in its place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmad_cli.cli.console import ConsoleReporter, print_err, print_json
from mmad_cli.cli.options import Json
from mmad_cli.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from mmad_cli.pretraining.config import Network, TrainingConfig
    from mmad_cli.pretraining.training import LogLine

OUT_OF_TOLERANCE = 1


def pretrain(
    network: Annotated[str, typer.Argument(metavar="NETWORK", help="rgb or points.")],
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", help="JSON of the training. Default: that of the shipped weights.", show_default=False
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            min=0,
            help="Stop after so many steps of the schedule; 0 gives random weights.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Another seed than that of the file.", show_default=False)
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option("--state", help="Folder of log and checkpoint; a rerun goes on from there.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", help="Weights to write. Default: builtin_NETWORK.safetensors here.", show_default=False
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "cpu",
    check: Annotated[
        bool, typer.Option("--check", help="Compare the losses with the log of the shipped weights; write nothing.")
    ] = False,
    json: Json = False,
) -> int:
    """Train a built-in backbone on procedural data, which is generated on the fly.

    The file goes into use with `mmad weights import builtin_rgb FILE`. With --check the command ends with 1 when a
    loss is not the logged one.

    Example: mmad pretrain rgb --steps 200 --check

    Example: mmad pretrain points --state build/points --output points.safetensors
    """
    from mmad_cli.files import atomic_write
    from mmad_cli.pretraining.training import export, task, train

    name = _network(network)
    settings = _settings(name, config, seed)
    if check and (config is not None or seed is not None):
        raise UsageError("--check: compares with the shipped training, so --config and --seed cannot be given")
    target = output or Path(f"builtin_{name}.safetensors")
    with ConsoleReporter() as reporter, reporter.task(f"training {name}", 0) as advance:
        trained, log = train(
            task(name, settings), settings, folder=state, stop=steps, device=_device(device), tell=advance
        )
    if check:
        return _compare(name, log, json)
    with _writable(target):
        atomic_write(target.absolute(), export(trained))
    if json:
        print_json({"network": name, "steps": len(log), "file": str(target), "loss": log[-1].loss if log else None})
    else:
        print_err(f"{target}: {len(log)} steps; in use after: mmad weights import builtin_{name} {target}")
    return 0


def _network(name: str) -> Network:
    from mmad_cli.pretraining.config import CONFIGS

    if name not in CONFIGS:
        raise unknown_name("network", name, CONFIGS, "NETWORK")
    return name


def _settings(name: Network, path: Path | None, seed: int | None) -> TrainingConfig:
    from mmad_cli.pretraining.config import committed, read_config

    settings = committed(name) if path is None else read_config(name, path)
    return settings if seed is None else settings.model_copy(update={"seed": seed})


def _device(name: str) -> str:
    from mmad_cli.stages.session import Session
    from mmad_cli.store import Store

    return Session(store=Store(None), device=name).resolve_device()


def _compare(name: Network, log: list[LogLine], json: bool) -> int:
    """Exit code of the comparison with the shipped log."""
    from mmad_cli.pretraining.training import deviations, shipped_log

    found = deviations(log, shipped_log(name))
    if json:
        print_json(found)
    else:
        print_err(
            f"{name}: {found['steps']} steps compared, {found['outside']} out of tolerance; "
            f"largest relative deviation of the loss {found['largest']:.1e}"
        )
    return OUT_OF_TOLERANCE if found["outside"] else 0


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UsageError(f"--output {path}: cannot be written ({error.strerror or error})") from error

"""Options that several commands share, and what they open."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mmad_cli.cli.console import ConsoleReporter
    from mmad_cli.stages.session import Session

Data = Annotated[Path, typer.Argument(metavar="DATA", envvar="MMAD_DATA", help="Dataset folder; it is only read.")]
StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        envvar="MMAD_STORE",
        help="Where results of the stages are kept: a folder, or an address such as s3://bucket/prefix.",
        show_default=False,
    ),
]
Dask = Annotated[
    str | None,
    typer.Option(
        "--dask",
        metavar="ADDRESS",
        help="Scheduler of a Dask cluster that does the work, such as tcp://host:8786.",
        show_default=False,
    ),
]
Workers = Annotated[
    int | None, typer.Option("--workers", help="Worker processes; default: one per core.", show_default=False)
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        "--memory-limit",
        metavar="SIZE",
        help="Memory of the command and its workers (with --dask: each), such as 4GB; larger banks are mapped files.",
        show_default=False,
    ),
]
Categories = Annotated[
    list[str] | None,
    typer.Option("--category", "-c", help="Only this category; may be repeated.", show_default=False),
]
Protocol = Annotated[
    str | None,
    typer.Option("--protocol", help="Preprocessing: m3dm, cfm or none. Default: the method's own.", show_default=False),
]
RgbBackground = Annotated[
    str | None,
    typer.Option(
        "--rgb-background",
        help="What m3dm does to the image where it removes points: zero or keep.",
        show_default=False,
    ),
]
Debris = Annotated[
    str | None,
    typer.Option(
        "--debris", help="Debris removal: components (fast, default) or dbscan (the reference).", show_default=False
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set a field of the configuration, such as coreset_fraction=0.05; repeatable.",
        show_default=False,
    ),
]
Checkpoints = Annotated[
    Path | None,
    typer.Option(
        "--checkpoints",
        help="Fitted states to use instead of fitting, a folder per category, as `mmad fit --export` writes them.",
        show_default=False,
    ),
]
Backbones = Annotated[
    str,
    typer.Option(
        "--backbones",
        help="paper (the published networks) or builtin (small ones that come with mmad; not for comparison).",
    ),
]
Recipe = Annotated[
    str,
    typer.Option(
        "--recipe",
        help="official (as published, quirks included), corrected, or fast (trained methods, without a GPU).",
    ),
]
Variant = Annotated[
    str | None, typer.Option("--variant", help="A published ablation; see `mmad list variants`.", show_default=False)
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random in the method.")]
Shots = Annotated[
    int | None,
    typer.Option("--shots", help="Use this many training samples per category.", show_default=False),
]
ShotChoice = Annotated[
    str,
    typer.Option(
        "--shot-choice", help="Which samples --shots takes: random (drawn with the seed), or first (by name; CFM)."
    ),
]
Limit = Annotated[
    int | None, typer.Option("--limit", help="At most this many samples per split and defect.", show_default=False)
]
Force = Annotated[bool, typer.Option("--force", help="Compute again what the store has already.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]


def open_session(
    reporter: ConsoleReporter,
    store: str | None,
    workers: int | None = None,
    device: str = "auto",
    dask: str | None = None,
    memory_limit: str | None = None,
) -> Session:
    """The session of a command: store, workers, device, progress on standard error."""
    from mmad_cli.stages.session import Session
    from mmad_cli.store import open_store
    from mmad_cli.threads import default_threads

    default_threads()
    limit = None
    if memory_limit is not None:
        from mmad_cli.memory.limit import parse_memory

        limit = parse_memory(memory_limit)
    return Session(open_store(store), workers, device, dask, limit, reporter)


def preprocessing_settings(rgb_background: str | None, debris: str | None) -> dict[str, str]:
    """The preprocessing fields that were set on the command line."""
    given = {"rgb_background": rgb_background, "debris": debris}
    return {name: value for name, value in given.items() if value is not None}

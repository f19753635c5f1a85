"""`mmad synth-preview`: a picture of the pseudo anomalies that methods train on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmad_cli.cli.options import Categories, Data, Protocol, Seed, Settings, StoreOption, Workers, open_session


def synth_preview(
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture to write (PNG).")] = Path("pseudo.png"),
    category: Categories = None,
    count: Annotated[int, typer.Option("--count", min=1, help="Rows per category.")] = 4,
    protocol: Protocol = None,
    settings: Settings = None,
    seed: Seed = 0,
    workers: Workers = None,
    store: StoreOption = None,
) -> None:
    """Draw a contact sheet of pseudo anomalies made from training scans.

    A row shows a good scan, image and normals, then image, normals and mask of a pseudo anomaly made from it.

    Example: mmad synth-preview data/mvtec3d --category bagel --output sheet.png

    Example: mmad synth-preview data/parts --set bump_probability=0.5 --set pose=narrow
    """
    from mmad_cli.cli.console import ConsoleReporter, print_err
    from mmad_cli.methods import parse_settings
    from mmad_cli.stages.preview import pseudo_preview

    with ConsoleReporter() as reporter, open_session(reporter, store, workers, "cpu") as session:
        rows = pseudo_preview(
            session,
            data,
            output,
            categories=tuple(category or ()),
            count=count,
            protocol=protocol or "m3dm",
            settings=parse_settings(settings or []),
            seed=seed,
        )
    print_err(f"{rows} pseudo anomalies in {output}")

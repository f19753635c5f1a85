"""`mmad fit`: fit a method per category."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmad_cli.cli.options import (
    Backbones,
    Categories,
    Checkpoints,
    Dask,
    Data,
    Debris,
    Device,
    Force,
    Json,
    Limit,
    MemoryLimit,
    Protocol,
    Recipe,
    RgbBackground,
    Seed,
    Settings,
    ShotChoice,
    Shots,
    StoreOption,
    Variant,
    Workers,
    open_session,
    preprocessing_settings,
)


def fit(
    data: Data,
    method: Annotated[str, typer.Option("--method", help="A method; see `mmad list methods`.")],
    variant: Variant = None,
    recipe: Recipe = "official",
    backbones: Backbones = "paper",
    settings: Settings = None,
    protocol: Protocol = None,
    category: Categories = None,
    rgb_background: RgbBackground = None,
    debris: Debris = None,
    shots: Shots = None,
    shot_choice: ShotChoice = "random",
    limit: Limit = None,
    seed: Seed = 0,
    device: Device = "auto",
    workers: Workers = None,
    dask: Dask = None,
    memory_limit: MemoryLimit = None,
    store: StoreOption = None,
    force: Force = False,
    checkpoints: Checkpoints = None,
    export: Annotated[
        Path | None,
        typer.Option("--export", help="Also write the fitted states here, a folder per category.", show_default=False),
    ] = None,
    json: Json = False,
) -> int:
    """Fit a method on the training samples of each category and keep the fitted state in the store.

    Example: mmad fit data/mvtec3d --method btf --variant fpfh

    Example: mmad fit data/mvtec3d --method cfm --export checkpoints/cfm
    """
    from mmad_cli.cli.console import ConsoleReporter
    from mmad_cli.cli.preprocess import show_outcomes
    from mmad_cli.methods import parse_settings
    from mmad_cli.stages import pipeline
    from mmad_cli.stages.plan import Selection
    from mmad_cli.stages.request import EvaluateRequest

    request = EvaluateRequest(
        data=data,
        method=method,
        variant=variant,
        recipe=recipe,
        backbones=backbones,
        settings=parse_settings(settings or []),
        protocol=protocol,
        preprocessing=preprocessing_settings(rgb_background, debris),
        selection=Selection(tuple(category or ()), shots, limit, seed, shot_choice),
        force=force,
        checkpoints=checkpoints,
        export=export,
    )
    with ConsoleReporter() as reporter, open_session(reporter, store, workers, device, dask, memory_limit) as session:
        outcomes = pipeline.fit(session, request)
    return show_outcomes(outcomes, json)

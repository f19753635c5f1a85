"""`mmad extract`: backbone features into the store."""

from __future__ import annotations

from typing import Annotated

import typer

from mmad_cli.cli.options import (
    Backbones,
    Categories,
    Dask,
    Data,
    Debris,
    Device,
    Force,
    Json,
    Limit,
    Protocol,
    Recipe,
    RgbBackground,
    Settings,
    StoreOption,
    Variant,
    Workers,
    open_session,
    preprocessing_settings,
)
from mmad_cli.errors import UsageError


def extract(
    data: Data,
    method: Annotated[
        str | None,
        typer.Option(
            "--method", help="Extract all that this method needs; see `mmad list methods`.", show_default=False
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option("--backbone", help="Extract one backbone; see `mmad list backbones`.", show_default=False),
    ] = None,
    variant: Variant = None,
    recipe: Recipe = "official",
    backbones: Backbones = "paper",
    settings: Settings = None,
    protocol: Protocol = None,
    category: Categories = None,
    rgb_background: RgbBackground = None,
    debris: Debris = None,
    limit: Limit = None,
    device: Device = "auto",
    workers: Workers = None,
    dask: Dask = None,
    store: StoreOption = None,
    force: Force = False,
    json: Json = False,
) -> int:
    """Extract features; results go into the store. Scans that are not clean yet are cleaned first.

    Example: mmad extract data/mvtec3d --method btf --variant fpfh

    Example: mmad extract data/mvtec3d --backbone resnet18.tv_in1k --set outputs=2,3
    """
    from mmad_cli.cli.console import ConsoleReporter
    from mmad_cli.cli.preprocess import show_outcomes
    from mmad_cli.methods import build, build_config, get_method, parse_settings
    from mmad_cli.stages import pipeline
    from mmad_cli.stages.plan import Selection
    from mmad_cli.stages.request import backbone_settings, preprocess_config, require_builtin

    if (method is None) == (backbone is None):
        raise UsageError("give either --method or --backbone")
    values = parse_settings(settings or [])
    if method is not None:
        definition = get_method(method)
        values = {**backbone_settings(definition, backbones), **values}
        config = build_config(definition, variant, recipe, values)
        specs = build(definition, config).features()
        if backbones == "builtin":
            require_builtin(f"{definition.name} {config.variant}", specs)
        default_protocol: str = definition.protocol
    else:
        if backbones != "paper":
            raise UsageError("--backbones: chooses the networks of a method; with --backbone name the network itself")
        specs = {str(backbone): pipeline.backbone_spec(str(backbone), values)}
        default_protocol = "m3dm"
    preprocessing = preprocess_config(protocol or default_protocol, preprocessing_settings(rgb_background, debris))
    with ConsoleReporter() as reporter, open_session(reporter, store, workers, device, dask) as session:
        outcomes = pipeline.extract(
            session,
            data,
            specs,
            preprocessing=preprocessing,
            selection=Selection(tuple(category or ()), limit=limit),
            force=force,
        )
    return show_outcomes(outcomes, json)

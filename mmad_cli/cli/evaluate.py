"""`mmad evaluate`: the whole line, dataset folder to table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmad_cli.cli.console import ConsoleReporter, print_err, print_json, print_out, print_rich
from mmad_cli.cli.options import (
    Categories,
    Debris,
    Device,
    Force,
    Json,
    Limit,
    Protocol,
    Recipe,
    RgbBackground,
    Seed,
    Settings,
    Shots,
    StoreOption,
    Workers,
    open_session,
    preprocessing_settings,
)
from mmad_cli.errors import UsageError

if TYPE_CHECKING:
    from mmad_cli.stages.pipeline import PlanLine
    from mmad_cli.stages.request import EvaluateRequest

INCOMPLETE = 3


def evaluate(
    method: Annotated[
        list[str], typer.Option("--method", "-m", help="A method, see `mmad list methods`; may be repeated.")
    ],
    data: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DATA]",
            envvar="MMAD_DATA",
            help="Dataset folder. Default: a small synthetic one.",
            show_default=False,
        ),
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            "--variant",
            help="A published ablation, see `mmad list variants`; may be repeated for one method.",
            show_default=False,
        ),
    ] = None,
    recipe: Recipe = "official",
    settings: Settings = None,
    protocol: Protocol = None,
    category: Categories = None,
    rgb_background: RgbBackground = None,
    debris: Debris = None,
    shots: Shots = None,
    seed: Seed = 0,
    limit: Limit = None,
    full_resolution: Annotated[
        bool, typer.Option("--full-resolution", help="Metrics at scan size instead of 224 x 224.")
    ] = False,
    device: Device = "auto",
    workers: Workers = None,
    save_maps: Annotated[bool, typer.Option("--save-maps", help="Write the anomaly maps into the run.")] = False,
    force: Force = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Run folder. Default: runs/<run-id>.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be computed, and stop.")] = False,
    store: StoreOption = None,
    json: Json = False,
) -> int:
    """Evaluate methods on a dataset: run what is missing, score the test split, write a run, show the table.

    Example: mmad evaluate data/mvtec3d --method btf --variant fpfh

    Example: mmad evaluate --method btf --variant fpfh --category biscuit
    """
    from mmad_cli.methods import parse_settings
    from mmad_cli.stages.default_data import default_dataset
    from mmad_cli.stages.evaluate import evaluate as run_stage
    from mmad_cli.stages.pipeline import plan
    from mmad_cli.stages.plan import Selection
    from mmad_cli.stages.request import EvaluateRequest

    combinations = _combinations(method, variant or [])
    with ConsoleReporter() as reporter, open_session(reporter, store, workers, device) as session:
        folder = data if data is not None else default_dataset(session)
        requests = [
            EvaluateRequest(
                data=folder,
                method=name,
                variant=chosen,
                recipe=recipe,
                settings=parse_settings(settings or []),
                protocol=protocol,
                preprocessing=preprocessing_settings(rgb_background, debris),
                selection=Selection(tuple(category or ()), shots=shots, limit=limit, seed=seed),
                save_maps=save_maps,
                full_resolution=full_resolution,
                force=force,
                out=_out(out, name, chosen, len(combinations)),
                argv=["mmad", *sys.argv[1:]],
            )
            for name, chosen in combinations
        ]
        if dry_run:
            lines = [(request, line) for request in requests for line in plan(session, request)]
            _show_plan(lines, json)
            return 0
        results = [run_stage(session, request) for request in requests]
    if json:
        texts = [result.model_dump(mode="json", by_alias=True) for result, _ in results]
        print_json(texts[0] if len(texts) == 1 else texts)
    else:
        _show_table([result for result, _ in results])
        for _, written in results:
            print_err(f"run: {_short(written)}")
    incomplete = any(result.failed_categories for result, _ in results)
    return INCOMPLETE if incomplete else 0


def _combinations(methods: list[str], variants: list[str]) -> list[tuple[str, str | None]]:
    if len(methods) > 1 and variants:
        raise UsageError("--variant: give it with one --method only; several methods run with their default variants")
    if variants:
        return [(methods[0], variant) for variant in variants]
    return [(method, None) for method in methods]


def _out(out: Path | None, method: str, variant: str | None, count: int) -> Path | None:
    if out is None or count == 1:
        return out
    return out / (method if variant is None else f"{method}-{variant}")


def _short(path: Path) -> Path:
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path


def _show_table(results: list) -> None:  # type: ignore[type-arg]
    from mmad_cli.reports import render_rich

    print_rich(render_rich(results))


def _show_plan(lines: list[tuple[EvaluateRequest, PlanLine]], as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        print_json([{"method": request.method, "variant": request.variant, **asdict(line)} for request, line in lines])
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="Still to be computed", title_justify="left")
    for name in ("method", "category", "stage"):
        table.add_column(name)
    for name in ("in all", "missing", "disk (MB)", "memory (MB)"):
        table.add_column(name, justify="right")
    for request, line in lines:
        table.add_row(
            request.method,
            escape(line.category),
            line.stage,
            str(line.total),
            str(line.missing),
            f"{line.disk_bytes / 1e6:.1f}",
            f"{line.memory_bytes / 1e6:.1f}" if line.memory_bytes else "",
        )
    print_rich(table)
    disk = sum(line.disk_bytes for _, line in lines) / 1e9
    peak = max((line.memory_bytes for _, line in lines), default=0) / 1e9
    print_out(f"disk for the store: about {disk:.2f} GB; peak memory beyond the networks: about {peak:.2f} GB")

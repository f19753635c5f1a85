"""`mmad evaluate`: the whole line, dataset folder to table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from mmad_cli.cli.console import ConsoleReporter, print_err, print_json, print_out, print_rich
from mmad_cli.cli.options import (
    Backbones,
    Categories,
    Checkpoints,
    Dask,
    Debris,
    Device,
    Force,
    Json,
    Limit,
    MemoryLimit,
    Protocol,
    Recipe,
    RgbBackground,
    Settings,
    ShotChoice,
    Shots,
    StoreOption,
    Workers,
    open_session,
    preprocessing_settings,
)
from mmad_cli.errors import UsageError

if TYPE_CHECKING:
    from mmad_cli.results.schema import RunResult
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
            metavar="DATA",
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
    backbones: Backbones = "paper",
    checkpoints: Checkpoints = None,
    settings: Settings = None,
    protocol: Protocol = None,
    category: Categories = None,
    rgb_background: RgbBackground = None,
    debris: Debris = None,
    shots: Shots = None,
    shot_choice: ShotChoice = "random",
    seed: Annotated[
        list[int] | None,
        typer.Option(
            "--seed",
            help="Seed of everything random in the method. Default: 0. May be repeated: a run each, and their spread.",
            show_default=False,
        ),
    ] = None,
    limit: Limit = None,
    full_resolution: Annotated[
        bool, typer.Option("--full-resolution", help="Metrics at scan size instead of 224 x 224.")
    ] = False,
    score_validation: Annotated[
        bool,
        typer.Option(
            "--score-validation",
            help="Score validation samples too: false alarms at the threshold that 0.5 % of them exceed.",
        ),
    ] = False,
    device: Device = "auto",
    workers: Workers = None,
    dask: Dask = None,
    memory_limit: MemoryLimit = None,
    save_maps: Annotated[bool, typer.Option("--save-maps", help="Write the anomaly maps into the run.")] = False,
    force: Force = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Run folder, or the folder above several runs. Default: runs/<run-id>.", show_default=False
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be computed, and stop.")] = False,
    store: StoreOption = None,
    json: Json = False,
) -> int:
    """Evaluate methods on a dataset: run what is missing, score the test split, write a run, show the table.

    Example: mmad evaluate data/mvtec3d --method btf --variant fpfh

    Example: mmad evaluate --method btf --variant fpfh --category biscuit

    Example: mmad evaluate --method m3dm --backbones builtin

    Example: mmad evaluate --method btf --variant fpfh --shots 5 --seed 0 --seed 1 --seed 2
    """
    from dataclasses import replace

    from mmad_cli.methods import parse_settings
    from mmad_cli.stages.default_data import default_dataset
    from mmad_cli.stages.evaluate import evaluate_all
    from mmad_cli.stages.pipeline import plan
    from mmad_cli.stages.plan import Selection
    from mmad_cli.stages.request import EvaluateRequest, check_without_data, prepare

    combinations = _combinations(method, variant or [], seed or [0])
    with ConsoleReporter() as reporter, open_session(reporter, store, workers, device, dask, memory_limit) as session:
        requests = [
            EvaluateRequest(
                data=data or Path(),
                method=chosen.method,
                variant=chosen.variant,
                recipe=recipe,
                backbones=backbones,
                settings=parse_settings(settings or []),
                protocol=protocol,
                preprocessing=preprocessing_settings(rgb_background, debris),
                selection=Selection(tuple(category or ()), shots, limit, chosen.seed, shot_choice),
                save_maps=save_maps,
                full_resolution=full_resolution,
                score_validation=score_validation,
                force=force,
                out=_out(out, chosen, combinations),
                checkpoints=checkpoints,
                argv=["mmad", *sys.argv[1:]],
            )
            for chosen in combinations
        ]
        if data is None:
            # the default dataset takes a minute to render: not for a misspelt name
            for request in requests:
                check_without_data(request)
            folder = default_dataset(session)
            requests = [replace(request, data=folder) for request in requests]
        if len(requests) > 1:
            # nor shall the last of several runs be refused when the others are done
            for request in requests:
                prepare(session, request)
        if dry_run:
            lines = [(request, line) for request in requests for line in plan(session, request)]
            _show_plan(lines, json)
            return 0
        results = evaluate_all(session, requests)
    if json:
        texts = [result.model_dump(mode="json", by_alias=True) for result, _ in results]
        print_json(texts[0] if len(texts) == 1 else texts)
    else:
        _show_table([result for result, _ in results])
        for _, written in results:
            print_err(f"run: {_short(written)}")
    incomplete = any(result.failed_categories for result, _ in results)
    return INCOMPLETE if incomplete else 0


class _Combination(NamedTuple):
    method: str
    variant: str | None
    seed: int


def _combinations(methods: list[str], variants: list[str], seeds: list[int]) -> list[_Combination]:
    """Every run that was asked for; the seeds of one method and variant follow each other."""
    if len(methods) > 1 and variants:
        raise UsageError("--variant: give it with one --method only; several methods run with their default variants")
    chosen: list[tuple[str, str | None]] = [(methods[0], variant) for variant in variants]
    chosen = chosen or [(method, None) for method in methods]
    return [_Combination(method, variant, seed) for method, variant in chosen for seed in dict.fromkeys(seeds)]


def _out(out: Path | None, run: _Combination, runs: list[_Combination]) -> Path | None:
    """The run's own folder: --out itself for a single run, else one below it, such as `btf-fpfh-seed-1`."""
    if out is None or len(runs) == 1:
        return out
    several_seeds = len({other.seed for other in runs}) > 1
    parts = [run.method, run.variant, f"seed-{run.seed}" if several_seeds else None]
    return out / "-".join(part for part in parts if part is not None)


def _short(path: Path) -> Path:
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path


def _show_table(results: list[RunResult]) -> None:
    from mmad_cli.reports import render_rich

    print_rich(render_rich(results))


def _show_plan(lines: list[tuple[EvaluateRequest, PlanLine]], as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        print_json(
            [
                {"method": request.method, "variant": request.variant, "seed": request.selection.seed, **asdict(line)}
                for request, line in lines
            ]
        )
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="Still to be computed", title_justify="left")
    several_seeds = len({request.selection.seed for request, _ in lines}) > 1
    for name in ("method", *(["seed"] if several_seeds else []), "category", "stage"):
        table.add_column(name)
    for name in ("in all", "missing", "disk (MB)", "memory (MB)", "time"):
        table.add_column(name, justify="right")
    for request, line in lines:
        table.add_row(
            request.method,
            *([str(request.selection.seed)] if several_seeds else []),
            escape(line.category),
            line.stage,
            str(line.total),
            str(line.missing),
            f"{line.disk_bytes / 1e6:.1f}",
            f"{line.memory_bytes / 1e6:.1f}" if line.memory_bytes else "",
            "?" if line.seconds is None else _duration(line.seconds),
        )
    print_rich(table)
    disk = sum(line.disk_bytes for _, line in lines) / 1e9
    peak = max((line.memory_bytes for _, line in lines), default=0) / 1e9
    # clean scans and features that several runs share are in the lines of each
    about = "about" if len({id(request) for request, _ in lines}) < 2 else "at most about"
    print_out(f"disk for the store: {about} {disk:.2f} GB; peak memory beyond the networks: about {peak:.2f} GB")
    print_out(_total_time([line.seconds for _, line in lines]))


def _total_time(seconds: list[float | None]) -> str:
    known = [value for value in seconds if value is not None]
    if len(known) == len(seconds):
        return f"time: about {_duration(sum(known)) or '0 s'}"
    unknown = "? = nothing like it has been measured on this machine yet"
    return f"time: at least {_duration(sum(known))}; {unknown}" if any(known) else f"time: {unknown}"


def _duration(seconds: float) -> str:
    """Two digits at most, in the unit that is easiest to read; empty for nothing to do."""
    if not seconds:
        return ""
    if seconds < 1:
        return "< 1 s"
    for limit, unit, name in ((99.5, 1, "s"), (99.5 * 60, 60, "min")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 3600:.1f} h"

"""`mmad preprocess`: clean scans into the store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from mmad_cli.cli.console import ConsoleReporter, print_err, print_json
from mmad_cli.cli.options import (
    Categories,
    Dask,
    Data,
    Debris,
    Force,
    Json,
    Limit,
    RgbBackground,
    StoreOption,
    Workers,
    open_session,
    preprocessing_settings,
)

if TYPE_CHECKING:
    from mmad_cli.stages.pipeline import CategoryOutcome

INCOMPLETE = 3


def preprocess(
    data: Data,
    protocol: Annotated[str, typer.Option("--protocol", help="m3dm, cfm or none.")] = "m3dm",
    category: Categories = None,
    rgb_background: RgbBackground = None,
    debris: Debris = None,
    limit: Limit = None,
    workers: Workers = None,
    dask: Dask = None,
    store: StoreOption = None,
    force: Force = False,
    json: Json = False,
) -> int:
    """Clean scans: remove the table plane and debris, pad to a square; results go into the store.

    The dataset folder is only read. What is in the store already is not computed again.

    Example: mmad preprocess data/mvtec3d --protocol m3dm --workers 8
    """
    from mmad_cli.stages import pipeline
    from mmad_cli.stages.plan import Selection

    with ConsoleReporter() as reporter, open_session(reporter, store, workers, dask=dask) as session:
        outcomes = pipeline.preprocess(
            session,
            data,
            protocol=protocol,
            settings=preprocessing_settings(rgb_background, debris),
            selection=Selection(tuple(category or ()), limit=limit),
            force=force,
        )
    return show_outcomes(outcomes, json)


def show_outcomes(outcomes: Sequence[CategoryOutcome], as_json: bool) -> int:
    """What a stage did per category, failures by name; returns the exit code."""

    if as_json:
        print_json([_as_dict(outcome) for outcome in outcomes])
    else:
        for outcome in outcomes:
            print_err(f"{outcome.category}: {_summary(outcome)}")
            for report in outcome.reports.values():
                for sample, message in report.failures.items():
                    print_err(f"error: {outcome.category} {sample}: {message}")
    return 0 if all(outcome.ok for outcome in outcomes) else INCOMPLETE


def _summary(outcome: CategoryOutcome) -> str:
    parts = [
        f"{stage}: {report.total} in all, {report.computed} computed, "
        f"{report.total - report.computed - len(report.failures)} from the store"
        + (f", {len(report.failures)} FAILED" if report.failures else "")
        for stage, report in outcome.reports.items()
    ]
    if outcome.error is not None:
        parts.append(f"FAILED: {outcome.error}")
    parts += [f"{name} bank {size['rows']} x {size['dim']}" for name, size in outcome.info.get("banks", {}).items()]
    return "; ".join(parts)


def _as_dict(outcome: CategoryOutcome) -> dict[str, object]:
    stages = {
        stage: {"total": report.total, "computed": report.computed, "failures": dict(report.failures)}
        for stage, report in outcome.reports.items()
    }
    return {"category": outcome.category, "ok": outcome.ok, "error": outcome.error, "stages": stages, **outcome.info}

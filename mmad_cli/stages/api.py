"""The five stages as plain functions, for use from Python."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmad_cli.errors import DataError
from mmad_cli.stages import evaluate as evaluation
from mmad_cli.stages import pipeline
from mmad_cli.stages.clean import load_clean
from mmad_cli.stages.plan import Selection, choose_categories, clean_jobs, select_samples
from mmad_cli.stages.request import EvaluateRequest, preprocess_config
from mmad_cli.stages.session import Session
from mmad_cli.store import RawIndex, open_store
from mmad_cli.types import Sample

if TYPE_CHECKING:
    from mmad_cli.results.compare import Comparison
    from mmad_cli.results.schema import RunResult

Pathlike = str | PathLike[str]


def _session(store: Pathlike | None, workers: int | None, device: str) -> Session:
    return Session(store=open_store(None if store is None else fspath(store)), workers=workers, device=device)


def preprocess(
    data: Pathlike,
    *,
    protocol: str = "m3dm",
    categories: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    workers: int | None = 1,
    store: Pathlike | None = None,
) -> list[pipeline.CategoryOutcome]:
    """Clean scans of a dataset into the store; what is there already is not computed again."""
    with _session(store, workers, "cpu") as session:
        return pipeline.preprocess(
            session, Path(data), protocol=protocol, settings=settings, selection=Selection(tuple(categories))
        )


def load_preprocessed(
    data: Pathlike,
    protocol: str = "m3dm",
    resized: bool = True,
    *,
    categories: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    store: Pathlike | None = None,
) -> Iterator[Sample]:
    """Cleaned samples one by one, train, validation and test of each category in sorted order.

    resized: at network size (224 x 224); else at scan size, padded as the protocol says. A scan is cleaned when it is
    reached, unless the store has it. Raises DataError naming the file of a scan that cannot be used.
    """
    from mmad_cli.datasets import open_dataset
    from mmad_cli.preprocessing.resize import to_network_size

    with _session(store, 1, "cpu") as session:
        dataset = open_dataset(Path(data))
        config = preprocess_config(protocol, settings or {})
        index = RawIndex(session.store.root, dataset.root)
        for category in choose_categories(dataset, categories):
            samples = select_samples(session, dataset, category, Selection(), index=index)
            for job in clean_jobs(session, dataset, samples, config).values():
                clean = load_clean(job, session.reporter.notice)
                yield to_network_size(clean) if resized else clean


def extract(
    data: Pathlike,
    *,
    backbone: str,
    settings: Mapping[str, Any] | None = None,
    protocol: str = "m3dm",
    categories: Sequence[str] = (),
    workers: int | None = 1,
    device: str = "auto",
    store: Pathlike | None = None,
) -> list[pipeline.CategoryOutcome]:
    """Features of one backbone into the store."""
    with _session(store, workers, device) as session:
        return pipeline.extract(
            session,
            Path(data),
            {backbone: pipeline.backbone_spec(backbone, settings or {})},
            preprocessing=preprocess_config(protocol, {}),
            selection=Selection(tuple(categories)),
        )


def fit(data: Pathlike, *, method: str, **options: Any) -> list[pipeline.CategoryOutcome]:
    """Fit a method per category into the store. Options as for `evaluate`."""
    session, request = _request(data, method, options)
    with session:
        return pipeline.fit(session, request)


def evaluate(data: Pathlike, *, method: str, **options: Any) -> tuple[RunResult, Path]:
    """Evaluate a method; returns the run result and the folder it was written to.

    Options: variant, recipe, settings (fields of the method's configuration), protocol, preprocessing, categories,
    shots, shot_choice, limit, seed, save_maps, full_resolution, score_validation, force, out, store, workers, device.
    """
    session, request = _request(data, method, options)
    with session:
        return evaluation.evaluate(session, request)


def _request(data: Pathlike, method: str, options: dict[str, Any]) -> tuple[Session, EvaluateRequest]:
    selection = Selection(
        tuple(options.pop("categories", ())),
        shots=options.pop("shots", None),
        limit=options.pop("limit", None),
        seed=options.pop("seed", 0),
        shot_choice=options.pop("shot_choice", "random"),
    )
    session = _session(options.pop("store", None), options.pop("workers", 1), options.pop("device", "auto"))
    if options.get("out") is not None:
        options["out"] = Path(options["out"])
    return session, EvaluateRequest(data=Path(data), method=method, selection=selection, **options)


def report(
    runs: Sequence[Pathlike],
    *,
    against: str | None = None,
    tolerances: Sequence[str] = (),
    metrics: Sequence[str] | None = None,
) -> tuple[list[RunResult], list[Comparison]]:
    """Load runs and, with `against`, compare each with a reference; raises DataError for a folder without a run."""
    from mmad_cli.results.compare import compare, parse_tolerances
    from mmad_cli.results.reference import resolve_reference
    from mmad_cli.results.runs import load_runs

    if not runs:
        raise DataError("runs: empty; name at least one run folder")
    results = load_runs([Path(run) for run in runs])
    if against is None:
        return results, []
    limits = parse_tolerances(list(tolerances))
    return results, [
        compare(result, resolve_reference(against, result), limits, metrics=list(metrics) if metrics else None)
        for result in results
    ]

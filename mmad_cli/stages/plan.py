"""What a command will need, before anything is computed: samples, jobs and keys of every stage.

Keys depend on inputs only, so the whole chain is known at the start. That is what makes a finished run cheap to ask
for again, and `--dry-run` exact about what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmad_cli.datasets.base import modality
from mmad_cli.errors import DataError, UsageError, unknown_name
from mmad_cli.stages.checkpoints import Checkpoint, find_checkpoint
from mmad_cli.stages.clean import CleanJob, clean_key, used_files
from mmad_cli.stages.donors import donor_pool, pseudo_jobs
from mmad_cli.stages.experts import ExpertsPlan, plan_experts
from mmad_cli.stages.features import FeatureJob, feature_key
from mmad_cli.stages.labels import list_refs
from mmad_cli.stages.session import Session
from mmad_cli.store import Artefact, RawIndex, library_versions, make_key
from mmad_cli.store.keys import canonical_json, digest_bytes
from mmad_cli.types import SampleRef

if TYPE_CHECKING:
    from mmad_cli.backbones.specs import FeatureSpec
    from mmad_cli.datasets.base import Dataset
    from mmad_cli.methods.base import Method, MethodConfig, MethodDefinition
    from mmad_cli.preprocessing.config import PreprocessConfig

FIT = "fit"
PREDICT = "predict"
EVALUATE = "evaluate"

SHOT_CHOICES = ("random", "first")

# What the random generators of all libraries take
_LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True)
class Selection:
    """Which samples take part: `shots` training samples, at most `limit` samples per split and defect.

    shot_choice: `random` draws the training samples with the seed, `first` takes the first by name.
    """

    categories: tuple[str, ...] = ()
    shots: int | None = None
    limit: int | None = None
    seed: int = 0
    shot_choice: str = "random"

    def __post_init__(self) -> None:
        for name, value in (("--shots", self.shots), ("--limit", self.limit)):
            if value is not None and value < 1:
                raise UsageError(f"{name} {value}: must be at least 1")
        if self.shot_choice not in SHOT_CHOICES:
            raise unknown_name("choice of shots", self.shot_choice, SHOT_CHOICES, "--shot-choice")
        if not 0 <= self.seed <= _LARGEST_SEED:
            raise UsageError(f"--seed {self.seed}: must be 0 to {_LARGEST_SEED}")


@dataclass(frozen=True)
class CategorySamples:
    """The samples of one category that take part, and the digests of their raw files."""

    category: str
    train: tuple[SampleRef, ...]
    validation: tuple[SampleRef, ...]
    test: tuple[SampleRef, ...]
    raw: Mapping[str, Mapping[str, str]]
    counts: Mapping[str, int]
    digest: str

    @property
    def all(self) -> tuple[SampleRef, ...]:
        """Train, validation and test samples."""
        return (*self.train, *self.validation, *self.test)


@dataclass(frozen=True)
class MethodRun:
    """A method, configured and seeded, with what it needs."""

    definition: MethodDefinition
    config: MethodConfig
    seed: int
    specs: Mapping[str, FeatureSpec]
    weights: Mapping[str, str]
    own_weights: tuple[str, ...] = ()
    reads_validation: bool = False
    # validation samples are scored too, for the threshold that they give
    scores_validation: bool = False
    # folder of fitted states, one below it per category, that take the place of fitting
    checkpoints: Path | None = None

    @property
    def config_dump(self) -> dict[str, Any]:
        """The configuration as plain values."""
        return self.config.model_dump(mode="json")

    @property
    def config_hash(self) -> str:
        """Digest of method, version and configuration."""
        parts = [self.definition.name, self.definition.version, self.config_dump]
        return digest_bytes(canonical_json(parts).encode())

    def build(self, device: str) -> Method:
        """An unfitted method."""
        return self.definition.build(self.config, device)


@dataclass(frozen=True)
class CategoryPlan:
    """Jobs and keys of one category, for one method."""

    samples: CategorySamples
    clean: Mapping[str, CleanJob]
    features: Mapping[str, Mapping[str, FeatureJob]]
    shared: Artefact | None
    fit: Artefact
    predictions: Mapping[str, Artefact]
    result: Artefact
    checkpoint: Checkpoint | None = None
    # what the method's configurations share; a checkpoint has its own
    experts: ExpertsPlan | None = None

    @property
    def keys(self) -> set[str]:
        """Every artefact key that the result depends on, itself included."""
        keys = {self.fit.key, self.result.key, *(artefact.key for artefact in self.predictions.values())}
        keys.update(job.key for job in self.clean.values())
        keys.update(job.key for jobs in self.features.values() for job in jobs.values())
        if self.experts is not None:
            keys |= self.experts.keys
        return keys


def choose_categories(dataset: Dataset, chosen: Sequence[str]) -> list[str]:
    """The chosen categories in the dataset's order, or all. Raises UsageError with the nearest names."""
    known = dataset.categories()
    for name in chosen:
        if name not in known:
            raise unknown_name("category", name, known, "--category")
    return [name for name in known if not chosen or name in chosen]


def select_samples(
    session: Session, dataset: Dataset, category: str, selection: Selection, *, index: RawIndex | None = None
) -> CategorySamples:
    """List, digest and narrow down the samples of a category. Raises DataError naming files."""
    index = index or RawIndex(session.store.root, dataset.root)
    try:
        refs = list_refs(session, dataset, category, index)
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}); check permissions") from error
    paths = [path for ref in refs for path in ref.files.values()]
    with session.reporter.task(f"{category}: reading digests", len(paths)) as advance:
        digests = index.digests(paths, advance)
    raw = {ref.id: {role: digests[path] for role, path in ref.files.items()} for ref in refs}
    by_split = {split: [ref for ref in refs if ref.split == split] for split in ("train", "validation", "test")}
    return CategorySamples(
        category=category,
        train=tuple(_draw(_limit(by_split["train"], selection.limit), selection)),
        validation=tuple(_limit(by_split["validation"], selection.limit)),
        test=tuple(_limit(by_split["test"], selection.limit)),
        raw=raw,
        counts={
            "train": len(by_split["train"]),
            "validation": len(by_split["validation"]),
            "test_good": sum(ref.label == 0 for ref in by_split["test"]),
            "test_anomalous": sum(ref.label == 1 for ref in by_split["test"]),
        },
        digest=digest_bytes(canonical_json(sorted(raw.items())).encode()),
    )


def _limit(refs: Sequence[SampleRef], limit: int | None) -> list[SampleRef]:
    if limit is None:
        return list(refs)
    taken: dict[str, int] = {}
    kept = []
    for ref in refs:
        taken[ref.defect] = taken.get(ref.defect, 0) + 1
        if taken[ref.defect] <= limit:
            kept.append(ref)
    return kept


def _draw(refs: list[SampleRef], selection: Selection) -> list[SampleRef]:
    if selection.shots is None:
        return refs
    if selection.shots > len(refs):
        raise DataError(f"--shots {selection.shots}: there are only {len(refs)} training samples")
    if selection.shot_choice == "first":
        return refs[: selection.shots]
    chosen = np.random.default_rng([selection.seed, selection.shots]).choice(
        len(refs), size=selection.shots, replace=False
    )
    return [refs[i] for i in sorted(chosen)]


def clean_jobs(
    session: Session, dataset: Dataset, samples: CategorySamples, config: PreprocessConfig
) -> dict[str, CleanJob]:
    """A job per sample, by id."""
    store = session.store.address
    used = [(ref, used_files(ref, samples.raw[ref.id])) for ref in samples.all]
    own = dataset.own_background
    return {
        ref.id: CleanJob(store, dataset, ref, config, raw, clean_key(config, raw, ref.part, own)) for ref, raw in used
    }


def feature_jobs(
    clean: Mapping[str, CleanJob],
    specs: Mapping[str, FeatureSpec],
    weights: Mapping[str, str],
    pool: Sequence[CleanJob] = (),
) -> dict[str, dict[str, FeatureJob]]:
    """A job per feature name and sample id; `pool` is what surfaces of pseudo anomalies are pasted from.

    A sample that lacks what a feature is made from has no job for it.
    """
    return {
        name: {
            id_: FeatureJob(job, spec, feature_key(spec, weights, job.key))
            for id_, job in clean.items()
            if modality(spec.input) not in job.ref.missing
        }
        if spec.augmentation is None
        else pseudo_jobs(clean, spec, weights, pool)
        for name, spec in specs.items()
    }


def plan_category(
    session: Session,
    dataset: Dataset,
    samples: CategorySamples,
    preprocessing: PreprocessConfig,
    run: MethodRun,
    *,
    shared: Artefact | None = None,
    full_resolution: bool = False,
) -> CategoryPlan:
    """Everything that evaluating one category needs, with keys; `shared` is what was learned across categories."""
    from mmad_cli.metrics import METRICS_VERSION

    category = samples.category
    definition = run.definition
    if not (run.reads_validation or run.scores_validation):
        samples = replace(samples, validation=())
    clean = clean_jobs(session, dataset, samples, preprocessing)
    features = feature_jobs(
        clean, run.specs, run.weights, donor_pool(session, dataset, clean, preprocessing, run.specs)
    )

    def keys_of(ref: SampleRef) -> dict[str, str]:
        return {name: jobs[ref.id].key for name, jobs in features.items() if ref.id in jobs and jobs[ref.id].wanted}

    checkpoint = find_checkpoint(run.checkpoints, category)
    # a fit of our own keeps the key that it has without checkpoints
    instead = {} if checkpoint is None else {"checkpoint": checkpoint.digest}
    fit = make_key(
        FIT,
        definition.version,
        method=definition.name,
        config=run.config_dump,
        seed=run.seed,
        libraries=library_versions(definition.libraries),
        train=[keys_of(ref) for ref in samples.train],
        validation=[keys_of(ref) for ref in samples.validation if run.reads_validation],
        shared=None if shared is None else shared.key,
        weights={name: run.weights[name] for name in run.own_weights},
        **instead,
    )
    predictions = {
        ref.id: Artefact(PREDICT, category, make_key(PREDICT, definition.version, fit=fit, features=keys_of(ref)))
        for ref in (*samples.test, *samples.validation)
    }
    result = make_key(
        EVALUATE,
        METRICS_VERSION,
        predictions=[[ref.id, predictions[ref.id].key, clean[ref.id].key] for ref in samples.test],
        validation=[predictions[ref.id].key for ref in samples.validation],
        full_resolution=full_resolution,
    )
    return CategoryPlan(
        samples=samples,
        clean=clean,
        features=features,
        shared=shared,
        fit=Artefact(FIT, category, fit),
        predictions=predictions,
        result=Artefact(EVALUATE, category, result),
        checkpoint=checkpoint,
        experts=plan_experts(category, samples.train, features, run) if checkpoint is None else None,
    )

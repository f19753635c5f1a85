"""Pseudo anomalies as feature jobs: which training samples get one, and whose image and surface are pasted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mmad_cli.datasets.base import PseudoLabelled
from mmad_cli.errors import DataError
from mmad_cli.stages.clean import CleanJob
from mmad_cli.stages.features import FeatureJob, feature_key
from mmad_cli.stages.session import Session
from mmad_cli.store import RawIndex

if TYPE_CHECKING:
    from mmad_cli.backbones.specs import FeatureSpec
    from mmad_cli.datasets.base import Dataset
    from mmad_cli.preprocessing.config import PreprocessConfig
    from mmad_cli.pseudo.config import Augmentation
    from mmad_cli.types import SampleRef


def training(clean: Mapping[str, CleanJob]) -> list[CleanJob]:
    """The jobs of training samples, in order."""
    return [job for job in clean.values() if job.ref.split == "train"]


def donor_pool(
    session: Session,
    dataset: Dataset,
    clean: Mapping[str, CleanJob],
    preprocessing: PreprocessConfig,
    specs: Mapping[str, FeatureSpec],
) -> list[CleanJob]:
    """Scans whose surfaces are pasted: a few training scans of every category, or of the own one.

    Empty where no feature asks for pseudo anomalies. Other categories take part whether or not they were asked for, so
    that a result does not depend on what was; one whose files cannot be read is left out, and that is said. Of the own
    category only the samples that are trained on take part.
    """
    augmentation = next((spec.augmentation for spec in specs.values() if spec.augmentation is not None), None)
    own = training(clean)
    if augmentation is None or not own or augmentation.donors == "self":
        return []
    category = own[0].ref.category
    pool: list[CleanJob] = []
    # labels that take long to compute are not computed for the sake of a few donors
    everywhere = augmentation.donors == "dataset" and not isinstance(dataset, PseudoLabelled)
    for name in dataset.categories() if everywhere else [category]:
        refs = [job.ref for job in own] if name == category else _training_refs(session, dataset, name)
        chosen = [refs[i] for i in _drawn(len(refs), augmentation, name)]
        known = {job.ref.id: job for job in own} if name == category else {}
        pool += [known[ref.id] for ref in chosen] if known else _jobs(session, dataset, chosen, preprocessing)
    return pool


def pseudo_jobs(
    clean: Mapping[str, CleanJob], spec: FeatureSpec, weights: Mapping[str, str], pool: Sequence[CleanJob]
) -> dict[str, FeatureJob]:
    """A job per sample id; those that are wanted belong to training samples."""
    augmentation = spec.augmentation
    if augmentation is None:
        raise ValueError("spec: must ask for a pseudo anomaly")
    trained = training(clean)
    places = {job.ref.id: place for place, job in enumerate(trained)}
    jobs = {}
    for id_, job in clean.items():
        donors = _donors(job, trained, pool, augmentation)
        key = feature_key(
            spec, weights, job.key, sample=f"{job.ref.category}/{id_}", donors=[donor.key for donor in donors]
        )
        wanted = id_ in places and augmentation.wanted(places[id_], len(trained))
        jobs[id_] = FeatureJob(job, spec, key, donors, wanted)
    return jobs


def _donors(
    job: CleanJob, trained: Sequence[CleanJob], pool: Sequence[CleanJob], augmentation: Augmentation
) -> tuple[CleanJob, ...]:
    """The scan whose image is blended in, of the same category, and the one whose surface is pasted."""
    from mmad_cli.pseudo.config import stream

    if augmentation.donors == "self" or not trained:
        return ()
    rng = stream(augmentation, job.ref.category, job.ref.id, "donors")
    return _other_than(job, trained, rng), _other_than(job, pool or trained, rng)


def _other_than(job: CleanJob, jobs: Sequence[CleanJob], rng: np.random.Generator) -> CleanJob:
    others = [one for one in jobs if (one.ref.category, one.ref.id) != (job.ref.category, job.ref.id)]
    return others[int(rng.integers(len(others)))] if others else jobs[0]


def _drawn(count: int, augmentation: Augmentation, category: str) -> list[int]:
    """Positions of a category's scans in the pool: the same for all its pseudo anomalies."""
    from mmad_cli.pseudo.config import stream

    first = augmentation.model_copy(update={"index": 0})
    rng = stream(first, category, "", "pool")
    return sorted(rng.choice(count, min(count, augmentation.donors_per_category), replace=False).tolist())


def _training_refs(session: Session, dataset: Dataset, category: str) -> list[SampleRef]:
    try:
        return [ref for ref in dataset.samples(category) if ref.split == "train"]
    except (DataError, OSError) as error:
        session.reporter.notice(f"{category} gives no surfaces for pseudo anomalies: {error}")
        return []


def _jobs(
    session: Session, dataset: Dataset, refs: Sequence[SampleRef], preprocessing: PreprocessConfig
) -> list[CleanJob]:
    # plan.py needs this module: a feature is planned with its donors
    from mmad_cli.stages.plan import CategorySamples, clean_jobs

    if not refs:
        return []
    index = RawIndex(session.store.root, dataset.root)
    found = index.digests([path for ref in refs for path in ref.files.values()])
    raw = {ref.id: {role: found[path] for role, path in ref.files.items()} for ref in refs}
    chosen = CategorySamples(refs[0].category, tuple(refs), (), (), raw, {}, "")
    return list(clean_jobs(session, dataset, chosen, preprocessing).values())

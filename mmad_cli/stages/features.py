"""Features of single samples: keys, how they are had, and the lazy set that methods read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from mmad_cli.errors import DataError
from mmad_cli.stages.clean import CleanJob, Notice, load_clean, recomputed
from mmad_cli.store import Artefact, CorruptArtefactError, Store, library_versions, make_key, open_store

if TYPE_CHECKING:
    from mmad_cli.backbones.base import Backbone
    from mmad_cli.backbones.specs import FeatureSpec
    from mmad_cli.types import Sample

STAGE = "extract"


@dataclass(frozen=True)
class FeatureJob:
    """Everything that is needed to have one feature of one sample, in any process.

    donors: for a pseudo anomaly, the scans whose image and whose surface are pasted. wanted: whether a method will
    read it; a pseudo anomaly of a test sample is never made.
    """

    clean: CleanJob
    spec: FeatureSpec
    key: str
    donors: tuple[CleanJob, ...] = ()
    wanted: bool = True

    @property
    def artefact(self) -> Artefact:
        """Its place in the store."""
        return Artefact(STAGE, self.clean.ref.category, self.key)

    @property
    def store(self) -> Store:
        """The store that holds it."""
        return open_store(self.clean.store)


def feature_key(spec: FeatureSpec, weights: Mapping[str, str], clean: str, **pseudo: Any) -> str:
    """Key of a feature: the backbone with all its settings, its weights' digests, and the clean scan.

    pseudo: what else a pseudo anomaly depends on.
    """
    return make_key(
        STAGE,
        1,
        backbone_version=spec.version(),
        spec=spec.canonical(),
        weights={name: weights[name] for name in spec.weights_names()},
        libraries=library_versions(spec.libraries()),
        clean=clean,
        **pseudo,
    )


def runs_in_pool(spec: FeatureSpec) -> bool:
    """Networks use all cores (or the GPU) from one process; hand-made features gain from several processes."""
    return "torch" not in spec.libraries()


@lru_cache(maxsize=2)
def _backbone(spec: FeatureSpec, device: str) -> Backbone:
    from mmad_cli.backbones import create

    return create(spec, device)


def extract_batch(jobs: Sequence[FeatureJob], device: str, notice: Notice) -> None:
    """Compute and store what is missing of these features (all of one spec), as one batch."""
    store = jobs[0].store
    with contextlib.ExitStack() as locks:
        # a fixed order keeps two processes from waiting for each other
        for artefact in sorted({job.artefact.key: job.artefact for job in jobs}.values(), key=lambda a: a.key):
            locks.enter_context(store.lock(artefact))
        missing = [job for job in jobs if not store.has_tensors(job.artefact)]
        if not missing:
            return
        samples = [pseudo_sample(job, notice) for job in missing]
        features = _backbone(missing[0].spec.plain, device).extract(samples)
        for job, sample, arrays in zip(missing, samples, features, strict=True):
            store.write_tensors(job.artefact, {**arrays, **_pseudo_mask(job, sample)}, {"sample": job.clean.ref.id})


def pseudo_sample(job: FeatureJob, notice: Notice) -> Sample:
    """The clean scan, or the pseudo anomaly that is made from it."""
    clean = load_clean(job.clean, notice)
    augmentation = job.spec.augmentation
    if augmentation is None:
        return clean
    from mmad_cli.pseudo import pseudo_anomaly

    try:
        return pseudo_anomaly(clean, augmentation, [load_clean(donor, notice) for donor in job.donors])
    except ValueError as error:
        raise DataError(f"{clean.id}: no pseudo anomaly can be made: {error}") from error


def _pseudo_mask(job: FeatureJob, sample: Sample) -> dict[str, NDArray[Any]]:
    if job.spec.augmentation is None:
        return {}
    from mmad_cli.preprocessing.resize import resize_mask
    from mmad_cli.pseudo import PSEUDO_MASK
    from mmad_cli.pseudo.masks import GRID

    return {PSEUDO_MASK: resize_mask(sample.mask, GRID)}


def batch_size(spec: FeatureSpec, device: str) -> int:
    """Samples per batch, as the backbone suggests."""
    return _backbone(spec.plain, device).batch_size


def load_feature(job: FeatureJob, device: str, notice: Notice) -> Mapping[str, NDArray[Any]]:
    """The feature from the store; computed again where it is missing or damaged. Arrays are read-only."""
    try:
        tensors, _ = job.store.read_tensors(job.artefact)
    except (FileNotFoundError, CorruptArtefactError) as error:
        if isinstance(error, CorruptArtefactError):
            notice(recomputed(error))
            job.store.remove(job.artefact)
        extract_batch([job], device, notice)
        tensors, _ = job.store.read_tensors(job.artefact)
    for array in tensors.values():
        array.setflags(write=False)
    return tensors


@dataclass(frozen=True)
class StoredSample:
    """Features of one sample in the store, read when asked for."""

    id: str
    jobs: Mapping[str, FeatureJob]
    device: str
    notice: Notice

    def __getitem__(self, name: str) -> Mapping[str, NDArray[Any]]:
        return load_feature(self.jobs[name], self.device, self.notice)


@dataclass(frozen=True)
class StoredFeatures:
    """Features of several samples in the store; nothing is kept in memory."""

    samples: Sequence[StoredSample]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> StoredSample:
        return self.samples[index]

    def __iter__(self) -> Iterator[StoredSample]:
        return iter(self.samples)

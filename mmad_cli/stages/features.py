"""Features of single samples: keys, how they are had, and the lazy set that methods read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self

from numpy.typing import NDArray

from mmad_cli.errors import DataError
from mmad_cli.stages.clean import CleanJob, Notice, load_clean, recomputed
from mmad_cli.stages.overlap import read_ahead
from mmad_cli.store import Artefact, CorruptArtefactError, Store, library_versions, make_key, open_store

if TYPE_CHECKING:
    from mmad_cli.backbones.base import Backbone, Features
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
    batch = Batch(jobs)
    batch.read(notice)
    batch.compute(device)
    batch.write()


class Batch:
    """Features of a few samples (all of one spec) on their way into the store, in three steps.

    Different threads may take the steps, one after the other. Between `compute` and `write` the features are locked.
    """

    def __init__(self, jobs: Sequence[FeatureJob]) -> None:
        self._jobs = list(jobs)
        self._store = jobs[0].store
        self._locks = contextlib.ExitStack()
        self._samples: dict[str, Sample] = {}
        self._features: dict[str, Features] = {}

    def read(self, notice: Notice) -> None:
        """Samples of the features that the store does not have."""
        self._samples = {job.key: pseudo_sample(job, notice) for job in self._missing()}

    def compute(self, device: str) -> None:
        """Features of the samples; another process that computes one of them is waited for."""
        if not self._samples:
            return
        with contextlib.ExitStack() as locks:
            # a fixed order keeps two processes from waiting for each other
            for artefact in sorted({job.artefact.key: job.artefact for job in self._jobs}.values(), key=_key_of):
                locks.enter_context(self._store.lock(artefact))
            missing = [job for job in self._missing() if job.key in self._samples]
            if missing:
                backbone = _backbone(missing[0].spec.plain, device)
                samples = [self._samples[job.key] for job in missing]
                for job, sample, arrays in zip(missing, samples, backbone.extract(samples), strict=True):
                    self._features[job.key] = {**arrays, **_pseudo_mask(job, sample)}
            # scans take far more memory than what waits to be stored
            self._samples.clear()
            self._locks = locks.pop_all()

    def write(self) -> None:
        """Put them into the store."""
        with self._locks:
            for job in self._jobs:
                arrays = self._features.pop(job.key, None)
                if arrays is not None:
                    self._store.write_tensors(job.artefact, arrays, {"sample": job.clean.ref.id})

    def release(self) -> None:
        """Give the locks up without storing anything."""
        self._locks.close()

    def shares_with(self, other: Batch) -> bool:
        """Whether a feature is in both, as that of a scan which is in the dataset twice."""
        return not {job.key for job in self._jobs}.isdisjoint(job.key for job in other._jobs)

    def _missing(self) -> list[FeatureJob]:
        return [job for job in self._jobs if not self._store.has_tensors(job.artefact)]


def _key_of(artefact: Artefact) -> str:
    return artefact.key


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
        return _read_feature(job)
    except (FileNotFoundError, CorruptArtefactError) as error:
        if isinstance(error, CorruptArtefactError):
            notice(recomputed(error))
            job.store.remove(job.artefact)
        extract_batch([job], device, notice)
        return _read_feature(job)


def _read_feature(job: FeatureJob) -> Mapping[str, NDArray[Any]]:
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
    _reads: _Reads | None = field(default=None, kw_only=True, compare=False, repr=False)

    def __getitem__(self, name: str) -> Mapping[str, NDArray[Any]]:
        found = None if self._reads is None else self._reads.take(self.id, name)
        return load_feature(self.jobs[name], self.device, self.notice) if found is None else found

    def reading(self, reads: _Reads) -> Self:
        """The same sample, which takes what was read ahead for it."""
        return replace(self, _reads=reads)


class _Reads:
    """What is read ahead of a pass over samples: the features that the samples before were asked for."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}
        self._found: Mapping[str, Mapping[str, NDArray[Any]]] = {}
        self._id = ""

    def fetch(self, sample: StoredSample) -> dict[str, Mapping[str, NDArray[Any]]]:
        """Read what a sample will be asked for; what is missing or damaged is left to who asks."""
        found = {}
        for name in tuple(self._names):
            if name in sample.jobs:
                with contextlib.suppress(FileNotFoundError, CorruptArtefactError):
                    found[name] = _read_feature(sample.jobs[name])
        return found

    def hold(self, id_: str, found: Mapping[str, Mapping[str, NDArray[Any]]]) -> None:
        """Keep what was fetched for the sample that is worked on now, and nothing else."""
        self._id, self._found = id_, found

    def take(self, id_: str, name: str) -> Mapping[str, NDArray[Any]] | None:
        """A feature of the present sample, if it was read ahead; None for any other."""
        self._names[name] = None
        return self._found.get(name) if id_ == self._id else None


@dataclass(frozen=True)
class StoredFeatures:
    """Features of several samples in the store; a pass over them reads one sample ahead and keeps nothing else."""

    samples: Sequence[StoredSample]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> StoredSample:
        return self.samples[index]

    def __iter__(self) -> Iterator[StoredSample]:
        reads = _Reads()
        for sample, found in read_ahead(self.samples, reads.fetch):
            reads.hold(sample.id, found.result())
            yield sample.reading(reads)
        reads.hold("", {})

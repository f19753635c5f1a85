"""One clean scan: its key, its form on disk, and how it is had (read, or computed and stored)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmad_cli.store import Artefact, CorruptArtefactError, check_unchanged, library_versions, make_key, open_store
from mmad_cli.types import BoolArray, FloatArray, Sample, SampleRef

if TYPE_CHECKING:
    from mmad_cli.datasets.base import Dataset
    from mmad_cli.preprocessing.config import PreprocessConfig

STAGE = "preprocess"

Notice = Callable[[str], None]


@dataclass(frozen=True)
class CleanJob:
    """Everything that is needed to have one clean scan, in any process."""

    store: str
    dataset: Dataset
    ref: SampleRef
    config: PreprocessConfig
    raw: Mapping[str, str]
    key: str

    @property
    def artefact(self) -> Artefact:
        """Its place in the store."""
        return Artefact(STAGE, self.ref.category, self.key)


def used_files(ref: SampleRef, raw: Mapping[str, str]) -> dict[str, str]:
    """Digests of the raw files that a clean scan is made from: the ground truth of a good sample is never read.

    So a scan that moves from a defect to good, or back, gets another key with its other mask.
    """
    return {role: digest for role, digest in raw.items() if ref.label or role != "gt"}


def clean_key(
    config: PreprocessConfig,
    raw: Mapping[str, str],
    part: Mapping[str, Any] | None = None,
    own_background: bool = False,
) -> str:
    """Key of a clean scan: the parameters, what computed it, and the content of its raw files by role.

    part: which part of its files the sample is. own_background: no table is searched for, so that it only matters
    whether the background is removed, and `m3dm` and `cfm` share their clean scans.
    """
    from mmad_cli.preprocessing.config import PREPROCESSING_VERSION

    keep = config.protocol == "none"
    return make_key(
        STAGE,
        PREPROCESSING_VERSION,
        parameters={"background": "keep" if keep else "remove"} if own_background else config.model_dump(mode="json"),
        libraries=library_versions(() if keep or own_background else ("open3d",)),
        raw=dict(raw),
        **({"part": dict(part)} if part else {}),
    )


def load_clean(job: CleanJob, notice: Notice) -> Sample:
    """The clean scan from the store, computed first where it is missing or damaged."""
    tensors, info = open_store(job.store).tensors_or_compute(
        job.artefact, lambda: _compute(job), lambda error: notice(recomputed(error))
    )
    return decode_clean(job.ref, tensors, info)


def recomputed(error: CorruptArtefactError) -> str:
    """The line that a user sees when a damaged file is replaced."""
    return f"{error}; computed again"


def _compute(job: CleanJob) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    from mmad_cli.preprocessing import preprocess

    sample = job.dataset.read(job.ref)
    if job.ref.part:
        for role, digest in job.raw.items():
            state = job.ref.files[role].stat()
            _check_once(job.ref.files[role], digest, (state.st_size, state.st_mtime_ns, state.st_ctime_ns))
    else:
        check_unchanged(job.ref.files, job.raw)
    return encode_clean(preprocess(sample, job.config))


@lru_cache(maxsize=16)
def _check_once(path: Path, digest: str, state: tuple[int, ...]) -> None:
    """`check_unchanged` of a file that holds many samples: not again while its size and times stay the same."""
    check_unchanged({"file": path}, {"file": digest})


def encode_clean(sample: Sample) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Arrays and record of a clean scan. Lossless; only points that are not background take space."""
    present = (sample.xyz != _background_value(sample.info)).any(axis=-1)
    tensors: dict[str, NDArray[Any]] = {
        "present": np.packbits(present),
        "points": sample.xyz[present],
        "rgb": sample.rgb,
        "mask": np.packbits(sample.mask),
    }
    shapes = {"xyz": list(sample.xyz.shape[:2]), "mask": list(sample.mask.shape)}
    return tensors, {"shapes": shapes, "info": dict(sample.info)}


def decode_clean(ref: SampleRef, tensors: Mapping[str, NDArray[Any]], record: Mapping[str, Any]) -> Sample:
    """Inverse of `encode_clean`."""
    present = _unpack(tensors["present"], record["shapes"]["xyz"])
    xyz = np.broadcast_to(_background_value(record["info"]), (*present.shape, 3)).copy()
    xyz[present] = tensors["points"]
    return Sample(
        category=ref.category,
        split=ref.split,
        defect=ref.defect,
        stem=ref.stem,
        rgb=tensors["rgb"],
        xyz=xyz,
        mask=_unpack(tensors["mask"], record["shapes"]["mask"]),
        info=record["info"],
    )


def _background_value(info: Mapping[str, Any]) -> FloatArray:
    """What pixels without a point hold: (0, 0, 0) unless the dataset has its own value."""
    return np.asarray(info.get("background_value", (0, 0, 0)), dtype=np.float32)


def _unpack(bits: NDArray[np.uint8], shape: list[int]) -> BoolArray:
    return np.unpackbits(bits, count=shape[0] * shape[1]).reshape(shape).astype(bool)

"""The method protocol: declare features, fit on good samples, score one sample.

A method does no file input or output of its own but saving and loading its fitted state in a folder that it is given,
knows no dataset, and takes its seed as an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, model_validator

from mmad_cli.types import FloatArray

if TYPE_CHECKING:
    from mmad_cli.backbones.specs import FeatureSpec

# `fast`: less training, for machines without a GPU; never comparable with print. Only trained methods have it
Recipe = Literal["official", "corrected", "fast"]

# The image region that a method's maps cover: the whole scan resized to 224 x 224, or the centre crop of PatchCore
View = Literal["resize", "crop"]

MAP_SIZE = 224

# Called with (done, total); never more than a few times a second
ProgressCallback = Callable[[int, int], None]


class MethodConfig(BaseModel):
    """Every switch of a method; field defaults are the published values. Unknown fields are an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    variant: str

    @model_validator(mode="before")
    @classmethod
    def _none_as_a_word(cls, data: Any) -> Any:
        """`--set name=none` reads as no value; for a switch that knows the word it is the word."""
        if not isinstance(data, dict):
            return data
        words = {name for name, field in cls.model_fields.items() if "none" in get_args(field.annotation)}
        return {name: "none" if value is None and name in words else value for name, value in data.items()}


class SampleFeatures(Protocol):
    """Features of one sample, read when asked for."""

    @property
    def id(self) -> str:
        """`<split>/<defect>/<stem>`."""

    def __getitem__(self, name: str) -> Mapping[str, NDArray[Any]]:
        """Arrays of the feature that the method calls `name`; read-only."""


class FeatureSet(Protocol):
    """Features of several samples in sorted order; can be gone through again and again, never all in memory."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> SampleFeatures: ...

    def __iter__(self) -> Iterator[SampleFeatures]: ...


@dataclass(frozen=True)
class Prediction:
    """Scores of one sample: anomaly map float32 (224, 224) and image score, larger = more anomalous.

    AUPRO is computed on `anomaly_map * aupro_scale`: CFM and what is built on it scale maps of single images for it in
    another way than for P-AUROC. `note` says what was done otherwise than for the other samples; it is empty for most.
    """

    anomaly_map: FloatArray
    image_score: float
    aupro_scale: float = 1.0
    note: str = ""


@dataclass(frozen=True)
class BankSize:
    """Rows and channels of a fitted memory bank."""

    rows: int
    dim: int


class Method(Protocol):
    """One published method with its configuration; unfitted until `fit` or `load`."""

    @property
    def view(self) -> View:
        """The image region that the maps cover."""

    def features(self) -> dict[str, FeatureSpec]:
        """Features needed, by the name under which `fit` and `predict` read them."""

    def fit(
        self,
        train: FeatureSet,
        validation: FeatureSet,
        *,
        seed: int,
        progress: ProgressCallback | None = None,
    ) -> None:
        """Learn from good samples. Raises DataError when there are too few."""

    def predict(self, sample: SampleFeatures) -> Prediction:
        """Score one sample."""

    def banks(self) -> dict[str, BankSize]:
        """Sizes of the fitted memory banks by name; empty for methods without."""

    def save(self, folder: Path) -> None:
        """Write the fitted state into an empty folder (safetensors and JSON)."""

    def load(self, folder: Path) -> None:
        """Read the state that `save` wrote."""

    def memory_estimate(self, n_train: int) -> int:
        """Peak bytes that fitting on `n_train` samples needs beyond the networks."""


@runtime_checkable
class DiskEstimate(Protocol):
    """What a method offers whose fitted state takes more than a few megabytes."""

    def disk_estimate(self, n_train: int) -> int:
        """Bytes that `save` writes after fitting on `n_train` samples."""


@runtime_checkable
class ReadsValidation(Protocol):
    """What a method offers when `fit` reads the validation samples in some configurations."""

    @property
    def needs_validation(self) -> bool:
        """Whether this configuration reads them; otherwise their features are not extracted."""


@runtime_checkable
class DropsModality(Protocol):
    """What a method offers that scores a sample without one of its features by what is left, and says so in a note."""

    @property
    def drops_missing(self) -> bool:
        """Whether this configuration does; otherwise such a sample is an error."""


@runtime_checkable
class OwnWeights(Protocol):
    """What a method offers that reads pretrained weights itself, beyond those of its features."""

    def weights_names(self) -> list[str]:
        """Names in the weights registry; their digests enter the key of the fit."""


@runtime_checkable
class SharedTraining(Protocol):
    """What a method offers on top of `Method` when it learns something once for all categories of a dataset.

    The stage calls `fit_shared` and `save_shared` once per dataset, then `load_shared` on the method of each category
    before its `fit` or `load`.
    """

    def needs_shared(self) -> bool:
        """Whether this configuration learns across categories."""

    def fit_shared(
        self,
        train: Mapping[str, FeatureSet],
        *,
        seed: int,
        folder: Path,
        progress: ProgressCallback | None = None,
    ) -> None:
        """Learn from the good samples of all categories, by name.

        `folder` survives an interruption: what is written there lets the next call go on with the same result.
        """

    def save_shared(self, folder: Path) -> None:
        """Write what was learned into an empty folder."""

    def load_shared(self, folder: Path) -> None:
        """Read what `save_shared` wrote."""


class Experts(Protocol):
    """A part of a method that its configurations share: fitted first, then it says something of each scan.

    A stage keeps it and what it says apart from the method, so that what was found out for one configuration serves
    the others.
    """

    def settings(self) -> dict[str, Any]:
        """All that changes what it says beside seed and features, as JSON."""

    def looks(self) -> Mapping[str, Sequence[str]]:
        """Features that each look reads, by the name of the look; the first is what `fit` reads too."""

    def fit(self, train: FeatureSet, *, seed: int, progress: ProgressCallback | None = None) -> None:
        """Learn from good samples. Raises DataError when there are too few."""

    def look(self, sample: SampleFeatures, name: str) -> Mapping[str, NDArray[Any]]:
        """What it says of a scan."""

    def save(self, folder: Path) -> None:
        """Write the fitted state into an empty folder."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""


@runtime_checkable
class HasExperts(Protocol):
    """What a method offers that has `Experts`.

    The stage fits or loads them before it calls `fit` or `load`, and hands over samples that are `LookedAt`. Without
    such samples the method fits its experts itself and saves them with the rest.
    """

    @property
    def experts(self) -> Experts:
        """The experts of this method."""


@runtime_checkable
class LookedAt(Protocol):
    """A sample whose looks the stage has."""

    @property
    def id(self) -> str:
        """`<split>/<defect>/<stem>`."""

    def look(self, name: str) -> Mapping[str, NDArray[Any]]:
        """What the experts say of it, by the name of the look; read-only."""


@runtime_checkable
class Trained(Protocol):
    """What a method offers on top of `Method` when its fit is a training that an interruption must not lose."""

    def fit_resumable(
        self,
        train: FeatureSet,
        validation: FeatureSet,
        *,
        seed: int,
        folder: Path | None,
        progress: ProgressCallback | None = None,
    ) -> None:
        """`fit`, with checkpoints in `folder`, which survives an interruption; the result is the same."""

    def losses(self) -> dict[str, list[float]]:
        """Mean loss per epoch, by name."""


@dataclass(frozen=True)
class MethodDefinition:
    """What the registry knows of a method without building it.

    `recipes` maps a recipe to the switches in which it departs from the configuration's defaults; `variants` maps a
    variant to one line about it. `version` is raised whenever results change. `protocol` is the preprocessing that
    the published numbers were made with, `other_protocols` are those of further published numbers. `builtin` holds the
    switches that run the method on the built-in backbones, beyond `rgb_backbone` and `point_backbone` themselves.
    `qualifier` is what lists, reports and results put behind the name of a method that is not what was published.
    """

    name: str
    title: str
    version: int
    config: type[MethodConfig]
    build: Callable[[Any, str], Method]
    variants: Mapping[str, str]
    default_variant: str
    modalities: Mapping[str, str]
    protocol: Literal["m3dm", "cfm", "none"]
    recipes: Mapping[Recipe, Mapping[str, Any]]
    source: str
    libraries: tuple[str, ...] = ("numpy",)
    notes: tuple[str, ...] = ()
    other_protocols: tuple[str, ...] = ()
    builtin: Mapping[str, Any] = field(default_factory=dict)
    qualifier: str = ""

    @property
    def label(self) -> str:
        """The name with what must be said wherever it stands: `iaenet (re-design after the abstract)`."""
        return f"{self.name} ({self.qualifier})" if self.qualifier else self.name


def as_float32(array: NDArray[Any]) -> FloatArray:
    """C-contiguous float32 view or copy."""
    return np.ascontiguousarray(array, dtype=np.float32)

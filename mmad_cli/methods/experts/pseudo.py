"""Pseudo anomalies of training samples, read as samples of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from mmad_cli.methods.base import FeatureSet, SampleFeatures
from mmad_cli.methods.experts.sources import Source
from mmad_cli.methods.single_bank import read_array
from mmad_cli.types import BoolArray

if TYPE_CHECKING:
    from mmad_cli.backbones.specs import FeatureSpec
    from mmad_cli.pseudo.config import Augmentation


def pseudo_name(name: str, index: int) -> str:
    """Name of a feature of pseudo anomaly number `index`."""
    return f"{name}_pseudo{index}"


def with_pseudo(sources: Sequence[Source], augmentations: Iterable[Augmentation]) -> dict[str, FeatureSpec]:
    """All features by name: those of the sources, and the same of each pseudo anomaly.

    Those of one backbone come one after the other, so that it is loaded once.
    """
    augmentations = list(augmentations)
    specs: dict[str, FeatureSpec] = {}
    for source in sources:
        specs[source.name] = source.spec
        specs |= {pseudo_name(source.name, a.index): source.spec.augmented(a) for a in augmentations}
    return specs


@dataclass(frozen=True)
class PseudoSample:
    """Pseudo anomaly number `index` of a training sample: its features under the plain names.

    position: of the training sample among all.
    """

    sample: SampleFeatures
    index: int
    position: int

    @property
    def id(self) -> str:
        """Of the training sample."""
        return self.sample.id

    def __getitem__(self, name: str) -> Mapping[str, NDArray[Any]]:
        return self.sample[pseudo_name(name, self.index)]

    def mask(self, name: str) -> BoolArray:
        """Damaged pixels, bool (224, 224), as they lie beside the feature `name`."""
        from mmad_cli.pseudo import PSEUDO_MASK

        return read_array(self, name, PSEUDO_MASK).astype(bool)


def pseudo_samples(train: FeatureSet, augmentations: Iterable[Augmentation]) -> list[PseudoSample]:
    """Those that exist: the first of every training sample, then the second of every, up to their limit."""
    return [
        PseudoSample(sample, augmentation.index, position)
        for augmentation in augmentations
        for position, sample in enumerate(train)
        if augmentation.wanted(position, len(train))
    ]

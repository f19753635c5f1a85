"""The depth image itself as a feature, for BTF's raw, HoG and SIFT ablations (arXiv 2203.05550)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from mmad_cli.backbones.base import Features, float32

if TYPE_CHECKING:
    from mmad_cli.backbones.specs import DepthParams, FeatureSpec
    from mmad_cli.types import Sample


class DepthBackbone:
    """Z of the cleaned cloud at network size: `z` float32 (size, size) in metres, invalid = 0."""

    batch_size = 1

    def __init__(self, spec: FeatureSpec) -> None:
        self.spec = spec
        self._settings = cast("DepthParams", spec.settings)

    def extract(self, samples: Sequence[Sample]) -> list[Features]:
        """The Z image of each sample."""
        return [self._one(sample) for sample in samples]

    def _one(self, sample: Sample) -> Features:
        from mmad_cli.preprocessing.resize import to_network_size

        settings = self._settings
        small = to_network_size(sample, settings.size, settings.xyz_resize)
        return {"z": float32(small.xyz[..., 2])}

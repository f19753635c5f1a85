"""What every backbone offers: samples in, one dictionary of arrays per sample out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from mmad_cli.backbones.specs import FeatureSpec
    from mmad_cli.types import Sample

Features = dict[str, NDArray[Any]]


@runtime_checkable
class Backbone(Protocol):
    """Turns cleaned samples into features.

    Samples come at scan size; the backbone brings them to network size itself. Arrays by backbone:

    timm, `outputs` given    `out{i}` float32 (C, h, w) per chosen output i
    timm, `outputs` None     `tokens` float32 (P, C), row-major on `grid` int32 (2,) = (h, w); likewise for `render`
    fpfh                     `points` float32 (n, 33) in raster order, `pixel` int32 (n,) = size * y + x
    depth                   `z` float32 (size, size)
    point_mae, point_bert, builtin_points: `tokens` float32 (G, C) of the groups around `centres` float32 (G, 3);
                            `pixel` int32 (n,) of each point, its `neighbours` int16 or int32 (n, 3) among the
                            groups and their `weights` float32 (n, 3): see `mmad_cli.alignment.interpolation`
    """

    @property
    def spec(self) -> FeatureSpec:
        """The features that this backbone computes."""

    @property
    def batch_size(self) -> int:
        """How many samples to hand over at once: a hint, any number works and gives the same values."""

    def extract(self, samples: Sequence[Sample]) -> list[Features]:
        """Features of each sample, in order; `DataError` names a sample that has too little to work with."""


def float32(array: NDArray[Any]) -> NDArray[np.float32]:
    """The array as C-contiguous float32."""
    return np.ascontiguousarray(array, dtype=np.float32)

"""The built-in point network behind the interface of the point backbones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from mmad_cli.backbones.point_backbone import PointBackbone

if TYPE_CHECKING:
    import torch

    from mmad_cli.types import Sample


class BuiltinPointBackbone(PointBackbone):
    """Group tokens float32 (G, 288) of the built-in network; everything else is as for Point-MAE."""

    def _architecture(self) -> torch.nn.Module:
        from mmad_cli.backbones.builtin.points import PointNetwork

        return PointNetwork()

    def _forward(self, groups: torch.Tensor, centres: torch.Tensor, samples: Sequence[Sample]) -> torch.Tensor:
        return cast("torch.Tensor", self._network(groups, centres))

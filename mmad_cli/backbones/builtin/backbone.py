"""The built-in point network behind the interface of the point backbones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmad_cli.backbones.base import float32
from mmad_cli.backbones.point_backbone import PointBackbone

if TYPE_CHECKING:
    import torch

    from mmad_cli.types import FloatArray, Sample


class BuiltinPointBackbone(PointBackbone):
    """Group tokens float32 (G, 288) of the built-in network; everything else is as for Point-MAE."""

    def _architecture(self) -> torch.nn.Module:
        from mmad_cli.backbones.builtin.points import PointNetwork

        return PointNetwork()

    def _tokens(self, groups: FloatArray, centres: FloatArray, sample: Sample) -> FloatArray:
        import torch

        half = self._settings.precision == "bfloat16"
        with torch.inference_mode(), torch.autocast(self._device.type, torch.bfloat16, enabled=half):
            tokens = self._network(
                torch.from_numpy(groups)[None].to(self._device), torch.from_numpy(centres)[None].to(self._device)
            )
        return float32(tokens[0].float().cpu().numpy())

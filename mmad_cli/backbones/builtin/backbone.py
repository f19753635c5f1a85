"""The built-in point network behind the interface of the point backbones."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from mmad_cli.backbones._checkpoints import build_with, read_checkpoint
from mmad_cli.backbones.base import float32
from mmad_cli.backbones.point_backbone import PointBackbone
from mmad_cli.backbones.weights import resolve

if TYPE_CHECKING:
    from mmad_cli.backbones.specs import FeatureSpec, PointParams
    from mmad_cli.types import FloatArray, Sample


class BuiltinPointBackbone(PointBackbone):
    """Group tokens float32 (G, 288) of the built-in network; everything else is as for Point-MAE."""

    def __init__(self, spec: FeatureSpec, device: str = "cpu") -> None:
        import torch

        from mmad_cli.backbones.builtin.points import PointNetwork

        self.spec = spec
        self._settings = cast("PointParams", spec.settings)
        self._device = torch.device(device)
        record = resolve(self._settings.network)
        built = build_with(PointNetwork, read_checkpoint(record.path).content, str(record.path))
        self._tokens_of = built.to(self._device).eval().requires_grad_(False)

    def _tokens(self, groups: FloatArray, centres: FloatArray, sample: Sample) -> FloatArray:
        import torch

        half = self._settings.precision == "bfloat16"
        with torch.inference_mode(), torch.autocast(self._device.type, torch.bfloat16, enabled=half):
            tokens = self._tokens_of(
                torch.from_numpy(groups)[None].to(self._device), torch.from_numpy(centres)[None].to(self._device)
            )
        return float32(tokens[0].float().cpu().numpy())

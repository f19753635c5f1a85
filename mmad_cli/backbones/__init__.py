"""Backbones: a clean scan in, features out; and the registry of pretrained weights.

Importing this package imports no network library; `create` does, for the backbone asked for.
"""

from __future__ import annotations

from mmad_cli.backbones.base import Backbone, Features
from mmad_cli.backbones.specs import FeatureSpec

__all__ = ["Backbone", "FeatureSpec", "Features", "create"]


def create(spec: FeatureSpec, device: str = "cpu") -> Backbone:
    """The backbone that computes `spec`; `device` is `cpu` or `cuda` (FPFH runs on the CPU in any case).

    Raises `WeightsError` when pretrained weights are missing. No network access.
    """
    if spec.backbone == "fpfh":
        from mmad_cli.backbones.fpfh import FpfhBackbone

        return FpfhBackbone(spec)
    if spec.backbone == "depth":
        from mmad_cli.backbones.depth import DepthBackbone

        return DepthBackbone(spec)
    if spec.backbone in ("point_mae", "point_bert"):
        from mmad_cli.backbones.point_backbone import PointBackbone

        return PointBackbone(spec, device=device)
    if spec.backbone == "builtin_points":
        from mmad_cli.backbones.builtin.backbone import BuiltinPointBackbone

        return BuiltinPointBackbone(spec, device=device)
    from mmad_cli.backbones.timm_backbone import TimmBackbone

    return TimmBackbone(spec, device=device)

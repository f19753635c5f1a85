"""CFM (CVPR 2024, arXiv 2312.04521): each modality's features predicted from the other's, per pixel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from mmad_cli.methods.base import MethodDefinition
from mmad_cli.methods.mapping.config import CORRECTED, FAST, MappingConfig
from mmad_cli.methods.mapping.method import MappingMethod

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mmad_cli.methods.cfm.networks import CfmLearner
    from mmad_cli.methods.mapping.dense import DenseFeatures, Tokens
    from mmad_cli.methods.mapping.trainer import Learner


class CfmConfig(MappingConfig):
    """Switches of CFM; the defaults are those of the published checkpoints for MVTec 3D-AD, `big` of Eyecandies."""

    variant: Literal["base", "big"] = "base"
    epochs: int = Field(default=250, ge=1)
    batch_size: int = Field(default=4, ge=1)
    # so many valid pixels of each sample, drawn anew in each step; None: all, as published
    pixels_per_step: int | None = Field(default=None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _published_with_variant(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("variant") == "big":
            return {"epochs": 50, "batch_size": 2, **data}
        return data


class Cfm(MappingMethod):
    """Crossmodal feature mapping: a pixel is anomalous when both predictions disagree with the observation."""

    def __init__(self, config: CfmConfig, device: str = "cpu") -> None:
        super().__init__(config, device)
        self.config = config

    def build_learner(self, channels: dict[str, int]) -> CfmLearner:
        """The two mappers."""
        from mmad_cli.methods.cfm.networks import CfmLearner

        return CfmLearner(channels, self.config.variant, self.config.pixels_per_step)

    def errors(self, learner: Learner, features: DenseFeatures) -> NDArray[np.floating]:
        """Product of both mapping errors, computed where it is not zero."""
        import torch

        from mmad_cli.methods.cfm.networks import CfmLearner, mapping_errors
        from mmad_cli.methods.mapping.dense import pixel_image

        if not isinstance(learner, CfmLearner):
            raise TypeError(f"learner: expected CfmLearner, got {type(learner).__name__}")
        rgb, points = features.both()
        valid = features.valid
        seen, felt = rgb[valid], points[valid]
        product = mapping_errors(learner.to_rgb, felt, seen) * mapping_errors(learner.to_points, seen, felt)
        return pixel_image(product, torch.nonzero(valid)[:, 0], features.side)

    def sample_errors(self, learner: Learner, tokens: Tokens) -> NDArray[np.floating]:
        """`errors` from tokens: valid pixels only, and the first layers are applied to tokens instead of pixels."""
        from mmad_cli.methods.cfm.networks import CfmLearner, errors_after
        from mmad_cli.methods.mapping.dense import pixel_image

        if not isinstance(learner, CfmLearner):
            raise TypeError(f"learner: expected CfmLearner, got {type(learner).__name__}")
        pixels = self.reader.valid_pixels(tokens)
        seen, felt = pixels.rgb, pixels.points
        to_points, to_rgb = learner.to_points.input, learner.to_rgb.input
        product = errors_after(learner.to_points, pixels.rgb_mapped(to_points.weight) + to_points.bias, felt)
        product *= errors_after(learner.to_rgb, pixels.points_mapped(to_rgb.weight) + to_rgb.bias, seen)
        return pixel_image(product, pixels.index, self.config.grid)


_FAST: dict[str, Any] = {**FAST, "pixels_per_step": 512, "batch_size": 4}

DEFINITION = MethodDefinition(
    name="cfm",
    title="CFM",
    version=1,
    config=CfmConfig,
    build=Cfm,
    variants={
        "base": "mappers of 3 linear layers, 250 epochs (MVTec 3D-AD)",
        "big": "mappers of 7 linear layers; the published Eyecandies numbers are of 50 epochs and batch 2",
    },
    default_variant="base",
    modalities={"base": "RGB+3D", "big": "RGB+3D"},
    protocol="cfm",
    recipes={"official": {}, "corrected": CORRECTED, "fast": _FAST},
    source="arXiv 2312.04521",
    libraries=("numpy", "scipy", "torch"),
    notes=(
        "The published extractor runs in training mode; here its batch statistics are kept and stochastic depth is "
        "off, so features are deterministic (point_droppath=on draws it).",
        "The training script says 50 epochs, the published checkpoints 250; the default is that of the checkpoints.",
        "The recipe fast works on a grid of 56 x 56 for 10 epochs, for machines without a GPU; not comparable.",
    ),
)

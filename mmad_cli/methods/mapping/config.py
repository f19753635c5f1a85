"""Configuration of the methods on dense features. PyTorch is not needed to read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from mmad_cli.methods.base import MAP_SIZE, MethodConfig

# What the published codes call the two inputs
RGB, POINTS = "rgb", "points"


@dataclass(frozen=True)
class TrainerConfig:
    """How it is trained. Defaults are those of the family: Adam 1e-3, no decay, no schedule.

    non_finite: `stop` ends the training with an error, as CFM and MAFR do; `skip` leaves that group's step out, as
    CMDR-IAD does.
    """

    epochs: int = 50
    batch_size: int = 1
    rate: float = 1e-3
    optimiser: Literal["adam", "adamw"] = "adam"
    weight_decay: float = 0.0
    non_finite: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")


class MappingConfig(MethodConfig):
    """Switches that the methods on dense features share; the defaults are what the published codes compute."""

    rgb_backbone: str = "vit_base_patch8_224.dino"
    rgb_size: int = Field(default=224, ge=8)
    rgb_norm: Literal["imagenet", "model"] = "imagenet"
    point_backbone: Literal["point_mae", "point_bert", "builtin_points"] = "point_mae"
    # transformer blocks of both extractors that are used
    blocks: int = Field(default=12, ge=1, le=12)
    groups: int = Field(default=1024, ge=3)
    group_size: int = Field(default=128, ge=1)
    # `batch` normalises with the statistics of the scan at hand (the published extractor is left in training mode),
    # `eval` with the stored ones
    point_bn: Literal["batch", "eval"] = "batch"
    # the published extractor also draws stochastic depth, which makes its features random
    point_droppath: Literal["off", "on"] = "off"
    droppath_seed: int = Field(default=0, ge=0)
    # `expanded`: squared distances as |a|^2 + |b|^2 - 2ab in float32, inexact near group centres
    idw: Literal["expanded", "direct"] = "expanded"
    # no group centre within 3.2 cm of the sensor's origin
    fps_skip_origin: bool = True
    # `floor` shifts the cloud by half a target pixel against image and mask; `center` does not
    xyz_resize: Literal["floor", "center"] = "floor"
    # side of the pixel grid that features are brought to and networks work on
    grid: int = Field(default=MAP_SIZE, ge=8, le=MAP_SIZE)
    # `channel_sum`: a pixel is valid where its point channels do not sum to zero; `support`: where any is not zero
    valid_mask: Literal["channel_sum", "support"] = "channel_sum"
    # `per_metric`: AUPRO, P-AUROC and image score each scale a map by its own mean in another way; `none`: one map
    normaliser: Literal["per_metric", "none"] = "per_metric"

    epochs: int = Field(default=50, ge=1)
    batch_size: int = Field(default=1, ge=1)
    rate: float = Field(default=1e-3, gt=0)

    def trainer(self) -> TrainerConfig:
        """How the networks are trained."""
        return TrainerConfig(epochs=self.epochs, batch_size=self.batch_size, rate=self.rate)


# switches of the corrected recipe that are common to the family
CORRECTED: dict[str, Any] = {
    "rgb_norm": "model",
    "idw": "direct",
    "fps_skip_origin": False,
    "xyz_resize": "center",
    "valid_mask": "support",
    "normaliser": "none",
}
# a recipe for machines without a GPU: a grid of 56 x 56, a sixteenth of the pixels
FAST: dict[str, Any] = {"grid": 56, "epochs": 10, "batch_size": 1}

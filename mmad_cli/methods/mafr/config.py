"""Configuration of MAFR. PyTorch is not needed to read it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmad_cli.methods.mapping.config import MappingConfig

RGB_CHANNELS = 768
POINT_CHANNELS = 1152
DROPOUT = 0.1

# the terms of one modality
TERMS = ("similarity", "smoothness", "census")


class MafrConfig(MappingConfig):
    """Switches of MAFR; the defaults are those of its training script."""

    variant: Literal["rgb+3d"] = "rgb+3d"
    # the published inference program names 250 as well
    epochs: int = Field(default=100, ge=1)
    dropout: float = Field(default=DROPOUT, ge=0, lt=1)
    # `none`: background counts in the loss, as published, though the map is masked; `valid`: valid pixels only
    loss_mask: Literal["none", "valid"] = "none"
    # `first_two`: the smoothness term looks at two of the channels only, as published
    smoothness_channels: Literal["first_two", "all"] = "first_two"
    similarity_weight: float = Field(default=1.0, ge=0)
    smoothness_weight: float = Field(default=1.0, ge=0)
    census_weight: float = Field(default=1.0, ge=0)
    # side of a square window of the grid, drawn anew in each step around a valid pixel; None: all, as published
    window: int | None = Field(default=None, ge=8)
    # so many pixels go through the networks at a time and again for their gradient: half the memory for a fifth more
    # time, with the same gradients but for dropout's draws; None: all at once
    recompute_tile: int | None = Field(default=None, ge=1)

    def weights(self) -> dict[str, float]:
        """Weight of each term of the loss, the same for both modalities."""
        return {term: getattr(self, f"{term}_weight") for term in TERMS}

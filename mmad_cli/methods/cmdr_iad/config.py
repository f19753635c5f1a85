"""Configuration of CMDR-IAD. PyTorch is not needed to read it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from mmad_cli.methods.base import MAP_SIZE
from mmad_cli.methods.mapping.config import MappingConfig, TrainerConfig

# the point decoder shortens the position axis by this factor and doubles its length five times
SHORTENING = 32

NetworkName = Literal["rgb_to_points", "points_to_rgb", "rgb_decoder", "point_decoder"]

# our name of a network -> its name in the published code
PUBLISHED_NAMES: dict[NetworkName, str] = {
    "rgb_to_points": "map2Dto3D",
    "points_to_rgb": "map3Dto2D",
    "rgb_decoder": "Dec2D",
    "point_decoder": "Dec3D",
}

# our name of a network -> the features that it reads and those that it is to produce
STREAMS: dict[NetworkName, tuple[str, str]] = {
    "rgb_to_points": ("rgb", "points"),
    "points_to_rgb": ("points", "rgb"),
    "rgb_decoder": ("rgb", "rgb"),
    "point_decoder": ("points", "points"),
}

LossName = Literal["cosine", "l2"]

# box means that the reconstruction error of RGB goes through before it is joined with anything
RGB_SMOOTHING = (5, 5, 5, 7, 7)
# the one box mean of the variant for polyurethane
POLYURETHANE_SMOOTHING = (5,)

Variant = Literal["rgb+3d", "rgb", "3d", "polyurethane"]

# a chunk of a polyurethane scan: 9216 points in the order of the file
CHUNK_SIDE = 96

NETWORKS: dict[Variant, tuple[NetworkName, ...]] = {
    "rgb+3d": tuple(PUBLISHED_NAMES),
    "rgb": ("rgb_decoder",),
    "3d": ("point_decoder",),
    "polyurethane": ("point_decoder",),
}

# published settings of the variant for polyurethane where they are others
_POLYURETHANE: dict[str, Any] = {
    "grid": CHUNK_SIDE,
    "groups": 96,
    "group_size": 32,
    "batch_size": 4,
    "optimiser": "adamw",
    "weight_decay": 0.01,
}


class CmdrIadConfig(MappingConfig):
    """Switches of CMDR-IAD; the defaults are what the published code computes."""

    variant: Variant = "rgb+3d"

    # the first group centre is a random point; `fps_seed` draws it
    fps_start: Literal["first", "random"] = "random"
    fps_seed: int = Field(default=0, ge=0)
    fps_skip_origin: bool = False

    dropout: float = Field(default=0.1, ge=0, lt=1)
    # `l2` is defined in the published code but not used
    loss: LossName = "cosine"
    optimiser: Literal["adam", "adamw"] = "adam"
    weight_decay: float = Field(default=0.0, ge=0)
    # a loss that is not finite: `skip` leaves out that network's step, `stop` ends the training with an error
    non_finite: Literal["skip", "stop"] = "skip"
    # so many valid pixels of each batch, drawn anew in each step, enter the losses; None: all, as published
    pixels_per_step: int | None = Field(default=None, ge=1)

    # `code`: five 5 x 5 and three 7 x 7 means of the joined map; `figure`: three and two, as the paper's figure says
    final_smoothing: Literal["code", "figure"] = "code"
    # what the maximum of the map is divided by: the root of its mean, as the code does, or the mean of the figure
    image_score: Literal["root_mean", "mean"] = "root_mean"
    # variant rgb: errors count where there are point features (as the paper's pictures suggest), or everywhere
    rgb_mask: Literal["points", "none"] = "points"
    # variant 3d: windows of the means that the error goes through; the paper's pictures are not smoothed
    points_smoothing: tuple[int, ...] = ()
    # rgb+3d, a test sample without one modality: `drop` to the reconstruction of the other, which the run says; or
    # `error`
    missing_modality: Literal["drop", "error"] = "drop"
    # variant polyurethane: side of the grid that the points of a chunk make in the order of the file
    chunk_side: int = Field(default=CHUNK_SIDE, ge=8, le=MAP_SIZE)

    @model_validator(mode="before")
    @classmethod
    def _published_with_variant(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("variant") == "polyurethane":
            return {**_POLYURETHANE, **data}
        return data

    @model_validator(mode="after")
    def _grid_fits_the_decoder(self) -> CmdrIadConfig:
        if "point_decoder" in self.networks and self.grid**2 % SHORTENING:
            raise ValueError(f"grid: its square must be a multiple of {SHORTENING}, got {self.grid}")
        if any(window < 1 or window % 2 == 0 for window in self.points_smoothing):
            raise ValueError(f"points_smoothing: must be odd windows, got {list(self.points_smoothing)}")
        return self

    @property
    def networks(self) -> tuple[NetworkName, ...]:
        """The networks of the variant."""
        return NETWORKS[self.variant]

    def trainer(self) -> TrainerConfig:
        """How the networks are trained."""
        return TrainerConfig(
            epochs=self.epochs,
            batch_size=self.batch_size,
            rate=self.rate,
            optimiser=self.optimiser,
            weight_decay=self.weight_decay,
            non_finite=self.non_finite,
        )

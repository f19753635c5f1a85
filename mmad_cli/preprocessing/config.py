"""Parameters of the preprocessing protocols; the defaults are the published values."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PREPROCESSING_VERSION = 1
"""Raised whenever clean scans change, so that stored ones are computed again."""

Protocol = Literal["m3dm", "cfm", "none"]
Debris = Literal["components", "dbscan", "none"]

Metres = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class PreprocessConfig(BaseModel):
    """How a raw scan is cleaned. Lengths in metres, `edge` and `pad_multiple` in pixels.

    protocol: `m3dm` cleans and pads cloud, image and mask together (the released script of M3DM, arXiv 2303.00601);
    `cfm` cleans the cloud only and pads image and mask by repeating their edges (CFM, arXiv 2312.04521); `none`
    leaves everything as it is on disk.
    rgb_background: `zero` blackens the image wherever a point was removed (default of m3dm), `keep` does not (its
    release before 2023-09-08, and always with cfm and none).
    debris: `components` keeps the largest cluster of DBSCAN, found on a grid; `dbscan` does the same with Open3D as the
    published codes do, which takes a hundred times longer; `none` keeps everything.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    protocol: Protocol = "m3dm"
    rgb_background: Literal["zero", "keep"] = "zero"
    debris: Debris = "components"
    plane_distance: Metres = 0.004
    plane_samples: Annotated[int, Field(ge=3)] = 50
    plane_iterations: Count = 1000
    plane_removal: Metres = 0.005
    edge: Count = 10
    pad_multiple: Count = 100
    cluster_eps: Metres = 0.006
    cluster_min_points: Count = 30
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    @model_validator(mode="before")
    @classmethod
    def _background_of_protocol(cls, values: Any) -> Any:
        if isinstance(values, dict) and "rgb_background" not in values and values.get("protocol") in ("cfm", "none"):
            return {**values, "rgb_background": "keep"}
        return values

    @model_validator(mode="after")
    def _known_combination(self) -> PreprocessConfig:
        if self.protocol != "m3dm" and self.rgb_background == "zero":
            raise ValueError(f"rgb_background: should be 'keep' with protocol {self.protocol!r}, got 'zero'")
        return self

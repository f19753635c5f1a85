"""How the built-in backbones are trained; the values that made the shipped weights are in `rgb.json`, `points.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmad_cli.errors import UsageError

Network = Literal["rgb", "points"]

HERE = Path(__file__).parent


class TrainingConfig(BaseModel):
    """What both trainings have in common.

    AdamW; the rate rises linearly over `warmup` steps, falls as a half cosine that would reach 0 after `horizon`
    steps, and over the last `cooldown` of `steps` is brought to 0 in a straight line besides.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = Field(default=0, ge=0)
    steps: int = Field(default=1500, ge=1)
    horizon: int = Field(default=1500, ge=1)
    cooldown: int = Field(default=1, ge=1)
    rate: float = Field(default=2e-3, gt=0)
    warmup: int = Field(default=50, ge=1)
    weight_decay: float = Field(default=0.02, ge=0)
    # threads of torch; with another number losses agree to rounding only, which grows with the steps
    threads: int = Field(default=1, ge=1)
    # of the cosines in the loss
    temperature: float = Field(default=0.1, gt=0)


class RgbConfig(TrainingConfig):
    """Training of the RGB network: `crops` views per step, drawn from the `pool` newest canvases."""

    canvas: int = Field(default=176, ge=64)
    fresh: int = Field(default=5, ge=1)
    pool: int = Field(default=16, ge=1)
    crop: int = Field(default=112, ge=32, multiple_of=16)
    crops: int = Field(default=32, ge=2)
    # tokens per crop that the loss looks at, and altered ones in all
    anchors: int = Field(default=48, ge=1)
    altered: int = Field(default=768, ge=1)
    # share of altered pixels from which a token counts as altered
    cover: float = Field(default=0.3, gt=0, le=1)


class PointsConfig(TrainingConfig):
    """Training of the point network: `patches` surfaces per step, three scans of each."""

    rate: float = Field(default=1.5e-3, gt=0)
    patches: int = Field(default=4, ge=2)
    groups: int = Field(default=160, ge=32)
    group_size: int = Field(default=128, ge=8)
    altered: int = Field(default=512, ge=1)


CONFIGS: dict[Network, type[TrainingConfig]] = {"rgb": RgbConfig, "points": PointsConfig}


def committed(network: Network) -> TrainingConfig:
    """The configuration that the shipped weights were trained with."""
    return read_config(network, HERE / f"{network}.json")


def read_config(network: Network, path: Path) -> TrainingConfig:
    """A configuration from a JSON file. UsageError names the file and the field that is wrong."""
    try:
        return CONFIGS[network].model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path}: cannot be read ({error.strerror or error})") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        raise UsageError(f"--config {path}: {where}: {first['msg']}, got {first.get('input')!r}") from error

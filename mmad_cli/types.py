"""Types that every room shares: what a sample is, before and after cleaning.

Arrays follow the terms of the documentation: `xyz` is an organised point cloud in metres whose invalid pixels are
exactly (0, 0, 0); `mask` is true on defect pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]
ByteArray = NDArray[np.uint8]
IndexArray = NDArray[np.int64]

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

GOOD = "good"


@dataclass(frozen=True)
class SampleRef:
    """One scan on disk, not read yet.

    `id` is `<split>/<defect>/<stem>` and unique within its category. `files` maps a role (`rgb`, `xyz`, `gt`, ...)
    to an absolute path; `gt` may be absent for good samples. `part` tells, in plain values, which part of its files the
    sample is where they hold several samples; it is empty where they hold one. `missing` names the modalities that this
    one scan lacks though its dataset has them: `rgb`, `3d`.
    """

    category: str
    split: Split
    defect: str
    stem: str
    files: Mapping[str, Path] = field(default_factory=dict)
    part: Mapping[str, Any] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """`<split>/<defect>/<stem>`."""
        return f"{self.split}/{self.defect}/{self.stem}"

    @property
    def label(self) -> int:
        """0 for a good sample, 1 for a defective one."""
        return int(self.defect != GOOD)


@dataclass(frozen=True)
class Sample:
    """One scan in memory, raw or cleaned.

    rgb uint8 (H, W, 3); xyz float32 (H', W', 3) in metres; mask bool (H, W). All three have one size, except after
    the `cfm` protocol on scans whose sides are no multiple of 100, where the cloud is padded further than the image.

    A dataset that knows the background of its raw scans gives it as `background`, bool of the cloud's size, and no
    table is searched for. Where `info` has a `background_value`, removed points are set to it instead of (0, 0, 0); it
    has a coordinate of 0, which makes the pixel invalid.
    """

    category: str
    split: Split
    defect: str
    stem: str
    rgb: ByteArray
    xyz: FloatArray
    mask: BoolArray
    info: Mapping[str, Any] = field(default_factory=dict)
    background: BoolArray | None = None

    @property
    def id(self) -> str:
        """`<split>/<defect>/<stem>`."""
        return f"{self.split}/{self.defect}/{self.stem}"

    @property
    def label(self) -> int:
        """0 for a good sample, 1 for a defective one."""
        return int(self.defect != GOOD)

"""What a pseudo anomaly is made of: every setting that changes it, so that it can enter a store key."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

PSEUDO_VERSION = 1
"""Raised whenever the same settings give another scan, so that stored features are computed again."""

# Classes of MVTec 3D-AD whose parts lie in one direction, in the released code of G2SF
ALIGNED_CATEGORIES = ("dowel", "tire", "foam", "rope", "cable_gland")

Probability = Annotated[float, Field(ge=0, le=1)]


class Augmentation(BaseModel):
    """Pseudo anomaly number `index` of a training sample.

    pose: how a good scan is moved before it is damaged. `published`: `narrow` for the classes of MVTec 3D-AD whose
    parts lie in one direction, else `wide`; `none`: not at all.
    geometry: `resample` moves pixels only, the points under them keep their coordinates (published); `consistent`
    moves the points likewise.
    donors: whose surface is pasted. `dataset`: a training scan from a pool of `donors_per_category` of every category
    (published); `category`: of the same category; `self`: the scan itself, moved.
    threshold: of the noise that makes the regions.
    bump_probability, hole_probability: share of smooth bumps and dents, and of deleted points; the rest are pasted
    surfaces.
    limit: at most so many pseudo anomalies per category: those with index * training samples + position < limit. It
    changes none of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    index: int = Field(default=0, ge=0)
    seed: int = Field(default=0, ge=0, lt=2**32)
    pose: Literal["published", "narrow", "wide", "none"] = "published"
    geometry: Literal["resample", "consistent"] = "resample"
    donors: Literal["dataset", "category", "self"] = "dataset"
    donors_per_category: int = Field(default=8, ge=1)
    threshold: float = Field(default=0.4, gt=0, lt=1)
    bump_probability: Probability = 0.0
    hole_probability: Probability = 0.0
    limit: int | None = Field(default=None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _none_as_a_word(cls, data: Any) -> Any:
        """`--set pose=none` reads as no value."""
        return {**data, "pose": "none"} if isinstance(data, dict) and data.get("pose", "") is None else data

    @model_validator(mode="after")
    def _shares(self) -> Augmentation:
        if self.bump_probability + self.hole_probability > 1:
            raise ValueError(
                "bump_probability, hole_probability: must not exceed 1 together, got "
                f"{self.bump_probability} and {self.hole_probability}"
            )
        return self

    def canonical(self) -> dict[str, Any]:
        """JSON-able form of what changes a value."""
        return self.model_dump(mode="json", exclude={"limit"})

    def wanted(self, position: int, count: int) -> bool:
        """Whether the training sample at `position` of `count` gets this pseudo anomaly."""
        return self.limit is None or self.index * count + position < self.limit


def stream(augmentation: Augmentation, category: str, sample_id: str, purpose: str = "") -> np.random.Generator:
    """The random numbers of one pseudo anomaly: the same whatever was made before it, and for every backbone."""
    digest = hashlib.blake2b(f"{category}/{sample_id}/{purpose}".encode(), digest_size=8).digest()
    return np.random.default_rng([augmentation.seed, augmentation.index, int.from_bytes(digest, "big")])

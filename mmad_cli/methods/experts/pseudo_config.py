"""Switches of pseudo anomalies, for the methods that learn from them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mmad_cli.methods.base import MethodConfig
from mmad_cli.pseudo.config import Augmentation

Share = Annotated[float, Field(ge=0, le=1)]


class PseudoConfig(MethodConfig):
    """How pseudo anomalies are made of training samples; the defaults are what the released code of G2SF computes."""

    # pseudo anomalies in all, and at most of each training sample; 800 in all are published
    pseudo_samples: int = Field(default=800, ge=1)
    pseudo_per_sample: int = Field(default=4, ge=1)
    pseudo_seed: int = Field(default=0, ge=0)
    pose: Literal["published", "narrow", "wide", "none"] = "published"
    # `resample`: moving a scan leaves the coordinates of its points as they are; `consistent` moves them too
    geometry: Literal["resample", "consistent"] = "resample"
    donors: Literal["dataset", "category", "self"] = "dataset"
    donors_per_category: int = Field(default=8, ge=1)
    threshold: float = Field(default=0.4, gt=0, lt=1)
    bump_probability: Share = 0.0
    hole_probability: Share = 0.0

    @property
    def augmentations(self) -> list[Augmentation]:
        """The pseudo anomalies of a training sample."""
        return [
            Augmentation(
                index=index,
                seed=self.pseudo_seed,
                pose=self.pose,
                geometry=self.geometry,
                donors=self.donors,
                donors_per_category=self.donors_per_category,
                threshold=self.threshold,
                bump_probability=self.bump_probability,
                hole_probability=self.hole_probability,
                limit=self.pseudo_samples,
            )
            for index in range(self.pseudo_per_sample)
        ]

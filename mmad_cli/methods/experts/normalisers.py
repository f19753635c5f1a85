"""Bringing the scores of several experts to one scale, from scores of good samples that are in no bank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mmad_cli.types import FloatArray

Kind = Literal["quantile", "mean", "zscore", "none"]
NORMALISERS: tuple[Kind, ...] = ("quantile", "mean", "zscore", "none")

QUANTILE = 0.995


@dataclass(frozen=True)
class Normaliser:
    """u = (s - offset) / scale."""

    offset: float = 0.0
    scale: float = 1.0

    def __call__(self, scores: NDArray[np.floating]) -> FloatArray:
        """Scores of any shape on the common scale, float32."""
        return np.asarray((scores - self.offset) / self.scale, dtype=np.float32)


def fit_normaliser(scores: NDArray[np.floating], kind: Kind = "quantile", quantile: float = QUANTILE) -> Normaliser:
    """The scale of an expert from its scores (n,) on foreground patches of validation samples, in any unit.

    `quantile`: divided by that quantile, so that 1 is the expert's own false-alarm level of 0.5 % by default; `mean`:
    by the mean (G2SF, arXiv 2503.10091); `zscore`: mean 0 and deviation 1; `none`: as they are. Never give it scores
    of training patches, which are 0 in the bank, nor of test samples.

    Raises ValueError for an unknown kind, a quantile outside (0, 1], no scores or scores that are not finite. Scores
    that are all equal get a scale of 1 where their own would be 0.
    """
    values = np.asarray(scores, dtype=np.float64).ravel()
    if kind not in NORMALISERS:
        raise ValueError(f"kind: must be one of {list(NORMALISERS)}, got {kind!r}")
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile: must be in (0, 1], got {quantile}")
    if kind == "none":
        return Normaliser()
    if not values.size or not np.isfinite(values).all():
        raise ValueError(f"scores: must hold finite values, got {values.size} of which some are not finite or none")
    if kind == "zscore":
        return Normaliser(float(values.mean()), _above_zero(float(values.std())))
    return Normaliser(0.0, _above_zero(float(np.quantile(values, quantile) if kind == "quantile" else values.mean())))


def _above_zero(scale: float) -> float:
    return scale if scale > 0 else 1.0

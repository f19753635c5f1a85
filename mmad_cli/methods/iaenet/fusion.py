"""Fusions without a network, which an importance-aware one has to beat, on the same scores of the experts.

Scores are float (K, P): of K experts for the P cells of a scan, 0 in the background.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmad_cli.types import BoolArray, FloatArray

Scores = NDArray[np.floating[Any]]
Rule = Literal["mean", "max", "product"]
RULES: tuple[Rule, ...] = ("mean", "max", "product")

TOP_SHARE = 0.001


def joined(scores: Scores, rule: Rule) -> FloatArray:
    """Mean, largest value or product of the experts in each cell: (K, P) to float32 (P,).

    Raises ValueError for another rule or shape.
    """
    _check(scores)
    if rule == "mean":
        return np.asarray(scores.mean(axis=0), dtype=np.float32)
    if rule == "max":
        return np.asarray(scores.max(axis=0), dtype=np.float32)
    if rule == "product":
        return np.asarray(scores.prod(axis=0), dtype=np.float32)
    raise ValueError(f"rule: must be one of {list(RULES)}, got {rule!r}")


def image_score(scores: Scores, front: BoolArray, form: Literal["max", "top"] = "max") -> float:
    """Image score from the scores (P,) of the foreground cells, bool (P,): the largest, or the mean of the highest
    0.1 % of them and at least one. Of all cells where there is no foreground.
    """
    chosen = np.asarray(scores)[front] if front.any() else np.asarray(scores)
    if form == "max":
        return float(chosen.max())
    count = max(1, round(TOP_SHARE * len(chosen)))
    return float(np.partition(chosen, len(chosen) - count)[-count:].mean(dtype=np.float64))


def image_product(scores: Scores, front: BoolArray, form: Literal["max", "top"] = "max") -> float:
    """Product of the experts' own image scores (Shape-Guided, as its code joins them)."""
    _check(scores)
    return float(np.prod([image_score(one, front, form) for one in scores]))


@dataclass(frozen=True)
class Alignment:
    """An affine map of each expert's scores: scale (K,), offset (K,)."""

    scale: tuple[float, ...]
    offset: tuple[float, ...]

    def __call__(self, scores: Scores) -> FloatArray:
        """Largest aligned score of each cell, float32 (P,), not below 0; 0 where no expert says anything."""
        _check(scores)
        scale, offset = (np.asarray(values, dtype=np.float64)[:, None] for values in (self.scale, self.offset))
        aligned = np.where(scores.any(axis=0), (scores * scale + offset).max(axis=0), 0.0)
        return np.asarray(np.maximum(aligned, 0.0), dtype=np.float32)


def fit_alignment(scores: Sequence[Scores], reference: int) -> Alignment:
    """Affine maps that bring mean - 3 std and mean + 3 std of each expert's scores to those of one of them.

    scores: of good patches that are in no bank, (n,) of each expert; zeros are left out. An expert whose scores do not
    vary is moved only. Source: the alignment of Shape-Guided (ICML 2023), as its code does it, there on scores of
    training scans. Raises ValueError for an expert without scores and a reference that is none.
    """
    if not 0 <= reference < len(scores):
        raise ValueError(f"reference: must be an expert's number below {len(scores)}, got {reference}")
    moments = []
    for number, one in enumerate(scores):
        values = np.asarray(one, dtype=np.float64).ravel()
        values = values[values != 0]
        if not len(values):
            raise ValueError(f"scores: expert {number} has none that is not 0")
        moments.append((float(values.mean()), float(values.std())))
    mean, deviation = moments[reference]
    scale = tuple(deviation / std if std > 0 and deviation > 0 else 1.0 for _, std in moments)
    return Alignment(scale, tuple(mean - a * m for a, (m, _) in zip(scale, moments, strict=True)))


def _check(scores: Scores) -> None:
    if scores.ndim != 2 or not len(scores):
        raise ValueError(f"scores: must have shape (experts, cells), got {scores.shape}")

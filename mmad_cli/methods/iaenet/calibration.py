"""Scores of the experts on good patches, by which they are brought to one scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmad_cli.errors import DataError
from mmad_cli.methods.experts import Normaliser, Scan
from mmad_cli.types import FloatArray


@dataclass(frozen=True)
class Calibration:
    """Scores of the experts on good patches that are in no bank: (n, K) of each scan."""

    scores: tuple[FloatArray, ...]

    @classmethod
    def of(cls, scans: Sequence[Scan]) -> Calibration:
        """From good scans, and the undamaged patches of pseudo anomalies. Raises DataError without a patch."""
        parts = []
        for scan in scans:
            good = scan.front if scan.label is None else scan.front & ~scan.label
            if good.any():
                parts.append(np.ascontiguousarray(scan.scores[:, good].T))
        if not parts:
            raise DataError(
                "there is no validation sample with a foreground to compare the scores of the experts on; add some "
                "to validation/good, or take undamaged patches of pseudo anomalies with --set normaliser_on=pseudo"
            )
        return cls(tuple(parts))

    @property
    def patches(self) -> FloatArray:
        """Of all scans, (N, K)."""
        return np.concatenate(self.scores)

    @property
    def largest(self) -> FloatArray:
        """Of each scan, (n, K)."""
        return np.stack([one.max(axis=0) for one in self.scores])


def normalised(scores: FloatArray, normalisers: Sequence[Normaliser]) -> FloatArray:
    """Scores (K, P) of the experts on one scale, not below 0; cells that no expert scored stay 0."""
    scaled = np.stack([normaliser(one) for normaliser, one in zip(normalisers, scores, strict=True)])
    return np.asarray(np.where(scores.any(axis=0), np.maximum(scaled, 0), 0), dtype=np.float32)

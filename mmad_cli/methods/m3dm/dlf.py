"""Decision layer fusion (DLF): the banks' scores and maps joined by two linear one-class machines."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmad_cli.types import FloatArray

Coefficients = NDArray[np.float64]


@dataclass(frozen=True)
class DecisionFusion:
    """Coefficients per bank, float64 (k,), for image scores and for maps; columns in the order of the banks."""

    image: Coefficients
    pixel: Coefficients

    def image_score(self, row: NDArray[np.floating[Any]]) -> float:
        """Joined image score of weighted scores (k,): the inner product."""
        return float(np.asarray(row, dtype=np.float32).astype(np.float64) @ self.image)

    def anomaly_map(self, maps: Sequence[FloatArray]) -> FloatArray:
        """Joined map float32 (H, W) of k weighted maps (H, W)."""
        joined = np.zeros(maps[0].shape, dtype=np.float64)
        for coefficient, one in zip(self.pixel, maps, strict=True):
            joined += coefficient * one
        return joined.astype(np.float32)


def one_class_coefficients(
    rows: NDArray[np.floating[Any]], nu: float = 0.5, max_iter: int = 1000, random_state: int = 42, what: str = "scores"
) -> Coefficients:
    """Coefficients float64 (k,) of a linear one-class machine fitted by stochastic gradients to rows (n, k).

    Only their inner product with a row is used afterwards; intercept and offset play no part. A one-class machine
    gives higher values to what is more normal, but the rows are anomaly distances and the coefficients come out
    positive, so that larger means more anomalous. Warns when one does not, as the order may then be reversed.
    Raises ValueError for an empty or misshapen table. Source: M3DM (arXiv 2303.00601), section 3.4, and its code:
    scikit-learn's SGDOneClassSVM.
    """
    from sklearn.linear_model import SGDOneClassSVM

    if rows.ndim != 2 or rows.size == 0:
        raise ValueError(f"rows: must be a non-empty (n, k) table, got shape {rows.shape}")
    machine = SGDOneClassSVM(nu=nu, max_iter=max_iter, random_state=random_state)
    # double precision, as the published code ends up with: single precision differs from machine to machine
    machine.fit(np.asarray(rows, dtype=np.float64))
    coefficients = np.asarray(machine.coef_, dtype=np.float64).ravel()
    if (coefficients < 0).any():
        values = ", ".join(f"{value:.3g}" for value in coefficients)
        warnings.warn(
            f"decision fusion of {what} learned a negative weight ({values}): larger joined scores may mean less "
            "anomalous",
            stacklevel=2,
        )
    return coefficients

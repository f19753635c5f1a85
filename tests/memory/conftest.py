from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

GOLDEN = Path(__file__).parents[1] / "golden" / "memory.npz"


@pytest.fixture(scope="session")
def golden() -> dict[str, dict[str, Any]]:
    """Arrays of the public implementations, by case: coreset_a to _d, scoring_rgb, scoring_xyz."""
    cases: dict[str, dict[str, Any]] = {}
    with np.load(GOLDEN) as file:
        for name in file.files:
            case, key = name.split("/")
            cases.setdefault(case, {})[key] = file[name]
    return cases


@pytest.fixture(scope="session")
def clustered():
    """Rows that look like projected features: clusters on few directions, plus noise of varying size."""

    def make(n: int, channels: int, seed: int = 0, rank: int = 24) -> np.ndarray:
        rng = np.random.default_rng(seed)
        weights = rng.standard_normal((rank, channels)) * (np.arange(1, rank + 1) ** -0.5)[:, None]
        centres = 2 * rng.standard_normal((30, rank))
        rows = (centres[rng.integers(0, 30, n)] + rng.standard_normal((n, rank))) @ weights
        return (rows + 0.25 * rng.standard_normal((n, channels)) * rng.gamma(2, 0.5, (n, 1))).astype(np.float32)

    return make

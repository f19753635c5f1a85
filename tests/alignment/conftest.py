from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).parents[1] / "golden"


@functools.cache
def _golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "point_vit.npz") as arrays:
        wanted = [name for name in arrays.files if not name.startswith(("vit/", "checkpoint/"))]
        return {name: arrays[name] for name in wanted}


@functools.cache
def _cloud() -> tuple[np.ndarray, np.ndarray]:
    with np.load(GOLDEN / "inputs.npz") as arrays:
        points = arrays["xyz"][0].reshape(-1, 3)
    pixel = np.flatnonzero((points != 0).all(axis=1))
    return points[pixel], pixel


@pytest.fixture
def golden() -> dict[str, np.ndarray]:
    return _golden()


@pytest.fixture
def cloud() -> np.ndarray:
    """Valid points of the first golden sample in raster order."""
    return _cloud()[0]


@pytest.fixture
def pixel() -> np.ndarray:
    return _cloud()[1]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)

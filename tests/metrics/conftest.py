"""Golden arrays, and cases that several tests use."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).parents[1] / "golden"
BASE_SEED = 20417
GAIN = {"continuous": 0.15, "ties": 0.25, "separable": 1.2, "zero_background": 0.3, "large": 0.4}


@pytest.fixture(scope="session")
def golden_m3dm() -> Mapping[str, np.ndarray]:
    """Maps, masks and values of the M3DM and BTF code (100 and 300 thresholds)."""
    with np.load(GOLDEN / "metrics_m3dm.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def golden_mapping() -> Mapping[str, np.ndarray]:
    """Values of the CFM, MAFR and CMDR-IAD code (99 and 300 thresholds) for the cases of `mapping_case`."""
    with np.load(GOLDEN / "metrics_feature_mapping.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def mapping_case() -> Callable[[str], tuple[np.ndarray, np.ndarray]]:
    """Masks and maps that belong to the golden values of `golden_mapping`, bit for bit."""
    return _mapping_case


@pytest.fixture
def random_case() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Random blocky masks bool (N, H, W) and maps float32; `levels` makes ties."""
    return _random_case


def _random_case(seed: int, count: int = 5, size: int = 16, levels: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, size, size), dtype=bool)
    for mask in masks[1:]:
        for _ in range(rng.integers(1, 4)):
            top, left = rng.integers(0, size - 2, 2)
            height, width = rng.integers(1, 5, 2)
            mask[top : top + height, left : left + width] = True
    maps = rng.normal(size=masks.shape) + 1.2 * masks
    if levels:
        maps = np.round(maps * levels) / levels
    return masks, maps.astype(np.float32)


def _mapping_case(case: str) -> tuple[np.ndarray, np.ndarray]:
    # Uniform draws and exact float64 arithmetic only, in a fixed order, so that every platform makes the same bits
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(f"metric/{BASE_SEED}/{case}".encode())))
    side, count, first_defective = (224, 3, 1) if case == "large" else (64, 6, 2)
    images = [_mapping_image(rng, case, side, index, index >= first_defective) for index in range(count)]
    masks, maps = zip(*images, strict=True)
    return np.stack(masks), np.stack(maps)


def _mapping_image(
    rng: np.random.Generator, case: str, side: int, index: int, defective: bool
) -> tuple[np.ndarray, np.ndarray]:
    mask = np.zeros((side, side), dtype=bool)
    if defective:
        rows, columns = np.arange(side)[:, None], np.arange(side)[None, :]
        for _ in range(1 + index % 3):
            row, column = rng.random(2) * side * 0.7 + side * 0.15
            radius = side * (0.03 + 0.09 * rng.random())
            if rng.random() < 0.5:
                distance = (rows - row) * (rows - row) + (columns - column) * (columns - column)
                mask |= distance <= radius * radius
            else:
                mask |= (abs(rows - row) <= radius) & (abs(columns - column) <= 0.6 * radius)
        # Two squares that touch at a corner, which only 8-connectivity joins, and a region of one pixel
        corner = 4 + index
        mask[corner : corner + 3, corner : corner + 3] = True
        mask[corner + 3 : corner + 6, corner + 3 : corner + 6] = True
        mask[side - 2, side - 2 - index] = True
    smooth = _enlarged(rng.random((7, 7)), side)
    scores = 0.7 * smooth + 0.3 * rng.random((side, side)) + GAIN[case] * mask
    if case == "ties":
        scores = np.floor(scores * 12.0) / 12.0
    if case == "zero_background":
        scores = np.where(smooth < 0.5, 0.0, scores)
    return mask, scores.astype(np.float32)


def _enlarged(coarse: np.ndarray, side: int) -> np.ndarray:
    """Bilinear, half-pixel centres, edges clamped."""
    size = len(coarse)
    place = np.clip((np.arange(side) + 0.5) * size / side - 0.5, 0.0, size - 1.0)
    low = np.minimum(np.floor(place).astype(int), size - 2)
    weight = place - low
    down, right = weight[:, None], weight[None, :]
    upper = (1.0 - right) * coarse[np.ix_(low, low)] + right * coarse[np.ix_(low, low + 1)]
    lower = (1.0 - right) * coarse[np.ix_(low + 1, low)] + right * coarse[np.ix_(low + 1, low + 1)]
    return (1.0 - down) * upper + down * lower

"""Patch rows of one sample: points on 56 x 56, RGB tokens on their own grid, and the two fused."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from mmad_cli.alignment.interpolation import pooled_operator
from mmad_cli.alignment.pooling import adaptive_average
from mmad_cli.errors import DataError
from mmad_cli.methods.base import MAP_SIZE, SampleFeatures
from mmad_cli.methods.single_bank import read_array
from mmad_cli.types import FloatArray, IndexArray

POINT_GRID = 56
POINT_PATCHES = POINT_GRID * POINT_GRID


def point_patches(sample: SampleFeatures) -> FloatArray:
    """Point patches float32 (3136, C_pt) of the 56 x 56 grid; exactly zero where there are no points.

    Raises DataError naming the sample without point features or points. Source: M3DM (arXiv 2303.00601), section
    3.2, in the linear form of `pooled_operator`.
    """
    tokens = read_array(sample, "points", "tokens")
    pixel, neighbours, weights = (read_array(sample, "points", name) for name in ("pixel", "neighbours", "weights"))
    if len(pixel) == 0:
        raise DataError(f"{sample.id}: no valid 3D points, so there are no point features; check its xyz file")
    operator = pooled_operator(neighbours, weights, pixel, len(tokens), grid=POINT_GRID, size=MAP_SIZE)
    return np.asarray(operator @ np.asarray(tokens, dtype=np.float32), dtype=np.float32)


def rgb_patches(sample: SampleFeatures) -> tuple[FloatArray, int]:
    """RGB patches float32 (grid * grid, C_rgb), row-major, and the side of their grid (28 for ViT-B/8 at 224 pixels).

    Raises DataError naming the sample without RGB features, with a grid that is not square, or with another number
    of tokens than its grid has cells.
    """
    tokens = np.asarray(read_array(sample, "rgb", "tokens"), dtype=np.float32)
    height, width = (int(side) for side in read_array(sample, "rgb", "grid"))
    if height != width or height * width != len(tokens):
        raise DataError(
            f"{sample.id}: {len(tokens)} RGB tokens on a grid of {height} x {width}; this method needs a square grid "
            "with one token per cell"
        )
    return tokens, height


def on_point_grid(tokens: FloatArray, grid: int) -> tuple[FloatArray, IndexArray]:
    """RGB patches brought to 56 x 56 by adaptive averaging: distinct patches (m, C), and the one of each position.

    Position i averages cells floor(i grid / 56) to ceil((i + 1) grid / 56) - 1 along each axis. For a grid that
    divides 56 that is one cell, so cells are repeated: patch (y, x) is cell (y // 2, x // 2) of 28 x 28.
    """
    if POINT_GRID % grid == 0:
        return tokens, repeated_cells(grid)
    averaged = adaptive_average(tokens.T.reshape(-1, grid, grid), POINT_GRID)
    return np.ascontiguousarray(averaged.reshape(-1, POINT_PATCHES).T), np.arange(POINT_PATCHES)


@lru_cache(maxsize=8)
def repeated_cells(grid: int) -> IndexArray:
    """Cell of a grid that lies under each position of 56 x 56, int64 (3136,); read-only. 56 must be a multiple."""
    position = np.arange(POINT_GRID) * grid // POINT_GRID
    cells: IndexArray = (grid * position[:, None] + position[None, :]).ravel()
    cells.setflags(write=False)
    return cells


@lru_cache(maxsize=8)
def scrambled_cells(count: int) -> IndexArray:
    """RGB patch that the published code saves beside each point patch for training, int64 (3136,); read-only.

    It tiles the `count` patches (a divisor of 3136) and permutes them: position p gets patch
    (r (p mod count) + floor(p / count)) mod count with r = 3136 / count. Of 784, 8 positions are right.
    """
    if POINT_PATCHES % count:
        raise ValueError(f"count: must divide {POINT_PATCHES}, got {count}")
    position = np.arange(POINT_PATCHES)
    cells: IndexArray = (POINT_PATCHES // count * (position % count) + position // count) % count
    cells.setflags(write=False)
    return cells

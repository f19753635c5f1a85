"""Procedural surfaces, alterations of them, and scans of both as a structured-light scanner would give them.

Lengths are in millimetres until a scan is in metres. Everything is drawn from the generator that is handed in. The
parts of the synthetic dataset are not used here: it is there to test with.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmad_cli.pretraining.images import shape_distance, spectral

Plane = NDArray[np.float32]
Points = NDArray[np.float32]

# a surface is a height map of SIDE x SIDE nodes, CELL mm apart
SIDE = 170
CELL = 0.3
EXTENT = SIDE * CELL
DISTANCE = 650.0


@dataclass(frozen=True)
class Surface:
    """Heights (SIDE, SIDE) in mm over the plane; true in `there` (SIDE, SIDE) where there is a part."""

    heights: Plane
    there: NDArray[np.bool_]


@dataclass(frozen=True)
class Scan:
    """Points float32 (n, 3) in metres in the camera frame, and where they lie on the surface's grid, (n, 2) nodes."""

    points: Points
    nodes: Points


def surface(rng: np.random.Generator) -> Surface:
    """A random surface: a bent ground with steps, bosses, pits, ribs, cells and roughness upon it."""
    rows, columns = _nodes()
    heights = _bent(rng, rows, columns)
    for _ in range(int(rng.integers(0, 5))):
        heights = heights + _boss(rng, rows, columns)
    if rng.random() < 0.35:
        heights = heights + _ribs(rng, rows, columns)
    if rng.random() < 0.25:
        heights = heights + _cells(rng, rows, columns)
    if rng.random() < 0.7:
        heights = heights + _log(rng, 0.03, 1.5) * _lumps(rng, _log(rng, 1.5, 15))
    if rng.random() < 0.4:
        heights = heights + _log(rng, 0.01, 0.15) * spectral(rng, SIDE, rng.uniform(0.3, 1.2))
    there = np.ones((SIDE, SIDE), dtype=np.bool_)
    if rng.random() < 0.55:
        middle = rng.uniform(0.25, 0.75, 2) * EXTENT
        radius = rng.uniform(0.35, 0.8) * EXTENT
        there = shape_distance(rng, rows - middle[0], columns - middle[1], radius) < 0
        if there.mean() < 0.3:
            there = np.ones_like(there)
        elif rng.random() < 0.5:
            # falling off towards the outline
            reach = rng.uniform(1, 6)
            from scipy import ndimage

            inner = np.minimum(ndimage.distance_transform_edt(there) * CELL, reach) / reach
            heights = heights - rng.uniform(1, 6) * (1 - np.sqrt(np.maximum(1 - (1 - inner) ** 2, 0)))
    return Surface(np.asarray(heights, dtype=np.float32), there)


def altered(rng: np.random.Generator, sound: Surface, window: float) -> tuple[Surface, Plane]:
    """The surface altered in places, and how much its form changed at each node, mm (SIDE, SIDE).

    A few alterations lie inside the middle `window` mm: smooth swellings and hollows, troughs, steps, roughened and
    levelled places. The change of form is the deviation of the displacement within 2 mm, so that ground that is moved
    as a whole does not count.
    """
    rows, columns = _nodes()
    heights = sound.heights.astype(np.float32)
    for _ in range(int(rng.integers(4, 10))):
        middle = EXTENT / 2 + rng.uniform(-0.5, 0.5, 2) * window
        heights = heights + _alteration(rng, heights, rows - middle[0], columns - middle[1])
    moved = heights - sound.heights
    return Surface(heights, sound.there), _local_deviation(moved, 2.0)


def scan(rng: np.random.Generator, what: Surface, pitch: float, window: float, tilt: NDArray[np.float64]) -> Scan:
    """A scan of the middle `window` mm with pixels `pitch` mm apart.

    The surface is tilted by `tilt`, a rotation vector (2,) in radians about x and y, and turned at random about the
    line of sight. There is noise of depth of a random level, partly shared by neighbours; points are missing at
    random, in patches, at grazing angles and beyond steps.
    """
    from scipy import ndimage

    turn = rng.uniform(0, 2 * np.pi)
    count = int(window / pitch)
    ticks = (np.arange(count) - count / 2 + rng.uniform(0, 1)) * pitch
    across, down = (plane.ravel() for plane in np.meshgrid(ticks, ticks))
    # a tilted surface is seen foreshortened: a pixel of the camera covers more of it along the slope
    slope = np.tan(tilt)
    x = np.cos(turn) * across - np.sin(turn) * down
    y = np.sin(turn) * across + np.cos(turn) * down
    x, y = x / np.cos(tilt[0]), y / np.cos(tilt[1])
    nodes = np.stack([y, x]) / CELL + SIDE / 2
    kept = ((nodes >= 1) & (nodes <= SIDE - 2)).all(axis=0)
    z = ndimage.map_coordinates(what.heights, nodes, order=1, mode="nearest")
    down_slope, right_slope = np.gradient(what.heights, CELL)
    steep_y = ndimage.map_coordinates(down_slope, nodes, order=1, mode="nearest") + slope[1]
    steep_x = ndimage.map_coordinates(right_slope, nodes, order=1, mode="nearest") + slope[0]
    facing = 1 / np.sqrt(steep_x**2 + steep_y**2 + 1)
    kept &= ndimage.map_coordinates(what.there.astype(np.float32), nodes, order=1, mode="nearest") > 0.5
    kept &= facing > rng.uniform(0.12, 0.3)
    kept &= _missing(rng, count)
    # beyond a step the projector does not reach: where the slope away from it is steep
    kept &= steep_x * rng.choice([-1, 1]) < rng.uniform(1.5, 4)
    white = rng.standard_normal((2, count, count))
    shared = ndimage.gaussian_filter(white[1], 0.8) * 2.4
    level = _log(rng, 0.008, 0.1)
    noise = level * (0.6 + 0.4 / np.maximum(facing, 0.2)) * (0.6 * white[0] + 0.8 * shared).ravel()
    depth = DISTANCE - (z + slope[0] * x + slope[1] * y) + noise
    # image axes to camera axes: the in-plane turn is taken back, so that points lie on the pixel grid
    points = np.stack([across, down, depth], axis=1)[kept] * 1e-3
    points[:, :2] *= points[:, 2:] * 1e3 / DISTANCE
    return Scan(points.astype(np.float32), nodes.T[kept].astype(np.float32))


def read(plane: Plane, nodes: Points) -> Plane:
    """Values of a plane (SIDE, SIDE) at places (n, 2) on its grid."""
    from scipy import ndimage

    return np.asarray(ndimage.map_coordinates(plane, nodes.T, order=1, mode="nearest"), dtype=np.float32)


def _nodes() -> tuple[Plane, Plane]:
    rows, columns = np.mgrid[:SIDE, :SIDE].astype(np.float32) * np.float32(CELL)
    return rows, columns


def _log(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _lumps(rng: np.random.Generator, width: float) -> Plane:
    """Smooth noise of unit deviation whose features are about `width` mm wide."""
    from scipy import ndimage

    cells = max(int(EXTENT / width * 1.5) + 3, 4)
    field = ndimage.zoom(rng.standard_normal((cells, cells)), SIDE / cells, order=3)[:SIDE, :SIDE]
    return np.asarray(field / max(float(field.std()), 1e-9), dtype=np.float32)


def _bent(rng: np.random.Generator, rows: Plane, columns: Plane) -> Plane:
    """Plane, cylinder, bowl, dome or saddle."""
    kind = rng.random()
    if kind < 0.25:
        return np.zeros_like(rows)
    angle = rng.uniform(0, np.pi)
    middle = rng.uniform(0.3, 0.7, 2) * EXTENT
    x = np.cos(angle) * (columns - middle[1]) + np.sin(angle) * (rows - middle[0])
    y = np.cos(angle) * (rows - middle[0]) - np.sin(angle) * (columns - middle[1])
    if kind < 0.45:
        # a rod lying on the ground
        radius = _log(rng, 5, 40)
        return np.asarray(np.sqrt(np.maximum(radius**2 - x**2, (0.25 * radius) ** 2)), dtype=np.float32)
    first, second = rng.choice([-1, 1]) / _log(rng, 12, 150), rng.choice([-1, 0, 1]) / _log(rng, 12, 150)
    return np.asarray(np.clip(0.5 * (first * x**2 + second * y**2), -18, 18), dtype=np.float32)


def _boss(rng: np.random.Generator, rows: Plane, columns: Plane) -> Plane:
    """A raised or sunken area of a random outline, with edges between sharp and soft."""
    middle, radius = rng.uniform(0, EXTENT, 2), _log(rng, 2, 25)
    distance = shape_distance(rng, rows - middle[0], columns - middle[1], radius)
    width = _log(rng, 0.12, 2.5)
    height = rng.choice([-1, 1]) * _log(rng, 0.3, 7)
    edge = 1 / (1 + np.exp(np.clip(distance / width, -30, 30)))
    return np.asarray(height * edge, dtype=np.float32)


def _ribs(rng: np.random.Generator, rows: Plane, columns: Plane) -> Plane:
    angle, period = rng.uniform(0, np.pi), _log(rng, 2, 12)
    phase = 2 * np.pi * (np.cos(angle) * columns + np.sin(angle) * rows) / period + rng.uniform(0, 6)
    wave = np.clip(np.sin(phase) * rng.uniform(0.8, 3), -1, 1)
    return np.asarray(_log(rng, 0.08, 0.12 * period) * wave, dtype=np.float32)


def _cells(rng: np.random.Generator, rows: Plane, columns: Plane) -> Plane:
    """A pavement of rounded stones."""
    from scipy.spatial import cKDTree

    count = int(_log(rng, 30, 500))
    where = np.stack([rows, columns], axis=-1).reshape(-1, 2)
    distance, _ = cKDTree(rng.uniform(0, EXTENT, (count, 2))).query(where, k=2)
    size = EXTENT / np.sqrt(count)
    gap = np.minimum((distance[:, 1] - distance[:, 0]) / size * 3, 1).reshape(rows.shape)
    return np.asarray(_log(rng, 0.1, 0.25 * size) * np.sqrt(np.maximum(1 - (1 - gap) ** 2, 0)), dtype=np.float32)


def _alteration(rng: np.random.Generator, heights: Plane, rows: Plane, columns: Plane) -> Plane:
    """Displacement of one alteration around the origin of the shifted grid."""
    sign, kind = rng.choice([-1.0, 1.0]), int(rng.integers(6))
    radius = _log(rng, 1.2, 11)
    size = sign * _log(rng, 0.12, 4)
    angle, aspect = rng.uniform(0, np.pi), _log(rng, 1, 4)
    x = (np.cos(angle) * columns + np.sin(angle) * rows) / (radius * np.sqrt(aspect))
    y = (np.cos(angle) * rows - np.sin(angle) * columns) * np.sqrt(aspect) / radius
    squared = x**2 + y**2
    if kind <= 1:
        found = size * np.exp(-2 * squared)
    elif kind == 2:
        found = size * np.maximum(1 - np.abs(y), 0) * (np.abs(x) < 1.3)
    elif kind == 3:
        distance = shape_distance(rng, rows, columns, radius)
        found = size / (1 + np.exp(np.clip(distance / _log(rng, 0.1, 0.8), -30, 30)))
    elif kind == 4:
        found = 0.35 * size * np.exp(-squared) * _lumps(rng, _log(rng, 0.8, 4))
    else:
        from scipy import ndimage

        level = ndimage.gaussian_filter(heights, _log(rng, 2, 12) / CELL, mode="nearest")
        found = np.clip(level - heights, -4, 4) * np.clip(2 * np.exp(-squared), 0, 1)
    return np.asarray(found, dtype=np.float32)


def _local_deviation(moved: Plane, reach: float) -> Plane:
    from scipy import ndimage

    size = 2 * int(reach / CELL) + 1
    wide = moved.astype(np.float64)
    mean = ndimage.uniform_filter(wide, size, mode="nearest")
    square = ndimage.uniform_filter(wide * wide, size, mode="nearest")
    return np.asarray(np.sqrt(np.maximum(square - mean**2, 0)), dtype=np.float32)


def _missing(rng: np.random.Generator, count: int) -> NDArray[np.bool_]:
    """True (count * count,) where points are not lost at random or in patches."""
    kept = rng.random((count, count)) >= (rng.uniform(0, 0.25) if rng.random() < 0.4 else 0.01)
    if rng.random() < 0.4:
        from scipy import ndimage

        cells = int(rng.integers(6, 20))
        field = ndimage.zoom(rng.standard_normal((cells, cells)), count / cells, order=1)
        full = np.zeros((count, count))
        full[: field.shape[0], : field.shape[1]] = field[:count, :count]
        kept &= full < rng.uniform(1.4, 2.5)
    return np.asarray(kept.ravel())

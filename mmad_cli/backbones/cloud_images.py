"""What a 2D network can see of an organised cloud: relief, surface normals, shaded views."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from mmad_cli.preprocessing.normals import organised_normals
from mmad_cli.preprocessing.resize import valid_pixels
from mmad_cli.types import FloatArray, IndexArray

Float64 = NDArray[np.float64]

RELIEF_QUANTILES = (0.01, 0.99)
VIEW_ANGLES = (0.0, -np.pi / 12, np.pi / 12)
"""Rotations about each axis; all combinations are the 27 views of CPMF (arXiv 2303.13194)."""

GREY = 0.5


def normal_image(xyz: FloatArray) -> FloatArray:
    """Normals as colours, float32 (3, H, W): (n + 1) / 2, and 0 where there is none."""
    normals = organised_normals(xyz)
    known = normals.any(axis=-1, keepdims=True)
    return np.ascontiguousarray(np.moveaxis(np.where(known, (normals + 1) / 2, 0), -1, 0), dtype=np.float32)


def relief_image(xyz: FloatArray) -> FloatArray:
    """Height as grey, float32 (3, H, W): z between its 1 % and 99 % quantiles over the scan as 0 to 1, else 0."""
    valid = valid_pixels(xyz)
    image = np.zeros(xyz.shape[:2], dtype=np.float32)
    if valid.any():
        low, high = np.quantile(xyz[valid, 2], RELIEF_QUANTILES)
        image[valid] = np.clip((xyz[valid, 2] - low) / max(high - low, 1e-9), 0, 1)
    return np.repeat(image[None], 3, axis=0)


@dataclass(frozen=True)
class View:
    """A shaded view: `image` float32 (3, S, S), and where each valid point lies in it, float64 (n, 2) as (x, y)."""

    image: FloatArray
    at: Float64


def shaded_views(xyz: FloatArray) -> list[View]:
    """27 views of a cloud (H, W, 3), turned by 0 and 15 degrees either way about each axis through its centre.

    Points in raster order are drawn orthographically as grey discs of 3 x 3 pixels, the nearest in front, shaded by
    the angle of their normal to the view. The frame holds the cloud in all views. Source: CPMF (arXiv 2303.13194),
    whose views come from a mesh renderer.
    """
    valid = valid_pixels(xyz)
    points = xyz[valid].astype(np.float64)
    normals = organised_normals(xyz)[valid].astype(np.float64)
    centred = points - points.mean(axis=0)
    radius = max(float(np.linalg.norm(centred, axis=1).max()), 1e-9)
    size = xyz.shape[0]
    views = []
    for angles in product(VIEW_ANGLES, repeat=3):
        turn = _rotation(*angles)
        seen = centred @ turn.T
        at = (seen[:, :2] / radius + 1) / 2 * (size - 1)
        shade = GREY * np.clip(-(normals @ turn.T)[:, 2], 0, 1)
        views.append(View(_splat(at, seen[:, 2], shade, size), at))
    return views


def sample_bilinear(feature_map: FloatArray, at: Float64, size: int) -> FloatArray:
    """Values float32 (n, C) of a map (C, h, w) that covers size x size pixels, at pixels (n, 2) = (x, y)."""
    channels, height, width = feature_map.shape
    position = [
        np.clip((at[:, axis] + 0.5) * side / size - 0.5, 0, side - 1) for axis, side in ((0, width), (1, height))
    ]
    low = [np.minimum(p.astype(np.int64), max(side - 2, 0)) for p, side in zip(position, (width, height), strict=True)]
    high = [np.minimum(i + 1, side - 1) for i, side in zip(low, (width, height), strict=True)]
    share = [(p - i).astype(np.float32)[:, None] for p, i in zip(position, low, strict=True)]
    rows = np.ascontiguousarray(feature_map.reshape(channels, -1).T, dtype=np.float32)

    def row(y: IndexArray, x: IndexArray) -> FloatArray:
        taken: FloatArray = rows[y * width + x]
        return taken

    upper = row(low[1], low[0]) * (1 - share[0]) + row(low[1], high[0]) * share[0]
    lower = row(high[1], low[0]) * (1 - share[0]) + row(high[1], high[0]) * share[0]
    return np.asarray(upper * (1 - share[1]) + lower * share[1], dtype=np.float32)


def _rotation(about_x: float, about_y: float, about_z: float) -> Float64:
    (cx, sx), (cy, sy), (cz, sz) = ((np.cos(a), np.sin(a)) for a in (about_x, about_y, about_z))
    x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    turn: Float64 = z @ y @ x
    return turn


def _splat(at: Float64, depth: Float64, shade: Float64, size: int) -> FloatArray:
    """Points drawn from the farthest to the nearest, the camera on the side of small depth; background white."""
    order = np.argsort(-depth, kind="stable")
    x, y = np.round(at[order, 0]).astype(np.int64), np.round(at[order, 1]).astype(np.int64)
    image = np.ones(size * size, dtype=np.float32)
    nearest = np.full(size * size, -1, dtype=np.int64)
    rank = np.arange(len(order))
    for dy, dx in product((-1, 0, 1), repeat=2):
        row, column = np.clip(y + dy, 0, size - 1), np.clip(x + dx, 0, size - 1)
        np.maximum.at(nearest, row * size + column, rank)
    drawn = nearest >= 0
    image[drawn] = shade[order][nearest[drawn]]
    return np.repeat(image.reshape(1, size, size), 3, axis=0)

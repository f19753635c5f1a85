"""Signed distance functions: the shapes of which synthetic parts are made.

Points are float64 arrays of shape (3, N), coordinates in millimetres in the frame of the part: x and y in the table
plane, z up from the table. A distance is negative inside the solid, zero on its surface.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
Values = NDArray[np.float64]
Colour = tuple[float, float, float]

LATTICE_SIZE = 64


@dataclass(frozen=True)
class Solid:
    """One part: its surface, its colour, and how it answers to light.

    `distance` maps points (3, N) to signed distances (N,) in mm. It may overestimate where it is not an exact
    distance; `step` is the share of it that is safe to march. `albedo` maps points to linear reflectance (3, N) in
    [0, 1]. `radius` and `height` bound the part: a cylinder about the z axis standing on the table. `interior` is
    the colour that a fracture lays open (None: as outside). `folds` are lines in the table plane, as (x, y, dx, dy),
    beyond which the part can be bent. `altered` is the ball (x, y, z, radius) outside which a defect changed nothing
    (None: no such bound).
    """

    distance: Callable[[Points], Values]
    albedo: Callable[[Points], Points]
    radius: float
    height: float
    step: float = 0.9
    specular: float = 0.1
    gloss: float = 20.0
    interior: Colour | None = None
    folds: tuple[tuple[float, float, float, float], ...] = ()
    altered: tuple[float, float, float, float] | None = None


def stream(*parts: object) -> np.random.Generator:
    """Random generator that depends on the given parts only, not on what was drawn elsewhere."""
    digest = hashlib.blake2b("/".join(str(part) for part in parts).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


@lru_cache(maxsize=1)
def _lattice() -> NDArray[np.float32]:
    """Periodic smooth noise (64^3,) on a cubic lattice, zero mean, unit deviation; finest octave about five cells."""
    from scipy import ndimage

    rng = stream("synthetic noise lattice")
    total = np.zeros((LATTICE_SIZE,) * 3)
    for sigma, weight in ((5.0, 1.0), (2.5, 0.5), (1.3, 0.25)):
        octave = ndimage.gaussian_filter(rng.standard_normal(total.shape), sigma, mode="wrap")
        total += weight * octave / octave.std()
    lattice: NDArray[np.float32] = ((total - total.mean()) / total.std()).astype(np.float32).ravel()
    return lattice


def noise(points: Points, scale: float, shift: Points | None = None) -> Values:
    """Smooth random field (N,) of zero mean and unit deviation; its features are about 10 x `scale` mm wide."""
    where = points / scale
    if shift is not None:
        where = where + shift[:, None]
    cell = np.floor(where)
    along_x, along_y, along_z = (where - cell).astype(np.float32)
    # flat indices of the eight corners: the lattice is periodic with a power of two
    last = LATTICE_SIZE - 1
    x, y, z = cell.astype(np.int32) & last
    row, plane = LATTICE_SIZE, LATTICE_SIZE * LATTICE_SIZE
    x_next, y_next, z_next = ((x + 1) & last) * plane, ((y + 1) & last) * row, (z + 1) & last
    x, y = x * plane, y * row
    values = _lattice()

    def edge(corner: NDArray[np.int32]) -> NDArray[np.float32]:
        low = values.take(corner + z)
        result: NDArray[np.float32] = low + (values.take(corner + z_next) - low) * along_z
        return result

    near, far = edge(x + y), edge(x_next + y)
    near += (edge(x + y_next) - near) * along_y
    far += (edge(x_next + y_next) - far) * along_y
    field: Values = (near + (far - near) * along_x).astype(np.float64)
    return field


def roughen(form: Values, points: Points, grain: Callable[[Points], Values], reach: float) -> Values:
    """The distance `form` (N,) plus a relief `grain` of at most `reach` mm, looked up near the surface only."""
    near = form < 2 * reach
    result = form - reach
    result[near] = form[near] + grain(points[:, near])
    return result


def profile(outline: Values, z: Values, low: float, high: float, rounding: float = 0.0) -> Values:
    """Prism of a plane outline (signed distance in the plane) between two heights, edges rounded."""
    side = outline + rounding
    top = np.abs(z - (low + high) / 2) - (high - low) / 2 + rounding
    outside = np.sqrt(np.maximum(side, 0) ** 2 + np.maximum(top, 0) ** 2)
    result: Values = np.minimum(np.maximum(side, top), 0) + outside - rounding
    return result


def rectangle(x: Values, y: Values, half_x: float, half_y: float, rounding: float = 0.0) -> Values:
    """Signed distance in the plane to a centred rectangle with rounded corners."""
    dx = np.abs(x) - half_x + rounding
    dy = np.abs(y) - half_y + rounding
    outside = np.sqrt(np.maximum(dx, 0) ** 2 + np.maximum(dy, 0) ** 2)
    result: Values = np.minimum(np.maximum(dx, dy), 0) + outside - rounding
    return result


def ellipsoid(points: Points, radii: Points) -> Values:
    """First-order distance to a centred ellipsoid with the given half axes (3,)."""
    scaled = points / radii[:, None]
    length = np.sqrt((scaled**2).sum(0))
    gradient = np.sqrt(((scaled / radii[:, None]) ** 2).sum(0))
    result: Values = length * (length - 1) / np.maximum(gradient, 1e-9)
    return result


def smooth_union(first: Values, second: Values, width: float) -> Values:
    """Union whose seam is a fillet of about `width` mm (polynomial smooth minimum)."""
    blend = np.maximum(width - np.abs(first - second), 0) / width
    result: Values = np.minimum(first, second) - blend**2 * width / 4
    return result


def gradient(solid: Solid, points: Points, epsilon: float = 0.12) -> Points:
    """Unit gradient (3, N) of the distance by four samples at the corners of a tetrahedron."""
    corners = np.array([[1, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]], dtype=np.float64)
    total = np.zeros_like(points)
    for corner in corners:
        total += corner[:, None] * solid.distance(points + epsilon * corner[:, None])
    result: Points = total / np.maximum(np.sqrt((total**2).sum(0)), 1e-12)
    return result


def paint(colour: Colour, count: int) -> Points:
    """One colour for `count` points, (3, count)."""
    return np.repeat(np.asarray(colour, dtype=np.float64)[:, None], count, axis=1)


def mix(first: Points, second: Points, weight: Values) -> Points:
    """Colours (3, N) blended with weight 0 (first) to 1 (second)."""
    return first + (second - first) * weight


def smoothstep(low: float, high: float, value: Values) -> Values:
    """0 below `low`, 1 above `high`, a smooth step between them."""
    ratio = np.clip((value - low) / (high - low), 0, 1)
    result: Values = ratio * ratio * (3 - 2 * ratio)
    return result

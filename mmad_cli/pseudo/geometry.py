"""Geometry of pseudo anomalies: moving a good scan, pasting a donor's surface, bumps, dents and holes.

Only points change here; normals are computed from them later, so they always fit the geometry.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmad_cli.preprocessing.resize import valid_pixels
from mmad_cli.types import BoolArray, ByteArray, FloatArray

Matrix = NDArray[np.float64]

# G2SF pastes a surface this far above or below the object's own level
OFFSET = (0.2e-3, 2.0e-3)
# height and width of smooth bumps and dents
AMPLITUDE = (0.3e-3, 3.0e-3)
WIDTH = (1.0e-3, 6.0e-3)
# a bump counts as defect up to this many widths from its centre, where 14 % of its height are left
BUMP_EXTENT = 2.0


@dataclass(frozen=True)
class Pose:
    """A similarity of the image plane: flip along x, turn by `angle` radians, scale, shift in fractions (y, x)."""

    angle: float = 0.0
    scale: float = 1.0
    shift: tuple[float, float] = (0.0, 0.0)
    flip: bool = False

    def matrix(self) -> Matrix:
        """The linear part on pixel coordinates (x, y)."""
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        turn = np.array([[cos, -sin], [sin, cos]])
        return self.scale * turn @ np.diag([-1.0 if self.flip else 1.0, 1.0])


@dataclass(frozen=True)
class PoseRange:
    """Ranges that poses are drawn from: degrees, fraction of the side, factors."""

    angle: float
    shift: float
    scale: tuple[float, float]
    flip: bool

    def draw(self, rng: np.random.Generator) -> Pose:
        """A uniform draw."""
        angle = np.deg2rad(rng.uniform(-self.angle, self.angle))
        scale = rng.uniform(*self.scale)
        shift = (rng.uniform(-self.shift, self.shift), rng.uniform(-self.shift, self.shift))
        return Pose(float(angle), float(scale), shift, bool(self.flip and rng.random() < 0.5))


# Source: code of G2SF (arXiv 2503.10091)
POSES = {
    "narrow": PoseRange(angle=10, shift=0.05, scale=(0.9, 1.1), flip=False),
    "wide": PoseRange(angle=45, shift=0.1, scale=(0.8, 1.25), flip=True),
    "none": PoseRange(angle=0, shift=0, scale=(1, 1), flip=False),
}


def move(xyz: FloatArray, rgb: ByteArray, pose: Pose, *, points_too: bool) -> tuple[FloatArray, ByteArray]:
    """A scan seen in another pose: xyz float32 (H, W, 3) and rgb uint8 (H, W, 3) of one size.

    Pixels are taken from where they come from, points as they are (an average would be on no surface), colours
    bilinearly; what comes from outside is empty. With `points_too` the points move with their pixels: the cloud
    undergoes the same similarity in space, in the units that a linear fit of x and y to the pixel grid gives, so the
    surface and its normals stay those of one rigid object. Without it they keep their coordinates, as in the code of
    G2SF. Raises ValueError when the two have different sizes.
    """
    if xyz.shape[:2] != rgb.shape[:2]:
        raise ValueError(f"rgb: should have the size of the cloud {xyz.shape[:2]}, got {rgb.shape[:2]}")
    height, width = xyz.shape[:2]
    if pose == Pose():
        return xyz, rgb
    centre = np.array([width / 2, height / 2])
    forward = pose.matrix()
    translation = np.array([pose.shift[1] * width, pose.shift[0] * height])
    back: Matrix = np.linalg.inv(forward).astype(np.float64)
    offset: Matrix = centre - back @ (centre + translation)
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    column = np.floor(back[0, 0] * x[None, :] + back[0, 1] * y[:, None] + offset[0]).astype(np.int64)
    row = np.floor(back[1, 0] * x[None, :] + back[1, 1] * y[:, None] + offset[1]).astype(np.int64)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    cloud = xyz[np.clip(row, 0, height - 1), np.clip(column, 0, width - 1)] * inside[..., None]
    if points_too:
        cloud = _moved_points(cloud, pixel_axes(xyz), forward, centre, translation, pose.scale)
    return cloud, _warp(rgb, back, offset)


def pixel_axes(xyz: FloatArray) -> tuple[Matrix, NDArray[np.float64]]:
    """Linear fit of x and y to pixel coordinates: (2, 2) metres per pixel and (2,) metres at the corner.

    Over the valid points of xyz (H, W, 3), pixel centres at +0.5. Zeros for fewer than three of them.
    """
    ys, xs = np.nonzero(valid_pixels(xyz))
    if len(ys) < 3:
        return np.zeros((2, 2)), np.zeros(2)
    design = np.stack([xs + 0.5, ys + 0.5, np.ones(len(ys))], axis=1)
    solution = np.linalg.lstsq(design.T @ design, design.T @ xyz[ys, xs, :2].astype(np.float64), rcond=None)[0]
    return solution[:2].T, solution[2]


def _moved_points(
    cloud: FloatArray,
    axes: tuple[Matrix, NDArray[np.float64]],
    forward: Matrix,
    centre: NDArray[np.float64],
    translation: NDArray[np.float64],
    scale: float,
) -> FloatArray:
    linear, corner = axes
    valid = valid_pixels(cloud)
    if abs(np.linalg.det(linear)) < 1e-18 or not valid.any():
        return cloud
    points = cloud[valid].astype(np.float64)
    pivot = linear @ centre + corner
    metric = linear @ forward @ np.linalg.inv(linear)
    points[:, :2] = pivot + linear @ translation + (points[:, :2] - pivot) @ metric.T
    level = points[:, 2].mean()
    points[:, 2] = level + scale * (points[:, 2] - level)
    out = np.zeros_like(cloud)
    out[valid] = points
    return out


def _warp(rgb: ByteArray, back: Matrix, offset: NDArray[np.float64]) -> ByteArray:
    from PIL import Image

    data = (back[0, 0], back[0, 1], offset[0], back[1, 0], back[1, 1], offset[1])
    image = Image.fromarray(np.ascontiguousarray(rgb))
    size = (rgb.shape[1], rgb.shape[0])
    warped = image.transform(size, Image.Transform.AFFINE, data, resample=Image.Resampling.BILINEAR)
    return np.array(warped, dtype=np.uint8)


def paste_surface(
    xyz: FloatArray, mask: BoolArray, donor: FloatArray, shift: tuple[int, int], offset: float
) -> tuple[FloatArray, BoolArray]:
    """The heights of a donor's surface in place of the scan's own.

    z of the pixels of `mask` becomes that of the donor at the pixel `shift` (y, x) before, brought from the donor's
    mean height to the scan's, plus `offset` metres; x and y stay those of the scan's grid. xyz, donor float32
    (H, W, 3), mask bool (H, W). Returns the cloud and the pixels that changed: those where both have a point.
    Source: code of G2SF (arXiv 2503.10091).
    """
    valid, source = valid_pixels(xyz), valid_pixels(donor)
    ys, xs = np.nonzero(mask & valid)
    from_y, from_x = ys - shift[0], xs - shift[1]
    inside = (from_y >= 0) & (from_y < donor.shape[0]) & (from_x >= 0) & (from_x < donor.shape[1])
    ys, xs, from_y, from_x = ys[inside], xs[inside], from_y[inside], from_x[inside]
    filled = source[from_y, from_x]
    ys, xs, from_y, from_x = ys[filled], xs[filled], from_y[filled], from_x[filled]
    out, changed = xyz.copy(), np.zeros_like(mask)
    if len(ys):
        level = xyz[valid, 2].mean(dtype=np.float64) - donor[source, 2].mean(dtype=np.float64)
        out[ys, xs, 2] = donor[from_y, from_x, 2] + np.float32(level + offset)
        changed[ys, xs] = True
    return out, changed


def raise_bump(
    xyz: FloatArray, centre: tuple[int, int], amplitude: float, width: float
) -> tuple[FloatArray, BoolArray]:
    """A smooth bump (amplitude < 0, towards the camera) or dent (> 0) about the point at pixel `centre` (y, x).

    z += amplitude exp(-r^2 / 2 width^2) with r the distance in x and y; all in metres. Returns the cloud and the
    pixels within two widths. Pixels without a point do not change; without a point at `centre` nothing does.
    """
    valid = valid_pixels(xyz)
    if not valid[centre]:
        return xyz.copy(), np.zeros_like(valid)
    squared = ((xyz[..., :2].astype(np.float64) - xyz[centre][:2].astype(np.float64)) ** 2).sum(axis=-1)
    rise = amplitude * np.exp(-squared / (2 * width * width))
    out = xyz.copy()
    out[valid, 2] += rise[valid].astype(np.float32)
    return out, np.asarray(valid & (squared < (BUMP_EXTENT * width) ** 2))


def cut_hole(xyz: FloatArray, mask: BoolArray) -> tuple[FloatArray, BoolArray]:
    """The cloud without the points of `mask`, and the pixels that lost one."""
    lost = mask & valid_pixels(xyz)
    out = xyz.copy()
    out[lost] = 0
    return out, np.asarray(lost)

"""From a depth image on a conveyor belt to an organised cloud without the belt: the published conversion of Eyecandies.

Camera model: the data set's own description (Bonfiglioli et al., ACCV 2022, arXiv 2210.04570). Background rule, axes
and scale: the conversion that M3DM (arXiv 2303.00601), CFM (arXiv 2312.04521) and MAFR (arXiv 2510.21793) share. All of
it is float64 on whole images, in the published order of operations, so that the same pixels end up as background.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmad_cli.types import BoolArray, FloatArray

Float64 = NDArray[np.float64]

# Of all cameras of the data set, in pixels
FOCAL_LENGTH = 711.11

LARGEST_DEPTH_CODE = 65535.0

# Limits of what stays, in metres in the frame of the belt: height above it, distance along it, half its width
BELT_HEIGHT = -0.02
BELT_LENGTH = 1.8
BELT_HALF_WIDTH = 1.0

# World axes (x, y, z) become (x, z, y), a tenth as large and with the second one turned round
_AXES = (0, 2, 1)
_SCALE = (0.1, -0.1, 0.1)


@dataclass(frozen=True)
class BeltScan:
    """An organised cloud in the published frame.

    xyz float32 (H, W, 3), every pixel with its point; background bool (H, W); background_value float32 (3,): what
    background pixels hold in the published files. Its first coordinate is 0, the two others in general are not.
    """

    xyz: FloatArray
    background: BoolArray
    background_value: FloatArray


def depth_in_metres(codes: NDArray[np.uint16], low: float, high: float) -> FloatArray:
    """Depth float32 (H, W) in metres from 16-bit codes (H, W), of which 0 means `low` and 65535 `high`.

    Raises ValueError unless 0 < low <= high, both finite.
    """
    if not (np.isfinite(low) and np.isfinite(high) and 0 < low <= high):
        raise ValueError(f"low, high: should be 0 < low <= high, got {low} and {high}")
    return np.asarray(codes.astype(np.float32) / LARGEST_DEPTH_CODE * (high - low) + low, dtype=np.float32)


def world_points(depth: FloatArray, pose: Float64, focal: float = FOCAL_LENGTH) -> Float64:
    """World points float64 (H * W, 3) in metres, row by row, of a pinhole camera.

    depth float32 (H, W) in metres, above 0; pose float64 (4, 4); focal in pixels; principal point (W / 2, H / 2). With
    P = K pose, the point of column i and row j at depth d is d P^-1 (i, j, 1, 1 / d). Raises ValueError for a pose of
    another shape, or one that has no inverse.
    """
    if pose.shape != (4, 4):
        raise ValueError(f"pose: should be (4, 4), got {pose.shape}")
    height, width = depth.shape
    camera = np.array([[focal, 0, width / 2, 0], [0, focal, height / 2, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    try:
        inverse = np.linalg.inv(camera @ pose)
    except np.linalg.LinAlgError as error:
        raise ValueError(f"pose: should have an inverse ({error})") from error
    rays = np.empty((4, height * width))
    rays[0] = np.tile(np.arange(width), height)
    rays[1] = np.repeat(np.arange(height), width)
    rays[2] = 1
    # in float32, as published: the rest of the chain is float64
    rays[3] = np.float32(1) / depth.reshape(-1)
    return np.asarray((depth.reshape(-1, 1) * (inverse @ rays).T)[:, :3], dtype=np.float64)


def belt_scan(points: Float64, height: int, width: int) -> BeltScan:
    """Cloud, background and background value from the world points float64 (height * width, 3) of an image.

    The line from the point at the top middle of the image (T) to that at the bottom middle (B) gives the direction of
    the belt: with a = T_y - B_y, b = T_z - B_z, n = sqrt(a^2 + b^2), R the rotation about x with cosine b / n and sine
    a / n, and S = (0, B_y, B_z), the frame of the belt is Q = R (X - S). Background is Q_y > -0.02, Q_z > 1.8 or
    |Q_x| > 1; such a point becomes Q = -S. Published are (x, -z, y) / 10 of R^T Q + S. Raises ValueError when T and B
    do not differ in y or z.
    """
    top, bottom = points[width // 2], points[-(width // 2)]
    across, along = top[1] - bottom[1], top[2] - bottom[2]
    length = np.sqrt(across**2 + along**2)
    if not length > 0:
        raise ValueError("points: top and bottom middle should differ in y or z, got the same point")
    cosine, sine = along / length, across / length
    start = np.array([0, bottom[1], bottom[2]])
    rotation = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
    belt = (rotation @ (points - start).T).T
    background = (belt[:, 1] > BELT_HEIGHT) | (belt[:, 2] > BELT_LENGTH) | (np.abs(belt[:, 0]) > BELT_HALF_WIDTH)
    # there and back leaves coordinates of 1e-17 where the direct way leaves 0, which would make the pixel invalid
    returned = (rotation.T @ belt.T).T + start
    return BeltScan(
        xyz=_published(returned).reshape(height, width, 3),
        background=background.reshape(height, width),
        background_value=_published((rotation.T @ -start + start)[None])[0],
    )


def _published(points: Float64) -> FloatArray:
    return np.ascontiguousarray(points[:, _AXES] * np.array(_SCALE), dtype=np.float32)

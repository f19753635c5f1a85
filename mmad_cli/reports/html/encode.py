"""Pictures, maps and point clouds as text that a browser reads: data URLs and base64."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmad_cli.preprocessing.resize import nearest_indices, resize_rgb, valid_pixels
from mmad_cli.reports.html.model import Scene
from mmad_cli.types import BoolArray, ByteArray, FloatArray, IndexArray

SURFACE_SIZE = 224
_QUALITY = 82
_LEVELS = 65535

Signs = tuple[float, float, float]


@dataclass(frozen=True)
class Detail:
    """How much of a scan is shown: image side in pixels at most, and points of the cloud."""

    image: int
    points: int


def detail_for(scenes: int) -> Detail:
    """Detail that keeps a report of so many scans at a size that a browser opens at once.

    A category of 110 samples gets all; a whole dataset of 1200 stays below 100 MB.
    """
    if scenes <= 150:
        return Detail(image=320, points=12_000)
    return Detail(image=224, points=int(np.clip(1_400_000 // scenes, 1500, 9000)))


def scene_record(scene: Scene, detail: Detail) -> dict[str, Any]:
    """Pictures of a scan as data URLs, and its thinned cloud; the cloud is null where the scan has no points."""
    signs = axis_signs(scene.xyz)
    surface = _picked(scene.xyz, min(SURFACE_SIZE, max(scene.xyz.shape[:2])))
    return {
        "rgb": encode_image(_smaller(scene.rgb, detail.image), "photo"),
        "depth": encode_image(depth_image(surface, signs), "photo"),
        "normals": encode_image(normal_image(surface, signs), "photo"),
        "mask": encode_mask(scene.mask),
        "cloud": cloud_record(scene.xyz, signs, detail.points),
    }


# -- images ------------------------------------------------------------------------------------------------------


def encode_image(image: ByteArray, kind: Literal["photo", "exact"]) -> str:
    """Data URL of an image uint8 (H, W) or (H, W, 3). `exact` keeps every value."""
    from PIL import Image

    picture, stream = Image.fromarray(np.ascontiguousarray(image)), io.BytesIO()
    if _has_webp() and kind == "photo":
        picture.save(stream, "WEBP", quality=_QUALITY, method=3)
        return _data_url("image/webp", stream)
    if kind == "photo":
        picture.save(stream, "JPEG", quality=_QUALITY)
        return _data_url("image/jpeg", stream)
    picture.save(stream, "PNG", compress_level=6)
    return _data_url("image/png", stream)


def encode_mask(mask: BoolArray) -> str:
    """Data URL of a mask bool (H, W) as a PNG of one bit per pixel."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).convert("1", dither=Image.Dither.NONE).save(stream, "PNG")
    return _data_url("image/png", stream)


def encode_map(values: FloatArray, low: float, high: float) -> str:
    """Data URL of a map (H, W) in 256 levels from `low` (0) to `high` (255)."""
    scale = 255.0 / (high - low) if high > low else 0.0
    levels = np.clip(np.rint((values.astype(np.float64) - low) * scale), 0, 255).astype(np.uint8)
    return encode_image(levels, "exact")


@cache
def _has_webp() -> bool:
    from PIL import features

    return bool(features.check("webp"))


def _data_url(kind: str, stream: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


def _smaller(rgb: ByteArray, side: int) -> ByteArray:
    height, width = rgb.shape[:2]
    longest = max(height, width)
    if longest <= side:
        return rgb
    return resize_rgb(rgb, (max(1, height * side // longest), max(1, width * side // longest)))


# -- surfaces ----------------------------------------------------------------------------------------------------


def axis_signs(xyz: FloatArray) -> Signs:
    """Factors that turn the axes of a cloud (H, W, 3) so that x points right in the image and y up.

    The third keeps the handedness, so z then points to the viewer, whether the scanner's z pointed away or not.
    """
    valid = valid_pixels(xyz)
    if valid.sum() < 3:
        return 1.0, 1.0, 1.0
    rows, columns = np.nonzero(valid)
    x = _sign(columns, xyz[..., 0][valid])
    y = -_sign(rows, xyz[..., 1][valid])
    return x, y, x * y


def _sign(index: IndexArray, values: NDArray[Any]) -> float:
    moved = (index - index.mean()) @ (values.astype(np.float64) - values.mean(dtype=np.float64))
    return -1.0 if moved < 0 else 1.0


def _picked(xyz: FloatArray, side: int) -> FloatArray:
    rows = nearest_indices(xyz.shape[0], side, "center")
    columns = nearest_indices(xyz.shape[1], side, "center")
    return xyz[rows[:, None], columns[None, :]]


def depth_image(xyz: FloatArray, signs: Signs) -> ByteArray:
    """Grey image uint8 (H, W) of xyz (H, W, 3): near is light, missing is black."""
    valid = valid_pixels(xyz)
    image = np.zeros(valid.shape, dtype=np.uint8)
    if not valid.any():
        return image
    height = xyz[..., 2][valid].astype(np.float64) * signs[2]
    low, high = np.percentile(height, [1, 99])
    share = np.clip((height - low) / (high - low), 0, 1) if high > low else np.full(height.shape, 0.5)
    image[valid] = np.rint(50 + 205 * share).astype(np.uint8)
    return image


def normal_image(xyz: FloatArray, signs: Signs) -> ByteArray:
    """Surface normals of xyz (H, W, 3) as colours uint8 (H, W, 3): 128 + 127 times x, y, z; missing is black.

    The normal is the cross product of the differences of the neighbours in the row and in the column.
    """
    turned = xyz.astype(np.float64) * np.asarray(signs)
    valid = valid_pixels(xyz)
    across, across_valid = _differences(turned, valid, axis=1)
    down, down_valid = _differences(turned, valid, axis=0)
    normal = np.cross(across, -down)
    length = np.linalg.norm(normal, axis=-1)
    known = across_valid & down_valid & (length > 0)
    image = np.zeros(xyz.shape, dtype=np.uint8)
    unit = normal[known] / length[known][:, None]
    image[known] = np.rint(128 + 127 * unit).astype(np.uint8)
    return image


def _differences(values: NDArray[np.float64], valid: BoolArray, axis: int) -> tuple[NDArray[np.float64], BoolArray]:
    """Next minus previous neighbour, or with the pixel itself in place of one that is missing; and where that works."""
    before = np.roll(values, 1, axis)
    after = np.roll(values, -1, axis)
    has_before, has_after = np.roll(valid, 1, axis), np.roll(valid, -1, axis)
    edge = [slice(None), slice(None)]
    edge[axis] = slice(0, 1)
    has_before[tuple(edge)] = False
    edge[axis] = slice(-1, None)
    has_after[tuple(edge)] = False
    start = np.where(has_before[..., None], before, values)
    stop = np.where(has_after[..., None], after, values)
    return stop - start, valid & (has_before | has_after)


# -- clouds ------------------------------------------------------------------------------------------------------


def cloud_record(xyz: FloatArray, signs: Signs, points: int) -> dict[str, Any] | None:
    """About `points` points of an organised cloud (H, W, 3), still on a grid so that a viewer can shade them.

    `rows` and `columns` of the grid, `present` (one bit per cell, first cell in the highest bit), `points` (uint16
    little-endian x, y, z of the present cells from `low` to `high`); x points right, y up, z to the viewer.
    """
    valid = valid_pixels(xyz)
    total = int(valid.sum())
    if total == 0:
        return None
    shrink = min(1.0, (points / total) ** 0.5)
    rows, columns = (max(1, round(side * shrink)) for side in valid.shape)
    grid = xyz[
        nearest_indices(valid.shape[0], rows, "center")[:, None],
        nearest_indices(valid.shape[1], columns, "center")[None, :],
    ]
    present = valid_pixels(grid)
    if not present.any():
        return None
    kept = grid[present].astype(np.float64) * np.asarray(signs)
    low, high = kept.min(axis=0), kept.max(axis=0)
    span = np.where(high > low, high - low, 1.0)
    levels = np.rint((kept - low) / span * _LEVELS).astype("<u2")
    return {
        "rows": rows,
        "columns": columns,
        "present": _base64(np.packbits(present)),
        "points": _base64(levels),
        "low": low.tolist(),
        "high": high.tolist(),
    }


def _base64(array: NDArray[Any]) -> str:
    return base64.b64encode(array.tobytes()).decode("ascii")

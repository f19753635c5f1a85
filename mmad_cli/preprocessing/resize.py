"""From scan size to what networks see: the loading step of M3DM (arXiv 2303.00601) and PatchCore (arXiv 2106.08265).

Images are resized with Pillow on 8 bits, clouds by picking points, since interpolating across an edge would invent
points that are on no surface.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mmad_cli.types import BoolArray, ByteArray, FloatArray, IndexArray, Sample

NETWORK_SIZE = 224

XyzResize = Literal["floor", "center"]
ImageFilter = Literal["nearest", "bilinear", "bicubic"]


def valid_pixels(xyz: FloatArray) -> BoolArray:
    """Pixels with a 3D point, bool (...): all three coordinates of xyz (..., 3) are non-zero.

    A point with a single coordinate of exactly 0 counts as missing, as in the published codes: the background of
    Eyecandies keeps two non-zero coordinates.
    """
    return np.asarray((xyz[..., 0] != 0) & (xyz[..., 1] != 0) & (xyz[..., 2] != 0))


def nearest_indices(source: int, target: int, rule: XyzResize = "floor") -> IndexArray:
    """Source index int64 (target,) of every target index.

    `floor`: floor(i * source / target) in float32, the rule of PyTorch's "nearest", which looks at the upper left
    corner of a target pixel. `center`: floor((i + 0.5) * source / target), the middle of it, as Pillow does for
    masks; `floor` shifts clouds against masks by half a target pixel. Raises ValueError for another rule.
    """
    index = np.arange(target)
    if rule == "floor":
        # in float32 as PyTorch computes it: products that are whole numbers can round down
        scaled = np.floor(index.astype(np.float32) * (np.float32(source) / np.float32(target)))
        return np.asarray(np.minimum(scaled.astype(np.int64), source - 1))
    if rule == "center":
        return np.asarray((2 * index + 1) * source // (2 * target), dtype=np.int64)
    raise ValueError(f"xyz_resize: should be 'floor' or 'center', got {rule!r}")


def resize_xyz(xyz: FloatArray, size: int, rule: XyzResize = "floor") -> FloatArray:
    """Cloud float32 (size, size, 3) of the points of xyz (H, W, 3) that `nearest_indices` names."""
    rows = nearest_indices(xyz.shape[0], size, rule)
    columns = nearest_indices(xyz.shape[1], size, rule)
    return xyz[rows[:, None], columns[None, :]]


def resize_rgb(rgb: ByteArray, size: int | tuple[int, int], filter: ImageFilter = "bicubic") -> ByteArray:
    """Image uint8 (h, w, 3) from rgb uint8 (H, W, 3) with Pillow, which smooths when it shrinks.

    size: (h, w) in pixels, or one side of a square. Raises ValueError for another filter, shape or type.
    """
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[-1] != 3:
        raise ValueError(f"rgb: should be uint8 (H, W, 3), got {rgb.dtype} {rgb.shape}")
    return _resize_image(rgb, _height_width(size), filter)


def resize_mask(mask: BoolArray, size: int | tuple[int, int]) -> BoolArray:
    """Mask bool (h, w) from mask bool (H, W): the pixel under the middle of every target pixel (Pillow's nearest)."""
    return _resize_image(_grey(mask), _height_width(size), "nearest") > 127


def to_network_size(sample: Sample, size: int = NETWORK_SIZE, xyz_resize: XyzResize = "floor") -> Sample:
    """The sample with rgb (bicubic), xyz (nearest) and mask (nearest) at (size, size).

    Each array is resized from its own size: after the `cfm` protocol a cloud may be larger than its image. Raises
    ValueError when `size` is below 1 or `xyz_resize` is unknown.
    """
    if size < 1:
        raise ValueError(f"size: should be at least 1, got {size}")
    return replace(
        sample,
        rgb=resize_rgb(sample.rgb, size),
        xyz=resize_xyz(sample.xyz, size, xyz_resize),
        mask=resize_mask(sample.mask, size),
    )


def centre_crop_view(
    rgb: ByteArray, mask: BoolArray, resize: int = 256, crop: int = NETWORK_SIZE
) -> tuple[ByteArray, BoolArray]:
    """PatchCore's view: rgb uint8 (crop, crop, 3) and mask bool (crop, crop).

    The shorter side is brought to `resize` pixels bilinearly, then the middle is cut out. The mask goes the same way
    and only pixels that are still 1 count, so a defect loses its blurred rim. Raises ValueError when `crop` is larger
    than `resize`, or rgb (H, W, 3) and mask (H, W) differ in size.
    """
    if crop > resize:
        raise ValueError(f"crop: should be at most resize={resize}, got {crop}")
    if rgb.shape[:2] != mask.shape:
        raise ValueError(f"mask: should have the size of rgb {rgb.shape[:2]}, got {mask.shape}")
    height, width = mask.shape
    shorter = min(height, width)
    # the longer side is cut to a whole pixel, as torchvision's Resize does
    target = (int(resize * height / shorter), int(resize * width / shorter))
    top, left = round((target[0] - crop) / 2), round((target[1] - crop) / 2)
    window = (slice(top, top + crop), slice(left, left + crop))
    small_mask = _resize_image(_grey(mask), target, "bilinear") == 255
    return np.ascontiguousarray(resize_rgb(rgb, target, "bilinear")[window]), np.ascontiguousarray(small_mask[window])


def _height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _grey(mask: BoolArray) -> ByteArray:
    return np.where(mask, 255, 0).astype(np.uint8)


def _resize_image(image: ByteArray, size: tuple[int, int], filter: ImageFilter) -> NDArray[np.uint8]:
    from PIL import Image

    filters = {
        "nearest": Image.Resampling.NEAREST,
        "bilinear": Image.Resampling.BILINEAR,
        "bicubic": Image.Resampling.BICUBIC,
    }
    if filter not in filters:
        raise ValueError(f"filter: should be one of {sorted(filters)}, got {filter!r}")
    resized = Image.fromarray(np.ascontiguousarray(image)).resize((size[1], size[0]), filters[filter])
    return np.array(resized, dtype=np.uint8)

"""One raw scan to one clean scan, by the protocol of M3DM or of CFM.

M3DM: released script of arXiv 2303.00601. CFM: released script and loader of arXiv 2312.04521. Both remove the table,
pad the cloud to a square and keep the largest cluster; they differ in what happens to image and mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmad_cli.preprocessing.config import PreprocessConfig
from mmad_cli.preprocessing.debris import largest_cluster, largest_component
from mmad_cli.preprocessing.plane import edge_points, fit_plane, near_plane
from mmad_cli.preprocessing.resize import valid_pixels
from mmad_cli.types import BoolArray, FloatArray, Sample

Padding = tuple[tuple[int, int], tuple[int, int]]
"""((top, bottom), (left, right)) in pixels."""


@dataclass(frozen=True)
class _Cleaning:
    """What is to be removed from a scan, at scan size."""

    plane: NDArray[np.float64] | None
    plane_reason: str | None
    near_plane: BoolArray
    debris: BoolArray


def preprocess(sample: Sample, config: PreprocessConfig) -> Sample:
    """The clean scan, as new arrays; the input is not changed.

    sample: rgb uint8 (H, W, 3), xyz float32 (H, W, 3) in metres with missing points (0, 0, 0), mask bool (H, W).
    Result, with L the larger of H and W, each rounded up to a multiple of `config.pad_multiple`:

    - `m3dm`: all three L x L, padded with zeros; table and debris are 0 in xyz and, unless `rgb_background` is
      `keep`, in rgb.
    - `cfm`: xyz as above; rgb and mask squared to the larger of H and W by repeating their edges.
    - `none`: unchanged.

    A sample that comes with its `background` (Eyecandies) has no table to search for, and its published conversion
    neither clusters nor pads: `m3dm` and `cfm` both set the background's points to `info["background_value"]` or, where
    that is not given, (0, 0, 0), and leave image and mask as they are.

    `info` records the plane (4 numbers, or None and `plane_reason`), `removed_plane_pixels`,
    `removed_debris_pixels`, `pad` and `image_pad` (top, left), `valid_before` and `valid_after`. A scan whose border
    holds too few points for a plane, such as one that was cleaned before, keeps all points but debris.

    Raises ValueError when the arrays have other shapes or the cloud has values that are not finite.
    """
    _check(sample)
    if config.protocol == "none":
        return replace(
            sample,
            rgb=sample.rgb.copy(),
            xyz=sample.xyz.copy(),
            mask=sample.mask.copy(),
            info=_info(sample),
            background=None,
        )
    if sample.background is not None:
        return _without_background(sample, sample.background)
    cleaning = _find(sample.xyz, config)
    removed = cleaning.near_plane | cleaning.debris
    height, width = sample.mask.shape
    side = max(_round_up(height, config.pad_multiple), _round_up(width, config.pad_multiple))
    pad = square_padding(height, width, side)
    image_side, mode = (side, "constant") if config.protocol == "m3dm" else (max(height, width), "edge")
    image_pad = square_padding(height, width, image_side)
    xyz, rgb = _pad(sample.xyz, pad, "constant"), _pad(sample.rgb, image_pad, mode)
    _inside(xyz, pad)[removed] = 0
    if config.rgb_background == "zero":
        _inside(rgb, image_pad)[removed] = 0
    clean = replace(sample, rgb=rgb, xyz=xyz, mask=_pad(sample.mask, image_pad, mode))
    return replace(clean, info=_info(sample, clean, cleaning, pad, image_pad))


def square_padding(height: int, width: int, side: int) -> Padding:
    """((top, bottom), (left, right)) in pixels that make height x width a square; the odd pixel goes last.

    Raises ValueError when `side` is smaller than height or width.
    """
    if side < max(height, width):
        raise ValueError(f"side: should be at least {max(height, width)}, got {side}")
    top, left = (side - height) // 2, (side - width) // 2
    return (top, side - height - top), (left, side - width - left)


def _check(sample: Sample) -> None:
    if sample.xyz.ndim != 3 or sample.xyz.shape[-1] != 3:
        raise ValueError(f"xyz: should be (H, W, 3), got {sample.xyz.shape}")
    size = sample.xyz.shape[:2]
    if sample.rgb.shape != (*size, 3):
        raise ValueError(f"rgb: should be {(*size, 3)} as the cloud, got {sample.rgb.shape}")
    if sample.mask.shape != size:
        raise ValueError(f"mask: should be {size} as the cloud, got {sample.mask.shape}")
    if not np.isfinite(sample.xyz).all():
        raise ValueError("xyz: should be finite with missing points (0, 0, 0), got NaN or infinity")
    if sample.background is not None and sample.background.shape != size:
        raise ValueError(f"background: should be {size} as the cloud, got {sample.background.shape}")


def _without_background(sample: Sample, background: BoolArray) -> Sample:
    xyz = sample.xyz.copy()
    xyz[background] = np.asarray(sample.info.get("background_value", (0, 0, 0)), dtype=np.float32)
    clean = replace(sample, rgb=sample.rgb.copy(), xyz=xyz, mask=sample.mask.copy(), background=None)
    record = {
        **_info(sample, clean),
        "plane_reason": "the dataset tells the background of its scans; no table was searched for",
        "removed_background_pixels": int(background.sum()),
    }
    return replace(clean, info=record)


def _round_up(length: int, multiple: int) -> int:
    return math.ceil(length / multiple) * multiple


def _pad(array: NDArray[Any], padding: Padding, mode: Any) -> NDArray[Any]:
    if not any(padding[0] + padding[1]):
        return array.copy()
    rest = ((0, 0),) * (array.ndim - 2)
    return np.pad(array, (*padding, *rest), mode=mode)


def _inside(padded: NDArray[Any], padding: Padding) -> NDArray[Any]:
    """The part of a padded array that is not padding, as a view."""
    (top, bottom), (left, right) = padding
    return padded[top : padded.shape[0] - bottom, left : padded.shape[1] - right]


def _find(xyz: FloatArray, config: PreprocessConfig) -> _Cleaning:
    plane, reason = _plane(xyz, config)
    table = np.zeros(xyz.shape[:2], dtype=bool) if plane is None else near_plane(xyz, plane, config.plane_removal)
    candidates = valid_pixels(xyz) & ~table
    debris = np.zeros_like(candidates)
    debris[candidates] = ~_object_points(xyz[candidates], config)
    return _Cleaning(plane, reason, table, debris)


def _plane(xyz: FloatArray, config: PreprocessConfig) -> tuple[NDArray[np.float64] | None, str | None]:
    points = edge_points(xyz, config.edge)
    if len(points) < config.plane_samples:
        return None, (
            f"{len(points)} points in the {config.edge} px border, {config.plane_samples} are needed to find a "
            "table; no table was removed (the scan may be clean already)"
        )
    plane = fit_plane(points, config.plane_distance, config.plane_samples, config.plane_iterations, config.seed)
    return plane, None if plane is not None else "no plane fits the points of the border; no table was removed"


def _object_points(points: FloatArray, config: PreprocessConfig) -> BoolArray:
    if config.debris == "none":
        return np.ones(len(points), dtype=bool)
    if config.debris == "dbscan":
        return largest_cluster(points, config.cluster_eps, config.cluster_min_points)
    return largest_component(points, config.cluster_eps, config.cluster_min_points)


def _info(
    sample: Sample,
    clean: Sample | None = None,
    cleaning: _Cleaning | None = None,
    pad: Padding = ((0, 0), (0, 0)),
    image_pad: Padding = ((0, 0), (0, 0)),
) -> dict[str, Any]:
    """The record of a cleaning, in plain values; without `cleaning` nothing was done."""
    before = int(valid_pixels(sample.xyz).sum())
    plane = cleaning.plane if cleaning else None
    return {
        **sample.info,
        "plane": None if plane is None else [float(value) for value in plane],
        "plane_reason": cleaning.plane_reason if cleaning else "protocol none",
        "removed_plane_pixels": _count_points(sample.xyz, cleaning.near_plane) if cleaning else 0,
        "removed_debris_pixels": int(cleaning.debris.sum()) if cleaning else 0,
        "pad": [pad[0][0], pad[1][0]],
        "image_pad": [image_pad[0][0], image_pad[1][0]],
        "scan_size": list(sample.mask.shape),
        "valid_before": before,
        "valid_after": before if clean is None else int(valid_pixels(clean.xyz).sum()),
    }


def _count_points(xyz: FloatArray, where: BoolArray) -> int:
    """Pixels of `where` that are not (0, 0, 0)."""
    x, y, z = xyz[..., 0], xyz[..., 1], xyz[..., 2]
    return int((where & ((x != 0) | (y != 0) | (z != 0))).sum())

"""A pseudo-anomalous scan from a good one: moved, damaged where noise says, colours blended in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mmad_cli.preprocessing.resize import nearest_indices, resize_rgb, resize_xyz, valid_pixels
from mmad_cli.pseudo import colour, geometry
from mmad_cli.pseudo.config import ALIGNED_CATEGORIES, Augmentation, stream
from mmad_cli.pseudo.masks import GRID, Region, draw_regions, moved
from mmad_cli.types import BoolArray, ByteArray, FloatArray, Sample

PSEUDO_MASK = "pseudo_mask"
"""Name of the mask among the arrays of an augmented feature: bool (224, 224), the damaged pixels."""

Kind = Literal["surface", "bump", "hole"]


@dataclass(frozen=True)
class _Scan:
    """Cloud and image of one size."""

    xyz: FloatArray
    rgb: ByteArray

    def at(self, height: int, width: int) -> _Scan:
        """Brought to another size."""
        if self.rgb.shape[:2] == (height, width):
            return self
        return _Scan(_cloud_at(self.xyz, (height, width)), resize_rgb(self.rgb, (height, width)))

    @property
    def on_grid(self) -> BoolArray:
        """Pixels with a point, on the grid that regions are drawn on."""
        return valid_pixels(resize_xyz(self.xyz, GRID, "center"))


def pseudo_anomaly(sample: Sample, augmentation: Augmentation, donors: Sequence[Sample] = ()) -> Sample:
    """A good clean scan with a pseudo anomaly; `mask` is true on the pixels that were damaged.

    donors: the scan whose image is blended in and the one whose surface is pasted; without, the scan itself, moved.
    The good scan is moved first (`augmentation.pose`). Bumps, holes and pasted surfaces share their regions with the
    blended image. `info["pseudo"]` names the kind. A pure function: the same arguments give the same scan.

    Raises ValueError for a scan without points. Source: G2SF (arXiv 2503.10091), the anomaly generation of its code.
    """
    rng = stream(augmentation, sample.category, sample.id)
    scan = _scan(sample)
    height, width = scan.rgb.shape[:2]
    texture, surface = _donors(scan, donors, rng)
    scan = _posed(scan, augmentation, sample.category, rng)
    target = scan.on_grid
    if not target.any():
        raise ValueError(f"sample: {sample.id} has no valid 3D point to make a pseudo anomaly from")
    kind = _kind(augmentation, rng)
    regions = draw_regions(target, surface.on_grid, augmentation.threshold, rng)
    xyz, changed = scan.xyz, np.zeros((height, width), dtype=bool)
    for region in regions:
        xyz, part = _damaged(xyz, region, kind, surface.xyz, rng)
        changed |= part
    image = _pasted_image(colour.changed_image(texture.rgb, rng), regions, (height, width))
    rgb = colour.blend(scan.rgb, image, changed, rng.uniform(*colour.BLEND))
    return replace(sample, rgb=rgb, xyz=xyz, mask=changed, info={**sample.info, "pseudo": kind})


def _scan(sample: Sample) -> _Scan:
    height, width = sample.rgb.shape[:2]
    if sample.xyz.shape[:2] == (height, width):
        return _Scan(sample.xyz, sample.rgb)
    # the `cfm` protocol may pad a cloud further than its image
    return _Scan(_cloud_at(sample.xyz, (height, width)), sample.rgb)


def _donors(scan: _Scan, donors: Sequence[Sample], rng: np.random.Generator) -> tuple[_Scan, _Scan]:
    """Texture and surface, at the size of the scan."""
    if donors:
        size = scan.rgb.shape[:2]
        return _scan(donors[0]).at(*size), _scan(donors[-1]).at(*size)
    pose = geometry.POSES["wide"].draw(rng)
    xyz, rgb = geometry.move(scan.xyz, scan.rgb, pose, points_too=True)
    moved_scan = _Scan(xyz, rgb)
    return moved_scan, moved_scan


def _posed(scan: _Scan, augmentation: Augmentation, category: str, rng: np.random.Generator) -> _Scan:
    name = augmentation.pose
    if name == "published":
        name = "narrow" if category in ALIGNED_CATEGORIES else "wide"
    pose = geometry.POSES[name].draw(rng)
    posed = _Scan(*geometry.move(scan.xyz, scan.rgb, pose, points_too=augmentation.geometry == "consistent"))
    # a part that was moved out of sight altogether stays where it was
    return posed if posed.on_grid.any() else scan


def _kind(augmentation: Augmentation, rng: np.random.Generator) -> Kind:
    draw = rng.random()
    if draw < augmentation.bump_probability:
        return "bump"
    return "hole" if draw < augmentation.bump_probability + augmentation.hole_probability else "surface"


def _damaged(
    xyz: FloatArray, region: Region, kind: Kind, surface: FloatArray, rng: np.random.Generator
) -> tuple[FloatArray, BoolArray]:
    """The cloud with one region damaged, and the pixels that changed."""
    mask, shift = _at_size(region.mask, xyz.shape[:2]), _scaled(region.shift, xyz.shape[:2])
    sign = 1.0 if rng.random() < 0.5 else -1.0
    if kind == "hole":
        return geometry.cut_hole(xyz, mask)
    if kind == "bump":
        inside = np.argwhere(mask & valid_pixels(xyz))
        if not len(inside):
            return xyz, np.zeros_like(mask)
        y, x = (int(i) for i in inside[rng.integers(len(inside))])
        height, width = rng.uniform(*geometry.AMPLITUDE), rng.uniform(*geometry.WIDTH)
        return geometry.raise_bump(xyz, (y, x), sign * height, width)
    return geometry.paste_surface(xyz, mask, surface, shift, sign * rng.uniform(*geometry.OFFSET))


def _pasted_image(image: ByteArray, regions: Sequence[Region], size: tuple[int, int]) -> ByteArray:
    """The donor's image with the pixels of moved regions where these are now."""
    out = image.copy()
    for region in regions:
        if region.shift == (0, 0):
            continue
        dy, dx = _scaled(region.shift, size)
        mask = _at_size(region.mask, size)
        ys, xs = np.nonzero(mask & moved(np.ones_like(mask), (dy, dx)))
        out[ys, xs] = image[ys - dy, xs - dx]
    return out


def _cloud_at(xyz: FloatArray, size: tuple[int, int]) -> FloatArray:
    rows, columns = (nearest_indices(old, new, "center") for old, new in zip(xyz.shape[:2], size, strict=True))
    return xyz[rows[:, None], columns[None, :]]


def _at_size(mask: BoolArray, size: tuple[int, ...]) -> BoolArray:
    rows, columns = (nearest_indices(GRID, side, "center") for side in size)
    return mask[rows[:, None], columns[None, :]]


def _scaled(shift: tuple[int, int], size: tuple[int, ...]) -> tuple[int, int]:
    return round(shift[0] * size[0] / GRID), round(shift[1] * size[1] / GRID)

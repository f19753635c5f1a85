"""Where a pseudo anomaly goes: thresholded Perlin noise on the object, in regions of bounded size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from mmad_cli.types import BoolArray

GRID = 224
"""Side of the grid on which regions are drawn, whatever the size of the scan."""

SMALLEST_REGION, LARGEST_REGION = 100, 1600
SMALLEST_TOTAL = 300
ON_OBJECT = 2 / 3

_OCTAVES = 5
_LATTICE = 64
_DRAWS = 60
_PATIENCE = 10
_LOWEST_THRESHOLD = 0.2
_FALLBACK_RADIUS = 10
_EIGHT = np.ones((3, 3), dtype=bool)


@dataclass(frozen=True)
class Region:
    """One damaged region: `mask` bool (224, 224) on the object, and how far it was moved, in pixels (y, x).

    The pixel that is pasted at p comes from p - shift of the donor.
    """

    mask: BoolArray
    shift: tuple[int, int] = (0, 0)


def perlin(size: int, frequency: tuple[int, int], angle: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Gradient noise (size, size) with `frequency` lattice cells along y and x, turned by `angle` radians.

    Scaled by sqrt 2, so that values reach about -1 and 1. Source: Perlin, "Improving noise", SIGGRAPH 2002; the scale
    as in DRAEM (Zavrtanik et al., ICCV 2021). Raises ValueError for a size or frequency below 1.
    """
    if size < 1 or min(frequency) < 1:
        raise ValueError(f"size, frequency: must be at least 1, got {size} and {frequency}")
    direction = rng.uniform(0, 2 * np.pi, (_LATTICE, _LATTICE))
    gradient = np.stack([np.sin(direction), np.cos(direction)])
    centred = (np.arange(size) + 0.5) / size - 0.5
    y, x = np.meshgrid(centred, centred, indexing="ij")
    turned = (
        (y * np.cos(angle) - x * np.sin(angle) + 0.5) * frequency[0],
        (y * np.sin(angle) + x * np.cos(angle) + 0.5) * frequency[1],
    )
    cell = [np.floor(axis).astype(np.int64) for axis in turned]
    inside = [axis - corner for axis, corner in zip(turned, cell, strict=True)]
    fade_y, fade_x = (t * t * t * (t * (t * 6 - 15) + 10) for t in inside)

    def corner(dy: int, dx: int) -> NDArray[np.float64]:
        at = gradient[:, (cell[0] + dy) % _LATTICE, (cell[1] + dx) % _LATTICE]
        product: NDArray[np.float64] = at[0] * (inside[0] - dy) + at[1] * (inside[1] - dx)
        return product

    upper = corner(0, 0) + fade_x * (corner(0, 1) - corner(0, 0))
    lower = corner(1, 0) + fade_x * (corner(1, 1) - corner(1, 0))
    noise: NDArray[np.float64] = np.sqrt(2) * (upper + fade_y * (lower - upper))
    return noise


def draw_regions(target: BoolArray, donor: BoolArray, threshold: float, rng: np.random.Generator) -> list[Region]:
    """Regions of a pseudo anomaly on the object.

    target, donor: bool (224, 224), pixels with a point of the damaged scan and of the one that is pasted from.
    Perlin noise above `threshold`, with 2^0 to 2^4 cells per axis, turned by up to 90 degrees either way, is cut to
    the donor; of its 8-connected components those of 100 to 1600 pixels stay. One that lies on the object with less
    than two thirds is moved to a random place of it. Drawn again until 300 pixels are on the object; the threshold
    falls by a tenth every ten draws, to 0.2 at least. An object too small for that gets the largest draw, or a disc.

    Returns a list that covers at least one pixel. Raises ValueError when target has no pixel. Source: G2SF
    (arXiv 2503.10091), the anomaly generation of its code.
    """
    if not target.any():
        raise ValueError("target: must have at least one pixel with a point, got none")
    best: list[Region] = []
    covered = 0
    for draw in range(_DRAWS):
        level = max(_LOWEST_THRESHOLD, threshold * 0.9 ** (draw // _PATIENCE))
        frequency = (2 ** int(rng.integers(_OCTAVES)), 2 ** int(rng.integers(_OCTAVES)))
        noise = perlin(GRID, frequency, rng.uniform(-np.pi / 2, np.pi / 2), rng)
        regions = [_placed(part, target, rng) for part in components((noise > level) & donor)]
        regions = [region for region in regions if region.mask.any()]
        total = int(union(regions).sum())
        if total > covered:
            best, covered = regions, total
        if covered >= SMALLEST_TOTAL:
            return best
    return best or [_disc(target, rng)]


def components(mask: BoolArray, smallest: int = SMALLEST_REGION, largest: int = LARGEST_REGION) -> list[BoolArray]:
    """8-connected components of a mask whose size in pixels is within the bounds, each as a mask."""
    labels, count = ndimage.label(mask, structure=_EIGHT)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    kept = [i for i in range(1, count + 1) if smallest <= sizes[i] <= largest]
    return [np.asarray(labels == i) for i in kept]


def union(regions: Sequence[Region]) -> BoolArray:
    """All pixels of the regions, bool (224, 224)."""
    mask = np.zeros((GRID, GRID), dtype=bool)
    for region in regions:
        mask |= region.mask
    return mask


def patch_labels(mask: BoolArray, grid: int) -> BoolArray:
    """Labels bool (grid * grid,) of the patches of a mask (H, W): widened by 3 x 3 pixels, then the pixel under each.

    Row-major; position (y, x) reads pixel (floor(y H / grid), floor(x W / grid)). Source: code of G2SF
    (arXiv 2503.10091).
    """
    height, width = mask.shape
    wide = ndimage.binary_dilation(mask, structure=_EIGHT)
    rows, columns = np.arange(grid) * height // grid, np.arange(grid) * width // grid
    return np.asarray(wide[rows[:, None], columns[None, :]].ravel())


def _placed(part: BoolArray, target: BoolArray, rng: np.random.Generator) -> Region:
    """A component cut to the object, moved first where too little of it lies there."""
    shift = (0, 0)
    if (part & target).sum() < ON_OBJECT * part.sum():
        ys, xs = np.nonzero(part)
        place = rng.choice(np.flatnonzero(target))
        shift = (int(place // GRID - round(ys.mean())), int(place % GRID - round(xs.mean())))
        part = moved(part, shift)
    return Region(part & target, shift)


def moved(mask: BoolArray, shift: tuple[int, int]) -> BoolArray:
    """A mask shifted by (y, x) pixels; what leaves the grid is lost."""
    out = np.zeros_like(mask)
    ys, xs = np.nonzero(mask)
    ys, xs = ys + shift[0], xs + shift[1]
    inside = (ys >= 0) & (ys < mask.shape[0]) & (xs >= 0) & (xs < mask.shape[1])
    out[ys[inside], xs[inside]] = True
    return out


def _disc(target: BoolArray, rng: np.random.Generator) -> Region:
    """A disc about a random pixel of the object."""
    place = rng.choice(np.flatnonzero(target))
    y, x = np.mgrid[:GRID, :GRID]
    near = (y - place // GRID) ** 2 + (x - place % GRID) ** 2 <= _FALLBACK_RADIUS**2
    return Region(np.asarray(near & target))

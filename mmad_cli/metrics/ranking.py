"""What every metric of this package is computed from: two sorted lists of scores.

Exact metrics need no sort of all pixels in one list. A ROC, precision-recall or per-region-overlap curve
changes its hit rate only at the score of a positive, so the number of negatives above each distinct positive
score says all. Ties follow the ROC convention: a threshold takes all equal scores together, wherever they
stand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import DTypeLike, NDArray
from scipy import ndimage

from mmad_cli.metrics.arrays import AnyArray, ImageStack, read_images
from mmad_cli.types import BoolArray, IndexArray

NO_IMAGES = "no test image"
NO_ANOMALOUS_IMAGE = "no anomalous test image"
NO_NORMAL_IMAGE = "no normal test image"
NO_DEFECT_PIXEL = "no defect pixel in any mask"
NO_NORMAL_PIXEL = "no normal pixel in any mask"

# Makes an array of a shape and type whose content does not matter, as numpy.empty does
Empty = Callable[[tuple[int, ...], DTypeLike], AnyArray]

EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=np.bool_)


@dataclass(frozen=True)
class OperatingPoints:
    """Counts at each distinct score t of a positive, from the highest down; all int64 (K,).

    `true_positives`: positives >= t. `false_positives`: negatives >= t. `false_positives_above`: negatives >
    t, the false positives that stand there before the group of scores equal to t is taken.
    """

    true_positives: IndexArray
    false_positives: IndexArray
    false_positives_above: IndexArray
    n_positives: int
    n_negatives: int


def operating_points(negatives: AnyArray, positives: AnyArray) -> OperatingPoints:
    """Count positives and negatives at each distinct positive score.

    negatives (N,) and positives (P,), both sorted ascending. Source: Fawcett, "An introduction to ROC
    analysis" (2006), algorithm 1, with equal scores taken together.
    """
    first = np.ones(len(positives), dtype=np.bool_)
    first[1:] = positives[1:] != positives[:-1]
    starts = np.flatnonzero(first)[::-1]
    thresholds = positives[starts]
    return OperatingPoints(
        true_positives=len(positives) - starts,
        false_positives=len(negatives) - np.searchsorted(negatives, thresholds, side="left"),
        false_positives_above=len(negatives) - np.searchsorted(negatives, thresholds, side="right"),
        n_positives=len(positives),
        n_negatives=len(negatives),
    )


def missing_image_class(labels: BoolArray) -> str | None:
    """Why image metrics are undefined, or None: they need at least one image of each class."""
    if not labels.size:
        return NO_IMAGES
    if not labels.any():
        return NO_ANOMALOUS_IMAGE
    return NO_NORMAL_IMAGE if labels.all() else None


@dataclass(frozen=True)
class RankedPixels:
    """All pixels of a category, sorted once and shared by every pixel metric.

    `normal` (N,) and `defect` (P,) are scores in ascending order. `overlap_above` float64 (P + 1,): entry k
    is the mean over regions of the fraction of the region's pixels among `defect[k:]`, so 1 first and 0 last.
    """

    normal: AnyArray
    defect: AnyArray
    overlap_above: NDArray[np.float64]
    n_regions: int
    n_images: int

    @property
    def undefined(self) -> str | None:
        """Why pixel metrics are undefined, or None: they need a normal and a defect pixel."""
        if not self.n_images:
            return NO_IMAGES
        if not self.defect.size:
            return NO_DEFECT_PIXEL
        return None if self.normal.size else NO_NORMAL_PIXEL

    @cached_property
    def points(self) -> OperatingPoints:
        """Counts at each distinct defect score."""
        return operating_points(self.normal, self.defect)


def label_regions(mask: BoolArray) -> tuple[IndexArray, int]:
    """8-connected regions of a mask (H, W): labels (H, W), 0 outside and 1.. inside, and their number."""
    labels, count = ndimage.label(mask, structure=EIGHT_NEIGHBOURS)
    return labels, int(count)


def rank_pixels(masks: ImageStack, maps: ImageStack, empty: Empty = np.empty) -> RankedPixels:
    """Sort the normal and the defect pixels of all images.

    masks bool and maps float, (N, H, W) or N arrays (H, W) of any sizes. `empty` makes the array of all normal
    pixels, for who wants it elsewhere than in memory. Raises ValueError on unequal shapes, masks with values other
    than 0 and 1, or non-finite maps.
    """
    images = read_images(masks, maps)
    # Most test images have a small defect or none: flat index lists are several times cheaper than masks
    insides = [np.flatnonzero(mask) for mask, _ in images]
    n_normal = sum(mask.size - len(inside) for (mask, _), inside in zip(images, insides, strict=True))
    normal = empty((n_normal,), np.result_type(np.float32, *{scores.dtype for _, scores in images}))
    defect: list[AnyArray] = []
    regions: list[IndexArray] = []
    n_regions = end = 0
    for (mask, scores), inside in zip(images, insides, strict=True):
        flat = scores.ravel()
        begin, end = end, end + len(flat) - len(inside)
        if not inside.size:
            normal[begin:end] = flat
            continue
        labels, count = label_regions(mask)
        normal[begin:end] = np.delete(flat, inside)
        defect.append(flat[inside])
        regions.append(labels.ravel()[inside] + (n_regions - 1))
        n_regions += count
    return _sorted_pixels(normal, defect, regions, n_regions, len(images))


def require_both_classes(pixels: RankedPixels) -> None:
    """Raise ValueError where no normal or no defect pixel exists."""
    if pixels.undefined:
        raise ValueError(f"masks must hold normal and defect pixels, got {pixels.undefined}")


def _sorted_pixels(
    normal: AnyArray, defect: list[AnyArray], regions: list[IndexArray], n_regions: int, n_images: int
) -> RankedPixels:
    normal.sort()
    defect_scores = _concatenate(defect)
    order = np.argsort(defect_scores)
    overlap_above = np.zeros(len(order) + 1)
    if n_regions:
        region = np.concatenate(regions)
        share = 1.0 / np.bincount(region)
        overlap_above[:-1] = np.cumsum(share[region[order[::-1]]])[::-1]
        # The shares of all pixels add up to the number of regions; dividing by the sum itself makes 1 exact
        overlap_above /= overlap_above[0]
    return RankedPixels(normal, defect_scores[order], overlap_above, n_regions, n_images)


def _concatenate(parts: list[AnyArray]) -> AnyArray:
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.float32)

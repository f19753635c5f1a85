"""Checks of what callers hand to the metrics: labels and scores, masks and maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmad_cli.types import BoolArray

AnyArray = NDArray[Any]
# One array (N, H, W), or N arrays (H, W) of any sizes
ImageStack = NDArray[Any] | Sequence[NDArray[Any]]


def read_labels(labels: ArrayLike) -> BoolArray:
    """Flat bool labels, true = anomalous. Raises ValueError where a label is not 0 or 1."""
    return _as_bool(np.asarray(labels).ravel(), "labels")


def read_scores(scores: ArrayLike) -> AnyArray:
    """Flat real scores, float32 or wider. Raises ValueError where a score is not finite."""
    array = _as_float(np.asarray(scores).ravel(), "scores")
    finite = np.isfinite(array)
    if not finite.all():
        first = int(np.argmin(finite))
        raise ValueError(f"scores must be finite, got {array[first]} at index {first}")
    return array


def read_labels_and_scores(labels: ArrayLike, scores: ArrayLike) -> tuple[BoolArray, AnyArray]:
    """Flat labels and scores of one shape. Raises ValueError where the shapes differ."""
    if np.shape(labels) != np.shape(scores):
        raise ValueError(f"labels and scores must have one shape, got {np.shape(labels)} and {np.shape(scores)}")
    return read_labels(labels), read_scores(scores)


def read_images(masks: ImageStack, maps: ImageStack) -> list[tuple[BoolArray, AnyArray]]:
    """Mask bool (H, W) and map float (H, W) of each image; views where nothing has to be converted.

    Raises ValueError where counts or shapes differ, a mask holds other values than 0 and 1, or a map is not
    finite.
    """
    if len(masks) != len(maps):
        raise ValueError(f"masks and maps must have one length, got {len(masks)} and {len(maps)}")
    return [_read_image(index, mask, scores) for index, (mask, scores) in enumerate(zip(masks, maps, strict=True))]


def _read_image(index: int, mask: ArrayLike, scores: ArrayLike) -> tuple[BoolArray, AnyArray]:
    mask = _as_bool(np.asarray(mask), f"masks[{index}]")
    scores = _as_float(np.asarray(scores), f"maps[{index}]")
    if mask.ndim != 2 or mask.shape != scores.shape:
        raise ValueError(
            f"masks and maps must be (N, H, W) or N arrays (H, W) of equal shapes, "
            f"got {mask.shape} and {scores.shape} at index {index}"
        )
    if not np.isfinite(scores).all():
        raise ValueError(f"maps must be finite, got nan or infinite values at index {index}")
    return mask, scores


def _as_bool(array: AnyArray, name: str) -> BoolArray:
    if array.dtype == np.bool_:
        return array
    flags = array.astype(np.bool_)
    other = array != flags
    if np.any(other):
        raise ValueError(f"{name} must be bool or hold only 0 and 1, got {array[other][0]}")
    return flags


def _as_float(array: AnyArray, name: str) -> AnyArray:
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name} must hold real numbers, got dtype {array.dtype}")
    # Widening keeps order and ties; it is there because half precision sorts and searches slowly
    return array.astype(np.result_type(array.dtype, np.float32), copy=False)

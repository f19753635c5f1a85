"""A contact sheet of pseudo anomalies: a row per scan, good and damaged, colours, normals and mask side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmad_cli.preprocessing.normals import organised_normals
from mmad_cli.preprocessing.resize import to_network_size
from mmad_cli.types import ByteArray, Sample

_GAP = 4
_MASK_COLOUR = np.array([255, 40, 40])


def contact_sheet(pairs: Sequence[tuple[Sample, Sample]], side: int = 160) -> ByteArray:
    """Picture uint8 (rows * (side + 4), 5 * (side + 4), 3).

    pairs: a good scan and a pseudo anomaly made from it, each a row: image, normals, then image, normals and mask of
    the pseudo anomaly. Raises ValueError without pairs.
    """
    if not pairs:
        raise ValueError("pairs: must hold at least one pair of scans, got none")
    rows = [np.concatenate([_framed(picture) for picture in _row(*pair, side)], axis=1) for pair in pairs]
    return np.concatenate(rows, axis=0)


def _row(good: Sample, damaged: Sample, side: int) -> list[ByteArray]:
    first, second = (to_network_size(sample, side, "center") for sample in (good, damaged))
    outlined = second.rgb.copy()
    outlined[second.mask] = (0.4 * outlined[second.mask] + 0.6 * _MASK_COLOUR).astype(np.uint8)
    return [first.rgb, _normals(first), second.rgb, _normals(second), outlined]


def _normals(sample: Sample) -> ByteArray:
    """Slopes of the surface as colours."""
    normals = organised_normals(sample.xyz)
    known = normals.any(axis=-1, keepdims=True)
    return np.asarray(np.where(known, (normals + 1) / 2 * 255, 0), dtype=np.uint8)


def _framed(picture: ByteArray) -> ByteArray:
    return np.pad(picture, ((0, _GAP), (0, _GAP), (0, 0)), constant_values=255)

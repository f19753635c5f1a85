"""Ground truth and maps in one geometry: the image region that a method covers, or scan size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmad_cli.methods.anomaly_map import bilinear_matrix
from mmad_cli.preprocessing.resize import NETWORK_SIZE, centre_crop_view, resize_mask
from mmad_cli.types import BoolArray, FloatArray, Sample

if TYPE_CHECKING:
    from mmad_cli.methods.base import View


def mask_in_view(clean: Sample, view: View, size: int = NETWORK_SIZE) -> BoolArray:
    """Mask bool (size, size) of a clean sample, resized as a whole or, at 224 only, as PatchCore's centre crop."""
    if view == "crop":
        return centre_crop_view(clean.rgb, clean.mask)[1]
    return resize_mask(clean.mask, size)


def map_at_size(anomaly_map: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """Anomaly map (h, w) brought to (H, W) bilinearly, half-pixel centres."""
    rows = bilinear_matrix(anomaly_map.shape[0], shape[0])
    columns = bilinear_matrix(anomaly_map.shape[1], shape[1])
    return np.asarray(rows @ anomaly_map @ columns.T, dtype=np.float32)

"""Restoration errors of MAFR, per pixel."""

from __future__ import annotations

import torch
from torch import Tensor

from mmad_cli.methods.mafr.networks import RestorationNetwork

# hidden layers of so many pixels stay in a processor's cache and still fill it with work
PIXEL_TILE = 2048


def residuals(
    network: RestorationNetwork, rgb: Tensor, points: Tensor, tile: int = PIXEL_TILE
) -> tuple[Tensor, Tensor]:
    """Euclidean distances (P,) between restored and given features, RGB and point; features are not normalised.

    rgb (P, C_rgb), points (P, C_pt), on the network's device. The network must be in evaluation mode, without
    dropout. Pixels go through it `tile` at a time, so memory beyond the features does not grow with P.
    Raises ValueError for tables of unequal length and for a tile below 1.
    Source: MAFR (arXiv 2510.21793), restoration errors, as its code computes them.
    """
    if len(rgb) != len(points):
        raise ValueError(f"rgb, points: must have equally many rows, got {len(rgb)} and {len(points)}")
    if tile < 1:
        raise ValueError(f"tile: must be at least 1, got {tile}")
    errors = rgb.new_empty((2, len(rgb)))
    with torch.no_grad():
        for begin in range(0, len(rgb), tile):
            rows = slice(begin, begin + tile)
            given = (rgb[rows], points[rows])
            for number, restored in enumerate(network(*given)):
                errors[number, rows] = torch.linalg.vector_norm(restored - given[number], dim=1)
    return errors[0], errors[1]

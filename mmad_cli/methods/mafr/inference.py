"""Restoration errors of MAFR, per pixel."""

from __future__ import annotations

import torch
from torch import Tensor

from mmad_cli.methods.mafr.networks import RestorationNetwork

# hidden layers of so many pixels stay in a processor's cache and still fill it with work
PIXEL_TILE = 2048


def residuals(
    network: RestorationNetwork, rgb: Tensor, points: Tensor, mixed: Tensor | None = None, tile: int = PIXEL_TILE
) -> tuple[Tensor, Tensor]:
    """Euclidean distances (P,) between restored and given features, RGB and point; features are not normalised.

    rgb (P, C_rgb), points (P, C_pt), on the network's device; mixed (P, width), what the encoder's first layer gives
    for them, where it is at hand. The network must be in evaluation mode, without dropout. Pixels go through it `tile`
    at a time, so memory beyond the features does not grow with P. Raises ValueError for tables of unequal length and
    for a tile below 1. Source: MAFR (arXiv 2510.21793), restoration errors, as its code computes them.
    """
    if len(rgb) != len(points) or (mixed is not None and len(mixed) != len(rgb)):
        rows = [len(table) for table in (rgb, points, mixed) if table is not None]
        raise ValueError(f"rgb, points, mixed: must have equally many rows, got {rows}")
    if tile < 1:
        raise ValueError(f"tile: must be at least 1, got {tile}")
    errors = rgb.new_empty((2, len(rgb)))
    with torch.no_grad():
        for begin in range(0, len(rgb), tile):
            rows_of = slice(begin, begin + tile)
            given = (rgb[rows_of], points[rows_of])
            first = network.encoder.mixed(*given) if mixed is None else mixed[rows_of]
            for number, restored in enumerate(network.after_first(first)):
                errors[number, rows_of] = torch.linalg.vector_norm(restored - given[number], dim=1)
    return errors[0], errors[1]

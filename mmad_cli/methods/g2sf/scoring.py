"""Scores of patches from what both banks found and the trained network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mmad_cli.methods.g2sf.network import LocalScaleNetwork
from mmad_cli.types import BoolArray, FloatArray, IndexArray

_TILE = 2048


@dataclass(frozen=True)
class Seen:
    """One modality of a scan: distinct rows (m, C), the row of each patch (n,), of each row its prototypes (m, J) among
    `bank` (M, C) and their distances (m, J), nearest first.
    """

    rows: FloatArray
    row: IndexArray
    neighbours: IndexArray
    distances: FloatArray
    bank: FloatArray


def patch_metrics(
    network: LocalScaleNetwork | None,
    units: Sequence[float],
    seen: Sequence[Seen],
    front: BoolArray,
    device: str = "cpu",
) -> FloatArray:
    """The metric of each patch to its prototypes of rank 0 to J - 1, float32 (n, J).

    units: distance of each modality that counts as 1. Without a network both global scales are 0.5; without one, and
    for patches outside of `front` (n,), local scales are 1.
    """
    distances = np.stack([one.distances[one.row] / unit for one, unit in zip(seen, units, strict=True)], axis=-1)
    local = np.ones_like(distances)
    shares = np.full(2, 0.5, dtype=np.float32)
    if network is not None:
        chosen = np.flatnonzero(front)
        with torch.inference_mode():
            for start in range(0, len(chosen), _TILE):
                tile = chosen[start : start + _TILE]
                prototypes = np.concatenate([one.bank[one.neighbours[one.row[tile]]] for one in seen], axis=-1)
                features = np.concatenate([one.rows[one.row[tile]] for one in seen], axis=-1)
                near, at = (torch.from_numpy(array).to(device) for array in (prototypes, features))
                local[tile] = network(at[:, None] - near, near).cpu().numpy()
            shares = network.global_scales().cpu().numpy()
    return np.asarray((local * distances * shares).sum(axis=-1), dtype=np.float32)


def over_ranks(metrics: FloatArray, aggregation: str) -> FloatArray:
    """Scores float32 (n,) from metrics (n, J): their `min`, `mean`, `max`, or that of the `nearest`."""
    if aggregation == "nearest":
        return np.asarray(metrics[:, 0])
    if aggregation == "mean":
        return np.asarray(metrics.mean(axis=1), dtype=np.float32)
    return np.asarray(metrics.max(axis=1) if aggregation == "max" else metrics.min(axis=1))

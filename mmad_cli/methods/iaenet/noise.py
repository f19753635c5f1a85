"""An expert that has failed: its scores are noise. For asking how much of that a fusion stands."""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np

from mmad_cli.methods.experts import Scan

SPREAD = 0.5


def with_noise(scan: Scan, expert: int, name: str) -> Scan:
    """The scan with the scores of one expert drawn at random, row by row of its features.

    A score is the median of the expert's foreground scores in this scan times exp(z / 2), z standard normal, so it has
    the usual size and says nothing of where a defect is. Distances to further prototypes grow as they did. The numbers
    come from the name of the scan, from `name`, which tells pseudo anomalies of one scan apart, and from the scores
    that they replace, since scans of other categories have the same names. Background scores stay.
    """
    look = scan.looks[expert]
    if not len(look.used):
        return scan
    nearest = look.distances[:, :1]
    rng = np.random.default_rng(zlib.crc32(nearest.tobytes(), zlib.crc32(f"{scan.id}/{name}/{expert}".encode())))
    middle = float(np.median(nearest[look.row]))
    drawn = (middle * np.exp(SPREAD * rng.standard_normal(nearest.shape))).astype(np.float32)
    growth = np.divide(look.distances, nearest, out=np.ones_like(look.distances), where=nearest > 0)
    scores = scan.scores.copy()
    scores[expert, scan.front] = drawn[look.row, 0]
    looks = list(scan.looks)
    looks[expert] = replace(look, distances=drawn * growth)
    return replace(scan, scores=scores, looks=tuple(looks))

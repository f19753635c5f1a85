"""The loss terms of G2SF (arXiv 2503.10091), as its code evaluates them; q is the metric or its square.

Labels are bool (B,), true for anomalous patches. A term whose patches are missing from the batch is 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SEPARATION_EPS = 1e-5
WEIGHT_RANGE = (0.33, 3.0)


def separation(q: Tensor, label: Tensor, largest: float, *, weighted: bool) -> Tensor:
    """Normal patches near 0, anomalous ones far: mean over the batch of w_n q and w_a (1 / (q + 1e-5) - 1 / M)_+.

    q (B,); largest: M, twice the largest distance of an anomalous patch. weighted: w_n = q^2 and
    w_a = 1 / (q + 1e-5)^2, both within 0.33 and 3 and with gradient; else 1, as printed.
    """
    inverse = 1 / (q + SEPARATION_EPS)
    normal, anomalous = q, torch.relu(inverse - 1 / largest)
    if weighted:
        normal = torch.clamp(q.square(), *WEIGHT_RANGE) * normal
        anomalous = torch.clamp(inverse.square(), *WEIGHT_RANGE) * anomalous
    return torch.where(label, anomalous, normal).mean()


def margin(q: Tensor, label: Tensor) -> Tensor:
    """No normal patch above the lowest anomalous one, no anomalous one below the highest normal one.

    q (B,) is divided by its largest value over the normals; then the sum over normals of (q - min_A q)_+ and over
    anomalous patches of (1 - q)_+, divided by B. 0 where the batch lacks either kind.
    """
    if label.all() or not label.any():
        return q.sum() * 0
    scaled = q / q[~label].max().clamp_min(SEPARATION_EPS)
    above = torch.relu(scaled[~label] - scaled[label].min()).sum()
    below = torch.relu(1 - scaled[label]).sum()
    return (above + below) / len(q)


def consistency(metrics: Tensor, distances: Tensor, proximal: int, factor: float) -> Tensor:
    """The metric grows with the rank of the prototype, near the patch about as the distance does.

    metrics (B, J) and mean distances of the modalities (B, J) to the prototypes of rank 0 to J - 1. For ranks 1 to
    `proximal`, the mean of (l_j - factor (s_j / s_0) l_0)_+, and for the ranks after it the mean of (l_0 - l_j)_+;
    each is averaged over its ranks.
    """
    first = metrics[:, :1]
    allowed = factor * distances / distances[:, :1].clamp_min(SEPARATION_EPS) * first
    near = torch.relu(metrics - allowed)[:, 1 : proximal + 1]
    far = torch.relu(first - metrics)[:, proximal + 1 :]
    return near.mean() + far.mean()


def scale(local: Tensor, label: Tensor) -> Tensor:
    """Large scales for anomalous patches, none above 1 for normal ones: mean_A (e - w) + mean_N (w - 1)_+.

    local (B, 2).
    """
    return _mean(math.e - local[label]) + _mean(torch.relu(local[~label] - 1))


def cross_modal(local: Tensor) -> Tensor:
    """Mismatched pairs of modalities get the largest scale: mean (e - w) over local scales (B, 2) of such pairs."""
    return (math.e - local).mean()


def l1(weights: list[Tensor]) -> Tensor:
    """Sum of the absolute values of weight matrices."""
    return torch.stack([weight.abs().sum() for weight in weights]).sum()


def _mean(values: Tensor) -> Tensor:
    return values.mean() if values.numel() else values.sum()

"""Masked losses between predicted and observed features of pixels.

Source: CMDR-IAD (arXiv 2603.03939), training losses, and its published code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmad_cli.methods.cmdr_iad.config import LossName

COSINE_EPS = 1e-6


def masked_loss(predicted: Tensor, observed: Tensor, valid: Tensor, loss: LossName = "cosine") -> Tensor:
    """Loss over the valid pixels, a scalar tensor; 0 when there is none.

    predicted, observed (..., C) of one shape; valid bool (...). `cosine`: 1 - mean cosine similarity, lengths below
    1e-6 counting as 1e-6. `l2`: mean Euclidean distance, which the published code defines but does not use.
    Raises ValueError for shapes that do not belong together.
    """
    if predicted.shape != observed.shape or valid.shape != predicted.shape[:-1]:
        shapes = f"{tuple(predicted.shape)}, {tuple(observed.shape)} and {tuple(valid.shape)}"
        raise ValueError(f"predicted, observed, valid: must be (..., C), (..., C) and (...), got {shapes}")
    if not valid.any():
        return predicted.sum() * 0.0
    return row_loss(predicted[valid], observed[valid], loss)


def row_loss(predicted: Tensor, observed: Tensor, loss: LossName = "cosine", count: int | None = None) -> Tensor:
    """`masked_loss` of rows (n, C) that are all valid.

    count: number of rows that the mean runs over, n by default; the losses of the parts of a table, each with the
    count of the whole, add up to the loss of the table.
    """
    count = len(predicted) if count is None else count
    if loss == "l2":
        total: Tensor = torch.linalg.vector_norm(predicted - observed, dim=1).sum()
        return total / count
    similar = nn.functional.cosine_similarity(predicted, observed, dim=1, eps=COSINE_EPS)
    return (1.0 - similar).sum() / count

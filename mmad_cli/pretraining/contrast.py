"""The training objective: a token is to be near its own in another view and far from altered and foreign ones."""

from __future__ import annotations

import torch
from torch.nn import functional


def contrast_loss(
    anchors: torch.Tensor,
    positives: torch.Tensor,
    altered: torch.Tensor,
    owner: torch.Tensor,
    altered_owner: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Mean over anchors of the cross-entropy of finding the own positive among all candidates.

    anchors, positives (N, C): tokens of length 1 of the same places in two views; owner int (N,): the scene each
    comes from. altered (M, C), altered_owner int (M,): tokens of places where a third view was altered. Candidates of
    an anchor are its positive, the positives of other scenes and all altered tokens; other places of its own scene
    may look the same and do not take part. Source: InfoNCE (arXiv 1807.03748), equation 4, with altered tokens as
    hard negatives.
    """
    logits = anchors @ torch.cat([positives, altered]).T / temperature
    same = owner[:, None] == owner[None, :]
    same.fill_diagonal_(False)
    allowed = torch.cat([~same, torch.ones(len(owner), len(altered_owner), dtype=torch.bool, device=same.device)], 1)
    logits = logits.masked_fill(~allowed, float("-inf"))
    return functional.cross_entropy(logits, torch.arange(len(anchors), device=logits.device))


def separation(
    anchors: torch.Tensor, positives: torch.Tensor, twins: torch.Tensor, twins_altered: torch.Tensor
) -> torch.Tensor:
    """Area under the ROC curve of telling altered from unaltered places by their distance to the anchor.

    All (N, C); `twins` are the tokens of the third view at the anchors' places, altered where `twins_altered` (N,).
    """
    sound = (anchors - positives).square().sum(dim=1)
    broken = (anchors - twins).square().sum(dim=1)[twins_altered]
    if not len(broken):
        return sound.new_tensor(float("nan"))
    order = torch.cat([sound, broken]).argsort().argsort().to(torch.float64) + 1
    ranks = order[len(sound) :].sum()
    return (ranks - len(broken) * (len(broken) + 1) / 2) / (len(broken) * len(sound))

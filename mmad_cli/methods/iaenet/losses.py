"""The five losses of the importance-aware fusion, each over the foreground patches of a batch. All are ours.

They follow the two aims that the abstract of IAENet (arXiv 2508.20492) names: use what the experts know together, and
keep what one of them alone knows. u (n, K) are the experts' scores, where 1 is an expert's own false-alarm level; fused
(n,) the joined score S, weights (n, K) with which it was joined; label bool (n,), true for anomalous patches. Means
over anomalous and normal patches count the same, however many there are; a mean over no patch is 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from mmad_cli.methods.iaenet.config import IAENetConfig

# of the largest score, which must be left of a defect that one expert alone sees
KEPT = 0.8
# below the false-alarm level, where the false alarm of one expert must end
QUIET = 0.9
DISAGREEMENT = 1.2
_SMALLEST = 1e-6


def detection(log_odds: Tensor, label: Tensor) -> Tensor:
    """Cross entropy: half the mean of -log p over anomalous, half that of -log(1 - p) over normal patches.

    log_odds (n,), of which p is the sigmoid.
    """
    return 0.5 * (_mean(F.softplus(-log_odds), label) + _mean(F.softplus(log_odds), ~label))


def collective(u: Tensor, fused: Tensor, label: Tensor) -> Tensor:
    """Never separate worse than the plain mean m of the experts.

    mean_A (m - S)_+ / (1 + m) + mean_N (S - m)_+ / (1 + m).
    """
    mean = u.mean(dim=-1)
    below, above = (torch.relu(value) / (1 + mean) for value in (mean - fused, fused - mean))
    return _mean(below, label) + _mean(above, ~label)


def strengths(u: Tensor, fused: Tensor, label: Tensor) -> Tensor:
    """A defect that one expert alone sees survives, a false alarm of one expert alone does not.

    With U the largest and D the smallest score of a patch: mean_A 1[U > 1] (0.8 U - S)_+ / U
    + mean_N 1[U > 1 and D <= 1] (S - 0.9)_+.
    """
    largest, smallest = u.amax(dim=-1), u.amin(dim=-1)
    fires = largest > 1
    lost = torch.relu(KEPT * largest - fused) / largest.clamp_min(_SMALLEST)
    return _mean(fires * lost, label) + _mean(fires * (smallest <= 1) * torch.relu(fused - QUIET), ~label)


def importance(u: Tensor, weights: Tensor, label: Tensor, temperature: float) -> Tensor:
    """The expert that is right gets the weight, where experts disagree (U / D > 1.2).

    Mean of KL(t || w), t = softmax(y log u / temperature) with y = 1 for anomalous and -1 for normal patches; weights
    that do not sum to 1 are divided by their sum. Both kinds of patch count the same.
    """
    largest, smallest = u.amax(dim=-1), u.amin(dim=-1)
    disagree = largest > DISAGREEMENT * smallest
    sign = label.to(u.dtype) * 2 - 1
    target = torch.log_softmax(sign[:, None] * torch.log(u.clamp_min(_SMALLEST)) / temperature, dim=-1)
    given = torch.log((weights / weights.sum(dim=-1, keepdim=True)).clamp_min(_SMALLEST))
    divergence = (target.exp() * (target - given)).sum(dim=-1)
    return _balanced(divergence, label, disagree)


def balance(weights: Tensor, label: Tensor) -> Tensor:
    """No expert is forgotten: KL of the mean weights to equal ones. Both kinds of patch count the same."""
    shares = weights / weights.sum(dim=-1, keepdim=True)
    everyone = torch.ones_like(label)
    mean = torch.stack([_balanced(share, label, everyone) for share in shares.unbind(dim=-1)])
    return (mean * torch.log(mean.clamp_min(_SMALLEST))).sum() + math.log(len(mean))


def total(
    u: Tensor, fused: Tensor, weights: Tensor, log_odds: Tensor, label: Tensor, config: IAENetConfig
) -> tuple[Tensor, Mapping[str, float]]:
    """Weighted sum of the five, and the value of each by name."""
    terms = {
        "det": (config.loss_det, detection(log_odds, label)),
        "col": (config.loss_col, collective(u, fused, label)),
        "str": (config.loss_str, strengths(u, fused, label)),
        "imp": (config.loss_imp, importance(u, weights, label, config.temperature)),
        "bal": (config.loss_bal, balance(weights, label)),
    }
    joined = torch.stack([factor * value for factor, value in terms.values()]).sum()
    return joined, {"total": float(joined.detach()), **{name: float(v.detach()) for name, (_, v) in terms.items()}}


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean of some of the values; 0, with a gradient of 0, of none."""
    return (values * chosen).sum() / chosen.sum().clamp_min(1)


def _balanced(values: Tensor, label: Tensor, chosen: Tensor) -> Tensor:
    """Mean of the means over the kinds of patch that there are."""
    kinds = [label & chosen, ~label & chosen]
    found = torch.stack([kind.any() for kind in kinds]).sum().clamp_min(1)
    return torch.stack([_mean(values, kind) for kind in kinds]).sum() / found

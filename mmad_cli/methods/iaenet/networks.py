"""Networks that say how much each expert counts in each patch, and what is made of it. All sizes are ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WeightKind = Literal["softmax", "sigmoid", "scaled"]

CHANNELS = 32
SCORE_DROPOUT = 0.1
EMBEDDING = 64
SCORE_EMBEDDING = 16
FEATURE_HIDDEN = 128
FEATURE_DROPOUT = 0.5
CONTEXT = 3

# where the probability of an anomaly starts: 1/2 at a fused score of 1, and how fast it rises
_SLOPE = 5.0


def context(scores: Tensor) -> Tensor:
    """log(1 + u) of each expert, its mean and its largest value over 3 x 3 cells: (B, K, G, G) to (B, 3, K, G, G).

    Outside the grid there is nothing: the mean is over the cells that exist.
    """
    levels = torch.log1p(scores)
    mean = F.avg_pool2d(levels, 3, stride=1, padding=1, count_include_pad=False)
    return torch.stack([levels, mean, F.max_pool2d(levels, 3, stride=1, padding=1)], dim=1)


class ScoreNetwork(nn.Module):
    """Logits from scores and their neighbourhood (IAF-S).

    Convolutions 3 x 3 from 3 K to 32 and to 32 channels with ReLU, dropout, 1 x 1 to K: 11 971 parameters for three
    experts. The last layer starts at zero, so all experts count the same at first.
    """

    def __init__(self, experts: int, dropout: float = SCORE_DROPOUT) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(CONTEXT * experts, CHANNELS, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
            nn.ReLU(),
            nn.Dropout(dropout),
        )
        self.last = nn.Conv2d(CHANNELS, experts, 1)
        _zero(self.last)

    def forward(self, scores: Tensor) -> Tensor:
        """Logits (B, K, G, G) from scores (B, K, G, G) >= 0, 0 in the background."""
        logits: Tensor = self.last(self.layers(context(scores).flatten(1, 2)))
        return logits


class FeatureNetwork(nn.Module):
    """Logits from what the experts looked at (IAF-F).

    For each expert the unit direction from prototype to feature (d -> 64), the prototype (d -> 64) and the context of
    its scores (3 -> 16) side by side, 144 -> 128 -> 64; then one scorer for all experts, on an expert's embedding and
    the mean of all: 128 -> 64 -> 1. Its last layer starts at zero.

    channels: of each expert's features.
    """

    def __init__(self, channels: Sequence[int], dropout: float = FEATURE_DROPOUT) -> None:
        super().__init__()
        self.direction = nn.ModuleList(nn.Linear(width, EMBEDDING) for width in channels)
        self.prototype = nn.ModuleList(nn.Linear(width, EMBEDDING) for width in channels)
        self.score = nn.ModuleList(nn.Linear(CONTEXT, SCORE_EMBEDDING) for _ in channels)
        joined = 2 * EMBEDDING + SCORE_EMBEDDING
        self.joined = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(),
                nn.Linear(joined, FEATURE_HIDDEN),
                nn.ReLU(),
                nn.Dropout(dropout),
                nn.Linear(FEATURE_HIDDEN, EMBEDDING),
                nn.ReLU(),
            )
            for _ in channels
        )
        self.scorer = nn.Sequential(nn.Linear(2 * EMBEDDING, EMBEDDING), nn.ReLU())
        self.last = nn.Linear(EMBEDDING, 1)
        _zero(self.last)

    def forward(self, features: Sequence[Tensor], prototypes: Sequence[Tensor], contexts: Tensor) -> Tensor:
        """Logits (n, K).

        features and prototypes: (n, C) of each expert, on the scale of its bank divided by the size of a prototype;
        contexts (n, K, 3).
        """
        embedded = []
        for k, (feature, prototype) in enumerate(zip(features, prototypes, strict=True)):
            direction = F.normalize(feature - prototype, dim=-1)
            parts = (self.direction[k](direction), self.prototype[k](prototype), self.score[k](contexts[:, k]))
            embedded.append(self.joined[k](torch.cat(parts, dim=-1)))
        experts = torch.stack(embedded, dim=1)
        everyone = experts.mean(dim=1, keepdim=True).expand_as(experts)
        logits: Tensor = self.last(self.scorer(torch.cat([experts, everyone], dim=-1)))
        return logits.squeeze(-1)


class Fusion(nn.Module):
    """Weights of the experts from logits, the fused score, and the probability of an anomaly for the loss.

    network: gives the logits. kind: `softmax` weights sum to 1; `sigmoid`: 2 sigmoid(a) / K; `scaled`: exp(tanh a)
    times a global share of each expert. With logits of 0 all of them give the plain mean.
    """

    def __init__(self, network: nn.Module, experts: int, kind: WeightKind = "softmax") -> None:
        super().__init__()
        self.network, self.experts, self.kind = network, experts, kind
        self.share = nn.Parameter(torch.zeros(experts))
        self.alpha = nn.Parameter(torch.tensor(math.log(math.expm1(_SLOPE))))
        self.beta = nn.Parameter(torch.tensor(_SLOPE * math.log(2)))

    def weights(self, logits: Tensor) -> Tensor:
        """Weights (..., K) from logits (..., K)."""
        if self.kind == "softmax":
            return torch.softmax(logits, dim=-1)
        if self.kind == "sigmoid":
            return 2 * torch.sigmoid(logits) / self.experts
        return torch.exp(torch.tanh(logits)) * torch.softmax(self.share, dim=-1)

    def log_odds(self, fused: Tensor) -> Tensor:
        """softplus(alpha) log(1 + S) - beta, of which the sigmoid is the probability of an anomaly."""
        return F.softplus(self.alpha) * torch.log1p(fused.clamp_min(0)) - self.beta


def over_foreground(logits: Tensor, front: Tensor, level: str) -> Tensor:
    """Logits (n, K) of the foreground cells of maps (B, K, G, G), scan by scan in raster order.

    front bool (B, G, G). level `image`: the mean over the scan's foreground in each of them.
    """
    if level == "image":
        share = front / front.sum(dim=(1, 2), keepdim=True).clamp_min(1)
        logits = (logits * share[:, None]).sum(dim=(2, 3), keepdim=True).expand_as(logits)
    return logits.permute(0, 2, 3, 1)[front]


def _zero(layer: nn.Conv2d | nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)

"""The local scale prediction network (LSPN) and the metric that it makes of two distances."""

from __future__ import annotations

import torch
from torch import Tensor, nn

HIDDEN = 512
EMBEDDING = 128
MODALITIES = 2
DIRECTION_LENGTH = 5.0
DIRECTION_EPS = 1e-3


class LocalScaleNetwork(nn.Module):
    """Local scales of both modalities from a direction and a pair of prototypes, and the two global scales.

    Two perceptrons C -> 512 -> 128, one for the direction and one for the prototypes, then 256 -> 256 -> 2; ReLU and
    dropout after each hidden layer. w = exp(tanh(.)), in [1/e, e]. With the 768 + 1152 channels of the paper there are
    2 164 738 parameters in them, and the two of the global scales. Source: G2SF (arXiv 2503.10091), its code.
    """

    def __init__(self, channels: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.channels = channels
        self.direction = _perceptron(channels, HIDDEN, EMBEDDING, dropout)
        self.prototype = _perceptron(channels, HIDDEN, EMBEDDING, dropout)
        self.head = _perceptron(2 * EMBEDDING, 2 * EMBEDDING, MODALITIES, dropout)
        self.global_scale = nn.Parameter(torch.zeros(MODALITIES))

    def forward(self, difference: Tensor, prototypes: Tensor) -> Tensor:
        """Local scales (..., 2).

        difference: feature minus prototype of both modalities side by side (..., C); prototypes (..., C) likewise.
        """
        direction = DIRECTION_LENGTH * nn.functional.normalize(difference, dim=-1, eps=DIRECTION_EPS)
        joined = torch.cat([self.direction(direction), self.prototype(prototypes)], dim=-1)
        scales: Tensor = torch.exp(torch.tanh(self.head(joined)))
        return scales

    def global_scales(self) -> Tensor:
        """Weights (2,) of the modalities: (tanh g + 1) / 2, divided by their sum."""
        share = 0.5 * (torch.tanh(self.global_scale) + 1)
        return share / share.sum()

    def linear_weights(self) -> list[Tensor]:
        """Weight matrices of all linear layers."""
        return [module.weight for module in self.modules() if isinstance(module, nn.Linear)]


def metric(local: Tensor, distances: Tensor, scales: Tensor) -> Tensor:
    """l = sum over modalities of local scale x distance x global scale: (..., 2), (..., 2), (2,) to (...).

    With local scales of 1 it is the weighted sum of the two scores of the memory banks.
    """
    return (local * distances * scales).sum(dim=-1)


def _perceptron(inputs: int, hidden: int, outputs: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, outputs))

"""The networks of CMDR-IAD in training: each with an optimiser and a loss of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mmad_cli.methods.cmdr_iad.config import STREAMS, LossName, NetworkName
from mmad_cli.methods.cmdr_iad.losses import masked_loss, row_loss
from mmad_cli.methods.cmdr_iad.networks import Mapper, RGBDecoder
from mmad_cli.methods.mapping.dense import DenseFeatures

# pixels that go through a mapper at a time: 63 MB per hidden layer
_TILE = 16384


class CmdrLearner:
    """Up to four networks by name and the loss that each of them is trained with, over valid pixels only.

    pixels: so many valid pixels of a batch, drawn anew in each step, enter the losses, and with them the layers that
    see single pixels; None: all, as published.
    """

    def __init__(
        self, networks: Mapping[NetworkName, nn.Module], loss: LossName = "cosine", pixels: int | None = None
    ) -> None:
        self.networks = dict(networks)
        self.loss, self.pixels = loss, pixels

    @property
    def groups(self) -> Mapping[str, nn.Module]:
        """Every network is a group of its own."""
        return {str(name): network for name, network in self.networks.items()}

    def backward(self, batch: Sequence[DenseFeatures]) -> dict[str, dict[str, float]]:
        """Add the gradients of every network's loss, averaged over the chosen pixels of the whole batch.

        A batch without a valid pixel has losses 0 and gradients 0.
        """
        chosen = self._chosen(torch.stack([features.valid for features in batch]))
        streams = {name: torch.stack([_stream(features, name) for features in batch]) for name in self._needed()}
        losses: dict[str, dict[str, float]] = {}
        for name, network in self.networks.items():
            inputs, targets = (streams[stream] for stream in STREAMS[name])
            losses[name] = {self.loss: self._backward(network, inputs, targets, chosen)}
        return losses

    def _needed(self) -> set[str]:
        return {stream for name in self.networks for stream in STREAMS[name]}

    def _chosen(self, valid: Tensor) -> Tensor:
        """Pixels (B, N) that the losses are taken over."""
        if self.pixels is None or int(valid.sum()) <= self.pixels:
            return valid
        index = torch.nonzero(valid.view(-1)).squeeze(1)
        drawn = torch.zeros_like(valid.view(-1))
        # drawn on the CPU, so that all devices draw the same
        drawn[index[torch.randperm(len(index))[: self.pixels].to(index.device)]] = True
        return drawn.view(valid.shape)

    def _backward(self, network: nn.Module, inputs: Tensor, targets: Tensor, chosen: Tensor) -> float:
        if isinstance(network, Mapper):
            return self._backward_in_tiles(network, inputs[chosen], targets[chosen])
        if isinstance(network, RGBDecoder):
            rows = network(inputs, chosen)
            loss = row_loss(rows, targets[chosen], self.loss) if len(rows) else rows.sum()
        else:
            loss = masked_loss(network(inputs), targets, chosen, self.loss)
        loss.backward()
        return float(loss.detach())

    def _backward_in_tiles(self, mapper: Mapper, inputs: Tensor, targets: Tensor) -> float:
        """Loss of all rows, with gradients added tile by tile: those of the whole, in bounded memory."""
        total = 0.0
        for begin in range(0, max(len(inputs), 1), _TILE):
            rows = mapper(inputs[begin : begin + _TILE])
            part = row_loss(rows, targets[begin : begin + _TILE], self.loss, max(len(inputs), 1))
            part.backward()  # type: ignore[no-untyped-call]
            total += float(part.detach())
        return total


def _stream(features: DenseFeatures, name: str) -> Tensor:
    stream = features.rgb if name == "rgb" else features.points
    if stream is None:
        raise ValueError(f"features: {name} is needed by one of the networks, got None")
    return stream

"""The mappers of CFM, their training and their errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mmad_cli.methods.mapping.config import POINTS, RGB
from mmad_cli.methods.mapping.dense import DenseFeatures

# hidden layers between the first and the last
DEPTHS = {"base": ("projection",), "big": tuple(f"projection_{letter}" for letter in "abcde")}
COSINE_EPS = 1e-6
LENGTH_EPS = 1e-12

# pixels that go through the networks at a time: their hidden layers stay in a processor's cache
_TILE = 2048


class Mapper(nn.Module):
    """A perceptron per pixel that predicts features of one modality from those of the other.

    The hidden width is the mean of both. Layer names are those of the published checkpoints. `base` has 3 linear
    layers, `big` 7. Source: CFM (arXiv 2312.04521), feature mapping networks, and its code.
    """

    def __init__(self, inputs: int, outputs: int, depth: Literal["base", "big"] = "base") -> None:
        super().__init__()
        hidden = (inputs + outputs) // 2
        self.input = nn.Linear(inputs, hidden)
        self.between = DEPTHS[depth]
        for name in self.between:
            self.add_module(name, nn.Linear(hidden, hidden))
        self.output = nn.Linear(hidden, outputs)

    def forward(self, features: Tensor) -> Tensor:
        """(n, inputs) to (n, outputs)."""
        return self.after_first(self.input(features))

    def after_first(self, first: Tensor) -> Tensor:
        """The rest, from what the first linear layer gives (n, hidden)."""
        hidden = nn.functional.gelu(first)
        for name in self.between:
            hidden = nn.functional.gelu(self.get_submodule(name)(hidden))
        predicted: Tensor = self.output(hidden)
        return predicted


class CfmLearner:
    """Both mappers under one optimiser and the loss that trains them."""

    def __init__(self, channels: Mapping[str, int], depth: Literal["base", "big"], pixels: int | None) -> None:
        rgb, points = channels[RGB], channels[POINTS]
        self.to_points = Mapper(rgb, points, depth)
        self.to_rgb = Mapper(points, rgb, depth)
        self.pixels = pixels

    @property
    def groups(self) -> Mapping[str, nn.Module]:
        """One optimiser for both; they share no parameters, so two would do the same."""
        return {"mapping": nn.ModuleDict({"2Dto3D": self.to_points, "3Dto2D": self.to_rgb})}

    def backward(self, batch: Sequence[DenseFeatures]) -> dict[str, dict[str, float]]:
        """1 - mean cosine over the valid pixels of the whole batch, for each mapper."""
        rgb, points = self._valid(batch)
        losses = {
            "2Dto3D": _backward(self.to_points, rgb, points),
            "3Dto2D": _backward(self.to_rgb, points, rgb),
        }
        return {"mapping": losses}

    def _valid(self, batch: Sequence[DenseFeatures]) -> tuple[Tensor, Tensor]:
        """Features of valid pixels, (n, C2) and (n, C3); the others are in no loss."""
        chosen = []
        for features in batch:
            index = torch.nonzero(features.valid).squeeze(1)
            if self.pixels is not None and len(index) > self.pixels:
                index = index[torch.randperm(len(index))[: self.pixels].to(index.device)]
            chosen.append([stream[index] for stream in features.both()])
        rgb, points = (torch.cat(parts) for parts in zip(*chosen, strict=True))
        return rgb, points


def _backward(mapper: Mapper, inputs: Tensor, targets: Tensor) -> float:
    """Loss over all rows, with gradients added tile by tile: those of the whole, in bounded memory."""
    count = len(inputs)
    if not count:
        return float("nan")
    total = 0.0
    for begin in range(0, count, _TILE):
        predicted = mapper(inputs[begin : begin + _TILE])
        similar = nn.functional.cosine_similarity(predicted, targets[begin : begin + _TILE], dim=1, eps=COSINE_EPS)
        part = similar.sum() / count
        (-part).backward()  # type: ignore[no-untyped-call]
        total += float(part.detach())
    return 1.0 - total


def chord_lengths(predicted: Tensor, observed: Tensor) -> Tensor:
    """Euclidean distance (n,) of two sets of rows (n, C) after scaling each row to length 1."""
    one = nn.functional.normalize(predicted, dim=1, eps=LENGTH_EPS)
    other = nn.functional.normalize(observed, dim=1, eps=LENGTH_EPS)
    lengths: Tensor = torch.linalg.vector_norm(one - other, dim=1)
    return lengths


def mapping_errors(mapper: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Chord lengths (n,) between what a mapper predicts from (n, C_in) and (n, C_out), tile by tile."""
    parts = [
        chord_lengths(mapper(inputs[begin : begin + _TILE]), targets[begin : begin + _TILE])
        for begin in range(0, len(inputs), _TILE)
    ]
    return torch.cat(parts) if parts else inputs.new_zeros(0)


def errors_after(mapper: Mapper, first: Tensor, targets: Tensor) -> Tensor:
    """Chord lengths (n,) between prediction and target, from the output of the mapper's first layer (n, hidden)."""
    parts = [
        chord_lengths(mapper.after_first(first[begin : begin + _TILE]), targets[begin : begin + _TILE])
        for begin in range(0, len(first), _TILE)
    ]
    return torch.cat(parts) if parts else first.new_zeros(0)

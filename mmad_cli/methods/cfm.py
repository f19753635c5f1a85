"""CFM (CVPR 2024, arXiv 2312.04521): each modality's features predicted from the other's, per pixel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmad_cli.methods.base import MethodDefinition
from mmad_cli.methods.mapping.dense import POINTS, RGB, DenseFeatures, Tokens
from mmad_cli.methods.mapping.method import CORRECTED, FAST, MappingConfig, MappingMethod
from mmad_cli.methods.mapping.trainer import Learner

if TYPE_CHECKING:
    from numpy.typing import NDArray

# hidden layers between the first and the last
DEPTHS = {"base": ("projection",), "big": tuple(f"projection_{letter}" for letter in "abcde")}
COSINE_EPS = 1e-6
LENGTH_EPS = 1e-12

# pixels that go through the networks at a time: their hidden layers stay in a processor's cache
_TILE = 2048


class CfmConfig(MappingConfig):
    """Switches of CFM; the defaults are those of the published checkpoints for MVTec 3D-AD, `big` of Eyecandies."""

    variant: Literal["base", "big"] = "base"
    epochs: int = Field(default=250, ge=1)
    batch_size: int = Field(default=4, ge=1)
    # so many valid pixels of each sample, drawn anew in each step; None: all, as published
    pixels_per_step: int | None = Field(default=None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _published_with_variant(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("variant") == "big":
            return {"epochs": 50, "batch_size": 2, **data}
        return data


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


class Cfm(MappingMethod):
    """Crossmodal feature mapping: a pixel is anomalous when both predictions disagree with the observation."""

    def __init__(self, config: CfmConfig, device: str = "cpu") -> None:
        super().__init__(config, device)
        self.config = config

    def build_learner(self, channels: dict[str, int]) -> CfmLearner:
        """The two mappers."""
        return CfmLearner(channels, self.config.variant, self.config.pixels_per_step)

    def errors(self, learner: Learner, features: DenseFeatures) -> NDArray[np.floating]:
        """Product of both mapping errors, computed where it is not zero."""
        if not isinstance(learner, CfmLearner):
            raise TypeError(f"learner: expected CfmLearner, got {type(learner).__name__}")
        rgb, points = features.both()
        valid = features.valid
        seen, felt = rgb[valid], points[valid]
        product = mapping_errors(learner.to_rgb, felt, seen) * mapping_errors(learner.to_points, seen, felt)
        errors = torch.zeros(features.side * features.side, device=valid.device)
        errors[valid] = product
        return np.asarray(errors.reshape(features.side, features.side).cpu().numpy())

    def sample_errors(self, learner: Learner, tokens: Tokens) -> NDArray[np.floating]:
        """`errors` from tokens: valid pixels only, and the first layers are applied to tokens instead of pixels."""
        if not isinstance(learner, CfmLearner):
            raise TypeError(f"learner: expected CfmLearner, got {type(learner).__name__}")
        pixels = self.reader.valid_pixels(tokens)
        seen, felt = pixels.rgb, pixels.points
        to_points, to_rgb = learner.to_points.input, learner.to_rgb.input
        product = _errors_after(learner.to_points, pixels.rgb_mapped(to_points.weight) + to_points.bias, felt)
        product *= _errors_after(learner.to_rgb, pixels.points_mapped(to_rgb.weight) + to_rgb.bias, seen)
        side = self.config.grid
        errors = torch.zeros(side * side, device=product.device)
        errors[pixels.index] = product
        return np.asarray(errors.reshape(side, side).cpu().numpy())


def _errors_after(mapper: Mapper, first: Tensor, targets: Tensor) -> Tensor:
    """Chord lengths (n,) between prediction and target, from the output of the mapper's first layer (n, hidden)."""
    parts = [
        chord_lengths(mapper.after_first(first[begin : begin + _TILE]), targets[begin : begin + _TILE])
        for begin in range(0, len(first), _TILE)
    ]
    return torch.cat(parts) if parts else first.new_zeros(0)


_FAST: dict[str, Any] = {**FAST, "pixels_per_step": 512, "batch_size": 4}

DEFINITION = MethodDefinition(
    name="cfm",
    title="CFM",
    version=1,
    config=CfmConfig,
    build=Cfm,
    variants={
        "base": "mappers of 3 linear layers, 250 epochs (MVTec 3D-AD)",
        "big": "mappers of 7 linear layers; the published Eyecandies numbers are of 50 epochs and batch 2",
    },
    default_variant="base",
    modalities={"base": "RGB+3D", "big": "RGB+3D"},
    protocol="cfm",
    recipes={"official": {}, "corrected": CORRECTED, "fast": _FAST},
    source="arXiv 2312.04521",
    libraries=("numpy", "scipy", "torch"),
    notes=(
        "The published extractor runs in training mode; here its batch statistics are kept and stochastic depth is "
        "off, so features are deterministic (point_droppath=on draws it).",
        "The training script says 50 epochs, the published checkpoints 250; the default is that of the checkpoints.",
        "The recipe fast works on a grid of 56 x 56 for 10 epochs, for machines without a GPU; not comparable.",
    ),
)

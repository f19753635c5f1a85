"""MAFR: networks that fuse and restore both modalities' features of a pixel; what they restore badly is anomalous."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmad_cli.methods.base import MethodDefinition
from mmad_cli.methods.mafr.inference import residuals
from mmad_cli.methods.mafr.losses import TERMS, modality_terms
from mmad_cli.methods.mafr.networks import (
    DROPOUT,
    POINT_CHANNELS,
    PUBLISHED_NETWORKS,
    RGB_CHANNELS,
    RestorationNetwork,
)
from mmad_cli.methods.mapping.dense import POINTS, RGB, DenseFeatures, Tokens
from mmad_cli.methods.mapping.method import CORRECTED, FAST, MappingConfig, MappingMethod
from mmad_cli.methods.mapping.trainer import Learner

if TYPE_CHECKING:
    from numpy.typing import NDArray

# measured at the published widths: bytes per pixel of a training step, with activations held and computed again, and
# of weights, gradients and Adam's moments
_STEP_BYTES = 180_000
_RECOMPUTED_STEP_BYTES = 70_000
_NETWORK_BYTES = 4 * 4 * 13_383_676


class MafrConfig(MappingConfig):
    """Switches of MAFR; the defaults are those of its training script."""

    variant: Literal["rgb+3d"] = "rgb+3d"
    # the published inference program names 250 as well
    epochs: int = Field(default=100, ge=1)
    dropout: float = Field(default=DROPOUT, ge=0, lt=1)
    # `none`: background counts in the loss, as published, though the map is masked; `valid`: valid pixels only
    loss_mask: Literal["none", "valid"] = "none"
    # `first_two`: the smoothness term looks at two of the channels only, as published
    smoothness_channels: Literal["first_two", "all"] = "first_two"
    similarity_weight: float = Field(default=1.0, ge=0)
    smoothness_weight: float = Field(default=1.0, ge=0)
    census_weight: float = Field(default=1.0, ge=0)
    # side of a square window of the grid, drawn anew in each step around a valid pixel; None: all, as published
    window: int | None = Field(default=None, ge=8)
    # so many pixels go through the networks at a time and again for their gradient: half the memory for a fifth more
    # time, with the same gradients but for dropout's draws; None: all at once
    recompute_tile: int | None = Field(default=None, ge=1)

    def weights(self) -> dict[str, float]:
        """Weight of each term of the loss, the same for both modalities."""
        return {term: getattr(self, f"{term}_weight") for term in TERMS}


class MafrLearner:
    """The networks under one optimiser and the loss that trains them."""

    def __init__(self, channels: Mapping[str, int], config: MafrConfig) -> None:
        self.network = RestorationNetwork(channels[RGB], channels[POINTS], config.dropout)
        self.config = config

    @property
    def groups(self) -> Mapping[str, nn.Module]:
        """One optimiser for encoder and decoders; under their published names, so that these are what is saved."""
        parts = {theirs: self.network.get_submodule(ours) for theirs, ours in PUBLISHED_NETWORKS.items()}
        return {"restoration": nn.ModuleDict(parts)}

    def backward(self, batch: Sequence[DenseFeatures]) -> dict[str, dict[str, float]]:
        """Weighted sum of the six terms, averaged over the images; one image at a time is in memory."""
        sums: dict[str, float] = {}
        for features in batch:
            terms = self.terms(features if self.config.window is None else window(features, self.config.window))
            total = torch.stack(
                [self.config.weights()[name.split("_")[0]] * term for name, term in terms.items()]
            ).sum()
            (total / len(batch)).backward()  # type: ignore[no-untyped-call]
            for name, value in {**terms, "total": total}.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) / len(batch)
        return {"restoration": sums}

    def terms(self, features: DenseFeatures) -> dict[str, Tensor]:
        """The six terms of one image, scalars, named `<term>_<modality>`."""
        given = dict(zip((RGB, POINTS), features.both(), strict=True))
        valid = features.valid if self.config.loss_mask == "valid" else None
        restored = self._restored(given[RGB], given[POINTS], valid)
        by_modality = {
            name: modality_terms(restored[name], given[name], features.side, valid, self.config.smoothness_channels)
            for name in given
        }
        return {f"{term}_{name}": by_modality[name][term] for term in TERMS for name in given}

    def _restored(self, rgb: Tensor, points: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        """Restored features of every pixel; with a mask, of valid ones, the others as given."""
        if valid is None:
            return dict(zip((RGB, POINTS), self._through(rgb, points), strict=True))
        parts = self._through(rgb[valid], points[valid])
        index = torch.nonzero(valid)[:, 0]
        return {
            name: whole.index_copy(0, index, part)
            for name, whole, part in zip((RGB, POINTS), (rgb, points), parts, strict=True)
        }

    def _through(self, rgb: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        tile = self.config.recompute_tile
        if tile is None:
            restored: tuple[Tensor, Tensor] = self.network(rgb, points)
            return restored
        parts = [
            checkpoint(self.network, *rows, use_reentrant=False)
            for rows in zip(torch.split(rgb, tile), torch.split(points, tile), strict=True)
        ]
        of_rgb, of_points = (torch.cat(column) for column in zip(*parts, strict=True))
        return of_rgb, of_points


def window(features: DenseFeatures, size: int) -> DenseFeatures:
    """A random square of `size` pixels with a valid pixel in it; all of the features when they are no larger.

    Drawn from PyTorch's current random stream.
    """
    side = features.side
    if size >= side:
        return features
    inside = torch.nonzero(features.valid)[:, 0]
    pixel = int(inside[int(torch.randint(len(inside), ()))]) if len(inside) else int(torch.randint(side * side, ()))
    top, left = (min(max(centre - size // 2, 0), side - size) for centre in divmod(pixel, side))

    def cut(table: Tensor) -> Tensor:
        image = table.reshape(side, side, -1)[top : top + size, left : left + size]
        return image.reshape(size * size, -1)

    rgb, points = features.both()
    return DenseFeatures(cut(rgb), cut(points), cut(features.valid)[:, 0], size)


class Mafr(MappingMethod):
    """Fusion restoration: a pixel is anomalous when neither of its features is restored from both."""

    def __init__(self, config: MafrConfig, device: str = "cpu") -> None:
        super().__init__(config, device)
        self.config = config

    def build_learner(self, channels: dict[str, int]) -> MafrLearner:
        """Encoder and decoders."""
        return MafrLearner(channels, self.config)

    def errors(self, learner: Learner, features: DenseFeatures) -> NDArray[np.floating]:
        """Product of both restoration errors, computed where it is not zero."""
        rgb, points = features.both()
        valid = features.valid
        of_rgb, of_points = residuals(_network(learner), rgb[valid], points[valid])
        return _image(of_rgb * of_points, torch.nonzero(valid)[:, 0], features.side)

    def sample_errors(self, learner: Learner, tokens: Tokens) -> NDArray[np.floating]:
        """`errors` from tokens: valid pixels only, and the first layer is applied to tokens instead of pixels."""
        network, pixels = _network(learner), self.reader.valid_pixels(tokens)
        for_rgb, for_points = network.encoder.input_weights()
        mixed = pixels.rgb_mapped(for_rgb) + pixels.points_mapped(for_points) + network.encoder.input_fc.bias
        of_rgb, of_points = residuals(network, pixels.rgb, pixels.points, mixed)
        return _image(of_rgb * of_points, pixels.index, self.config.grid)

    def memory_estimate(self, n_train: int) -> int:
        """What a training step holds, the networks with their optimiser, and kept tokens."""
        config = self.config
        side = config.grid if config.window is None else min(config.window, config.grid)
        per_pixel = _STEP_BYTES if config.recompute_tile is None else _RECOMPUTED_STEP_BYTES
        dense = config.grid**2 * (RGB_CHANNELS + POINT_CHANNELS) * 4
        tokens = min(n_train * 10_000_000, 1 << 30)
        return side**2 * per_pixel + dense + _NETWORK_BYTES + tokens


def _network(learner: Learner) -> RestorationNetwork:
    if not isinstance(learner, MafrLearner):
        raise TypeError(f"learner: expected MafrLearner, got {type(learner).__name__}")
    return learner.network.eval()


def _image(values: Tensor, index: Tensor, side: int) -> NDArray[np.floating]:
    """Values (n,) at flat indices (n,) of an image (side, side) that is zero elsewhere."""
    image = torch.zeros(side * side, device=values.device)
    image[index] = values
    return np.asarray(image.reshape(side, side).cpu().numpy())


_CORRECTED: dict[str, Any] = {**CORRECTED, "loss_mask": "valid", "smoothness_channels": "all"}
_FAST: dict[str, Any] = {**FAST, "window": 14, "epochs": 30}

DEFINITION = MethodDefinition(
    name="mafr",
    title="MAFR",
    version=1,
    config=MafrConfig,
    build=Mafr,
    variants={"rgb+3d": "both features fused and restored (the published method)"},
    default_variant="rgb+3d",
    modalities={"rgb+3d": "RGB+3D"},
    protocol="cfm",
    recipes={"official": {}, "corrected": _CORRECTED, "fast": _FAST},
    source="arXiv 2510.21793",
    libraries=("numpy", "scipy", "torch"),
    notes=(
        "The published extractor runs in training mode; here its batch statistics are kept and stochastic depth is "
        "off, so features are deterministic (point_droppath=on draws it).",
        "Training script and documentation say 100 epochs, the published inference program 250; the default is 100.",
        "The recipe fast works on a grid of 56 x 56, in windows of 14 x 14, for 30 epochs; not comparable.",
    ),
)

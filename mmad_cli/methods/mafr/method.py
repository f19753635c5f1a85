"""MAFR: networks that fuse and restore both modalities' features of a pixel; what they restore badly is anomalous."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mmad_cli.methods.base import MethodDefinition
from mmad_cli.methods.mafr.config import POINT_CHANNELS, RGB_CHANNELS, MafrConfig
from mmad_cli.methods.mapping.config import CORRECTED, FAST
from mmad_cli.methods.mapping.method import MappingMethod

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mmad_cli.methods.mafr.learner import MafrLearner
    from mmad_cli.methods.mafr.networks import RestorationNetwork
    from mmad_cli.methods.mapping.dense import DenseFeatures, Tokens
    from mmad_cli.methods.mapping.trainer import Learner

# measured at the published widths: bytes per pixel of a training step, with activations held and computed again, and
# of weights, gradients and Adam's moments
_STEP_BYTES = 180_000
_RECOMPUTED_STEP_BYTES = 70_000
_NETWORK_BYTES = 4 * 4 * 13_383_676


class Mafr(MappingMethod):
    """Fusion restoration: a pixel is anomalous when neither of its features is restored from both."""

    def __init__(self, config: MafrConfig, device: str = "cpu") -> None:
        super().__init__(config, device)
        self.config = config

    def build_learner(self, channels: dict[str, int]) -> MafrLearner:
        """Encoder and decoders."""
        from mmad_cli.methods.mafr.learner import MafrLearner

        return MafrLearner(channels, self.config)

    def errors(self, learner: Learner, features: DenseFeatures) -> NDArray[np.floating]:
        """Product of both restoration errors, computed where it is not zero."""
        import torch

        from mmad_cli.methods.mafr.inference import residuals
        from mmad_cli.methods.mapping.dense import pixel_image

        rgb, points = features.both()
        valid = features.valid
        of_rgb, of_points = residuals(_network(learner), rgb[valid], points[valid])
        return pixel_image(of_rgb * of_points, torch.nonzero(valid)[:, 0], features.side)

    def sample_errors(self, learner: Learner, tokens: Tokens) -> NDArray[np.floating]:
        """`errors` from tokens: valid pixels only, and the first layer is applied to tokens instead of pixels."""
        from mmad_cli.methods.mafr.inference import residuals
        from mmad_cli.methods.mapping.dense import pixel_image

        network, pixels = _network(learner), self.reader.valid_pixels(tokens)
        for_rgb, for_points = network.encoder.input_weights()
        mixed = pixels.rgb_mapped(for_rgb) + pixels.points_mapped(for_points) + network.encoder.input_fc.bias
        of_rgb, of_points = residuals(network, pixels.rgb, pixels.points, mixed)
        return pixel_image(of_rgb * of_points, pixels.index, self.config.grid)

    def memory_estimate(self, n_train: int) -> int:
        """What a training step holds, the networks with their optimiser, and kept tokens."""
        config = self.config
        side = config.grid if config.window is None else min(config.window, config.grid)
        per_pixel = _STEP_BYTES if config.recompute_tile is None else _RECOMPUTED_STEP_BYTES
        dense = config.grid**2 * (RGB_CHANNELS + POINT_CHANNELS) * 4
        tokens = min(n_train * 10_000_000, 1 << 30)
        return side**2 * per_pixel + dense + _NETWORK_BYTES + tokens


def _network(learner: Learner) -> RestorationNetwork:
    from mmad_cli.methods.mafr.learner import MafrLearner

    if not isinstance(learner, MafrLearner):
        raise TypeError(f"learner: expected MafrLearner, got {type(learner).__name__}")
    return learner.network.eval()


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

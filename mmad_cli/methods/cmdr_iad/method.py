"""CMDR-IAD (arXiv 2603.03939): mapping between the modalities and a reconstruction of each, joined by two gates."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mmad_cli.methods.base import MAP_SIZE, MethodDefinition, Prediction, SampleFeatures
from mmad_cli.methods.cmdr_iad.config import (
    POLYURETHANE_SMOOTHING,
    RGB_SMOOTHING,
    STREAMS,
    CmdrIadConfig,
    Variant,
)
from mmad_cli.methods.mapping.config import CORRECTED, FAST, POINTS, RGB
from mmad_cli.methods.mapping.method import MappingMethod
from mmad_cli.methods.mapping.scoring import SMOOTHING, at_map_size, smooth

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mmad_cli.methods.cmdr_iad.learner import CmdrLearner
    from mmad_cli.methods.cmdr_iad.scan import Scan
    from mmad_cli.methods.mapping.dense import DenseFeatures, DenseReader, Tokens
    from mmad_cli.methods.mapping.trainer import Learner

# peak bytes per pixel of a training step beyond networks and features (measured as resident memory)
_STEP_BYTES = {"rgb_decoder": 70_000, "point_decoder": 45_000, "rgb_to_points": 12_000, "points_to_rgb": 12_000}


class CmdrIad(MappingMethod):
    """Cross-modal mapping and dual-branch reconstruction: a pixel is anomalous when both kinds of error say so."""

    def __init__(self, config: CmdrIadConfig, device: str = "cpu") -> None:
        super().__init__(config, device)
        self.config = config

    @property
    def streams(self) -> tuple[str, ...]:
        """Which of the two features are read; for a mask from the points, these too."""
        read = {stream for name in self.config.networks for stream in STREAMS[name]}
        if self.config.variant == "rgb" and self.config.rgb_mask == "points":
            read.add(POINTS)
        return tuple(stream for stream in (RGB, POINTS) if stream in read)

    @property
    def smoothing(self) -> tuple[int, ...]:
        """Windows of the box means that the errors of the variant go through."""
        match self.config.variant:
            case "rgb":
                return RGB_SMOOTHING
            case "3d":
                return self.config.points_smoothing
        return SMOOTHING if self.config.final_smoothing == "code" else RGB_SMOOTHING

    @property
    def reader(self) -> DenseReader:
        """How features are brought to pixels; the cloud of a chunk has its own size."""
        reader = super().reader
        return replace(reader, cloud_size=self.config.chunk_side) if self.config.variant == "polyurethane" else reader

    def point_settings(self) -> dict[str, Any]:
        """Settings of the point backbone."""
        settings = {**super().point_settings(), "fps_start": self.config.fps_start, "fps_seed": self.config.fps_seed}
        return {**settings, "size": self.config.chunk_side} if self.config.variant == "polyurethane" else settings

    def build_learner(self, channels: dict[str, int]) -> CmdrLearner:
        """The networks of the variant."""
        from mmad_cli.methods.cmdr_iad.learner import CmdrLearner
        from mmad_cli.methods.cmdr_iad.networks import new_networks

        config = self.config
        networks = new_networks(
            channels.get(RGB, 0), channels.get(POINTS, 0), config.grid, config.dropout, names=config.networks
        )
        return CmdrLearner(networks, config.loss, config.pixels_per_step)

    def errors(self, learner: Learner, features: DenseFeatures) -> NDArray[np.floating]:
        """Joined error (224, 224) of the four networks, or that of the only one on the features' grid."""
        from mmad_cli.methods.cmdr_iad.scan import DenseScan

        return self._scan_errors(learner, DenseScan(features.rgb, features.points, features.valid))

    def sample_errors(self, learner: Learner, tokens: Tokens) -> NDArray[np.floating]:
        """`errors` from tokens; with both streams the first layers are applied to tokens instead of pixels."""
        if self.config.variant != "rgb+3d":
            return super().sample_errors(learner, tokens)
        from mmad_cli.methods.cmdr_iad.scan import TokenScan

        return self._scan_errors(learner, TokenScan(self.reader, tokens))

    @property
    def drops_missing(self) -> bool:
        """Whether a sample without one modality is scored by the other."""
        return self.config.variant == "rgb+3d" and self.config.missing_modality == "drop"

    def predict(self, sample: SampleFeatures) -> Prediction:
        """Score one sample, by one modality where the other is missing and `missing_modality` is `drop`.

        Raises RuntimeError before `fit` or `load`, DataError where features do not fit.
        """
        if self.drops_missing:
            left = self._present(sample)
            if len(left) == 1:
                return self._by_one(sample, left[0])
        return super().predict(sample)

    def scored(self, errors: NDArray[np.floating]) -> Prediction:
        """Prediction from errors: smoothed and scaled as the variant does it."""
        if self.config.variant == "polyurethane":
            return self._chunk_scored(errors)
        prediction = super().scored(errors)
        if self.config.image_score == "mean" and self.config.normaliser == "per_metric":
            return replace(prediction, image_score=float(prediction.anomaly_map.max()) * prediction.aupro_scale)
        return prediction

    def memory_estimate(self, n_train: int) -> int:
        """Features, kept tokens and the activations of the hungriest network; steps are one after the other."""
        pixels = self.config.grid**2 * min(self.config.batch_size, max(n_train, 1))
        return super().memory_estimate(n_train) + pixels * max(_STEP_BYTES[name] for name in self.config.networks)

    def _scan_errors(self, learner: Learner, scan: Scan) -> NDArray[np.floating]:
        from mmad_cli.methods.cmdr_iad.inference import fuse, scan_errors
        from mmad_cli.methods.cmdr_iad.learner import CmdrLearner

        if not isinstance(learner, CmdrLearner):
            raise TypeError(f"learner: expected CmdrLearner, got {type(learner).__name__}")
        side = self.config.grid
        networks = {name: learner.networks[name] for name in self.config.networks}
        maps = {name: error.view(side, side).cpu().numpy() for name, error in scan_errors(networks, scan).items()}
        if self.config.variant != "rgb+3d":
            return maps[self.config.networks[0]]
        valid = nearest(scan.valid.view(side, side).cpu().numpy(), MAP_SIZE)
        return fuse({name: at_map_size(error) for name, error in maps.items()}, valid).fused

    def _chunk_scored(self, errors: NDArray[np.floating]) -> Prediction:
        from mmad_cli.methods.cmdr_iad.inference import polyurethane_map

        scales = self.config.normaliser == "per_metric"
        anomaly = polyurethane_map(errors) if scales else smooth(errors, POLYURETHANE_SMOOTHING)
        return Prediction(nearest(anomaly, MAP_SIZE).astype(np.float32), float(anomaly.max()))

    def _present(self, sample: SampleFeatures) -> tuple[str, ...]:
        """Streams that the sample has; both when it has neither, so that reading it tells what is wrong."""
        present = tuple(stream for stream in (RGB, POINTS) if _has(sample, stream))
        return present or (RGB, POINTS)

    def _by_one(self, sample: SampleFeatures, stream: str) -> Prediction:
        """Scored as the variant of one modality does it; its scale is not that of samples with both."""
        import torch

        variant: Variant = "rgb" if stream == RGB else "3d"
        alone = CmdrIad(self.config.model_copy(update={"variant": variant, "rgb_mask": "none"}), self.device)
        with torch.inference_mode():
            found = alone.scored(alone.errors(self._fitted(), alone.reader(sample)))
        other = "3D" if stream == RGB else "RGB"
        return replace(found, note=f"scored by {'RGB' if stream == RGB else '3D'} alone, {other} is missing")


def _has(sample: SampleFeatures, stream: str) -> bool:
    """Whether a sample has a feature; one without a valid point has no point features."""
    try:
        arrays = sample[stream]
    except KeyError:
        return False
    return stream == RGB or len(arrays["pixel"]) > 0


def nearest(values: NDArray[Any], size: int) -> NDArray[Any]:
    """A square map (side, side) at another size: the pixel under the middle of every target pixel, as for masks."""
    side = len(values)
    if side == size:
        return values
    index = ((np.arange(size) + 0.5) * side / size).astype(np.int64)
    return values[np.ix_(index, index)]


_FAST: dict[str, Any] = {**FAST, "pixels_per_step": 512}

DEFINITION = MethodDefinition(
    name="cmdr_iad",
    title="CMDR-IAD",
    version=1,
    config=CmdrIadConfig,
    build=CmdrIad,
    variants={
        "rgb+3d": "both mappers and both decoders",
        "rgb": "the RGB decoder alone",
        "3d": "the point decoder alone",
        "polyurethane": "the point decoder on chunks of 9216 points of the polyurethane cutting set",
    },
    default_variant="rgb+3d",
    modalities={"rgb+3d": "RGB+3D", "rgb": "RGB", "3d": "3D", "polyurethane": "3D"},
    protocol="cfm",
    recipes={"official": {}, "corrected": CORRECTED, "fast": _FAST},
    source="arXiv 2603.03939",
    libraries=("numpy", "scipy", "torch"),
    notes=(
        "The published extractor runs in training mode; here its batch statistics are kept and stochastic depth is "
        "off, so features are deterministic (point_droppath=on draws it).",
        "The published code has no variants rgb and 3d on images with clouds; how they smooth and mask follows the "
        "paper's pictures.",
        "Where the paper's figures and its code differ (smoothing, image score, last layers) the code is followed.",
        "The recipe fast works on a grid of 56 x 56 for 10 epochs, for machines without a GPU; not comparable.",
    ),
)

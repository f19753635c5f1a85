"""The base of CFM, MAFR and CMDR-IAD: frozen features, networks trained per category, errors per pixel.

PyTorch is imported where something is computed: what is stored already is shown without.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmad_cli.errors import DataError
from mmad_cli.methods.base import (
    BankSize,
    FeatureSet,
    Prediction,
    ProgressCallback,
    SampleFeatures,
    View,
)
from mmad_cli.methods.mapping.config import POINTS, RGB, MappingConfig
from mmad_cli.methods.mapping.scoring import SMOOTHING, at_map_size, scaled, smooth

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mmad_cli.backbones.specs import FeatureSpec
    from mmad_cli.methods.mapping.dense import DenseFeatures, DenseReader, Tokens
    from mmad_cli.methods.mapping.trainer import Learner

# of DINO ViT-B/8 and of Point-MAE
PUBLISHED_CHANNELS = {RGB: 768, POINTS: 1152}

NETWORKS_FILE = "networks.safetensors"
_STATE_FILE = "state.json"

_FLOAT32_BYTES = 4
# of a ViT-B and of the point networks
_ALL_BLOCKS = 12


class MappingMethod(ABC):
    """Networks trained on dense features of one category. Subclasses build them and turn features into errors.

    Fitted: `learner_`, the networks; `curves_`, the mean of each loss term per epoch.
    """

    learner_: Learner
    curves_: dict[str, list[float]]

    def __init__(self, config: MappingConfig, device: str = "cpu") -> None:
        self.settings = config
        self.device = device

    @property
    def view(self) -> View:
        """The whole scan."""
        return "resize"

    @property
    def streams(self) -> tuple[str, ...]:
        """Which of the two features are read."""
        return (RGB, POINTS)

    @property
    def smoothing(self) -> tuple[int, ...]:
        """Windows of the box means that the errors go through."""
        return SMOOTHING

    @abstractmethod
    def build_learner(self, channels: dict[str, int]) -> Learner:
        """Fresh networks for so many channels of each stream, drawn from PyTorch's current random stream."""

    @abstractmethod
    def errors(self, learner: Learner, features: DenseFeatures) -> NDArray[np.floating]:
        """Errors (side, side) of one sample before smoothing, non-negative, zero where nothing is valid."""

    def features(self) -> dict[str, FeatureSpec]:
        """Tokens of the RGB network, tokens and geometry of the point network."""
        from mmad_cli.backbones.specs import FeatureSpec

        config, specs = self.settings, {}
        if POINTS in self.streams:
            specs[POINTS] = FeatureSpec.point(config.point_backbone, **self.point_settings())
        if RGB in self.streams:
            specs[RGB] = FeatureSpec.timm(
                config.rgb_backbone,
                outputs=None,
                norm=config.rgb_norm,
                size=config.rgb_size,
                blocks=None if config.blocks == _ALL_BLOCKS else config.blocks,
            )
        return specs

    def point_settings(self) -> dict[str, Any]:
        """Settings of the point backbone."""
        config = self.settings
        names = ("groups", "group_size", "point_bn", "point_droppath", "droppath_seed", "idw", "xyz_resize")
        return {name: getattr(config, name) for name in (*names, "fps_skip_origin", "blocks")}

    @property
    def reader(self) -> DenseReader:
        """How features are brought to pixels."""
        from mmad_cli.methods.mapping.dense import DenseReader

        config = self.settings
        return DenseReader(
            side=config.grid,
            streams=self.streams,
            channel_sum=config.valid_mask == "channel_sum",
            device=self.device,
        )

    def fit(
        self,
        train: FeatureSet,
        validation: FeatureSet,
        *,
        seed: int,
        progress: ProgressCallback | None = None,
    ) -> None:
        """Train on the good samples; `validation` is not read. Raises DataError without training samples."""
        self.fit_resumable(train, validation, seed=seed, folder=None, progress=progress)

    def fit_resumable(
        self,
        train: FeatureSet,
        validation: FeatureSet,
        *,
        seed: int,
        folder: Path | None,
        progress: ProgressCallback | None = None,
    ) -> None:
        """`fit` with a checkpoint in `folder` after each epoch, from which a later call goes on."""
        from mmad_cli.methods.mapping.dense import DenseSet
        from mmad_cli.methods.mapping.trainer import train as run_training

        if len(train) == 0:
            raise DataError("there are no training samples; training needs at least one good sample")
        data = DenseSet(train, self.reader)
        learner = self._fresh(self.reader.tokens(train[0]).channels, seed)
        self.curves_ = run_training(
            learner,
            data,
            self.settings.trainer(),
            seed=seed,
            folder=folder,
            identity=self.settings.model_dump_json(),
            device=self.device,
            progress=progress,
        )
        self.learner_ = learner

    def losses(self) -> dict[str, list[float]]:
        """Mean of every loss term per epoch."""
        return self.curves_

    def predict(self, sample: SampleFeatures) -> Prediction:
        """Score one sample. Raises RuntimeError before `fit` or `load`, DataError where features do not fit."""
        import torch

        learner = self._fitted()
        tokens = self.reader.tokens(sample)
        if tokens.channels != self._trained_channels:
            raise DataError(
                f"{sample.id}: features have {tokens.channels} channels, the networks were trained on "
                f"{self._trained_channels}; fit again with the same features"
            )
        with torch.inference_mode():
            errors = self.sample_errors(learner, tokens)
        return self.scored(errors)

    def sample_errors(self, learner: Learner, tokens: Tokens) -> NDArray[np.floating]:
        """`errors` of a sample, from its tokens."""
        return self.errors(learner, self.reader.assemble(tokens))

    def scored(self, errors: NDArray[np.floating]) -> Prediction:
        """Prediction from errors: smoothed and scaled as configured."""
        smoothed = smooth(at_map_size(errors), self.smoothing)
        if self.settings.normaliser == "per_metric":
            return scaled(smoothed)
        return Prediction(smoothed.astype("float32"), float(smoothed.max()))

    def banks(self) -> dict[str, BankSize]:
        """None: what is fitted is networks."""
        return {}

    def save(self, folder: Path) -> None:
        """Write networks and loss curves into an existing empty folder."""
        from safetensors.torch import save_file

        tensors = {
            f"{name}/{key}": value.detach().cpu().contiguous().clone()
            for name, module in self._fitted().groups.items()
            for key, value in module.state_dict().items()
        }
        save_file(tensors, str(folder / NETWORKS_FILE))
        state = {"channels": self._trained_channels, "losses": self.curves_}
        (folder / _STATE_FILE).write_text(json.dumps(state) + "\n")

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, or networks alone, which are taken for ones on the published features.

        Raises DataError when the networks are not those of this configuration.
        """
        from safetensors.torch import load_file

        file = folder / _STATE_FILE
        state: dict[str, Any] = {"channels": {name: PUBLISHED_CHANNELS[name] for name in self.streams}, "losses": {}}
        if file.is_file():
            state = json.loads(file.read_text())
        learner = self._fresh(state["channels"], 0)
        tensors = load_file(str(folder / NETWORKS_FILE))
        for name, module in learner.groups.items():
            own = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
            try:
                module.load_state_dict(own)
            except RuntimeError as error:
                raise DataError(f"{folder / NETWORKS_FILE}: not the networks of this configuration: {error}") from error
            module.to(self.device).requires_grad_(False).eval()
        self.learner_, self.curves_ = learner, state["losses"]

    def memory_estimate(self, n_train: int) -> int:
        """Dense features of a batch, what the networks make of them with gradients, and kept tokens."""
        pixels = self.settings.grid**2
        batch = min(self.settings.batch_size, max(n_train, 1))
        dense = batch * pixels * sum(PUBLISHED_CHANNELS.values()) * _FLOAT32_BYTES
        tokens = min(n_train * 10_000_000, 1 << 30)
        return 3 * dense + tokens

    def _fresh(self, channels: dict[str, int], seed: int) -> Learner:
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            learner = self.build_learner(channels)
        self._trained_channels = dict(channels)
        return learner

    def _fitted(self) -> Learner:
        if not hasattr(self, "learner_"):
            raise RuntimeError("the method is not fitted; call fit or load first")
        return self.learner_

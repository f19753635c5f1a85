"""G2SF (ICCV 2025, arXiv 2503.10091): two memory banks whose distances a network scales patch by patch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmad_cli.errors import DataError
from mmad_cli.methods.anomaly_map import blur_float, blur_pillow8, upsample
from mmad_cli.methods.base import (
    BankSize,
    FeatureSet,
    MethodDefinition,
    Prediction,
    ProgressCallback,
    SampleFeatures,
    View,
)
from mmad_cli.methods.experts import (
    CELLS,
    GRID,
    Cells,
    Expert,
    Source,
    bank_selection,
    cell_labels,
    pseudo_samples,
    with_pseudo,
)
from mmad_cli.methods.g2sf.config import CORRECTED, G2SFConfig
from mmad_cli.methods.m3dm.streams import SharedProgress
from mmad_cli.types import BoolArray, FloatArray

if TYPE_CHECKING:
    from mmad_cli.backbones.specs import FeatureSpec
    from mmad_cli.methods.g2sf.network import LocalScaleNetwork
    from mmad_cli.methods.g2sf.training import Trained

RGB, POINTS = "rgb", "points"

_STATE_FILE = "state.json"
_NETWORK_FILE = "network.safetensors"
_MEBIBYTE = 1 << 20
# foreground cells of a scan, for estimates
_FOREGROUND = CELLS // 2


class G2SF:
    """Geometry-guided score fusion.

    Fitted: `experts_`, the RGB and the point bank; `network_`, the local scale network, None when nothing is trained;
    `units_`, the distance of each bank that counts as 1.
    """

    network_: LocalScaleNetwork | None
    units_: tuple[float, float]

    def __init__(self, config: G2SFConfig, device: str = "cpu") -> None:
        self.config = config
        self.device = device
        self.sources = _sources(config)

    @property
    def view(self) -> View:
        """The whole scan."""
        return "resize"

    def features(self) -> dict[str, FeatureSpec]:
        """RGB and point features of every sample, and those of the pseudo anomalies of training samples."""
        return with_pseudo(self.sources, self.config.augmentations)

    def fit(
        self,
        train: FeatureSet,
        validation: FeatureSet,
        *,
        seed: int,
        progress: ProgressCallback | None = None,
    ) -> None:
        """Select both banks, look the pseudo anomalies up in them, train the network; `validation` is not read.

        `seed` starts the stream that the projections of the RGB and the point bank draw from in turn, and the
        training. Raises DataError without training samples, or without a pseudo-anomalous patch.
        """
        if len(train) == 0:
            raise DataError("there are no training samples; a memory bank needs at least one good sample")
        stream = np.random.RandomState(seed)
        # banks, pseudo anomalies and training take about as long as each other
        tell = SharedProgress(progress, 4000)
        self.experts_ = self._experts()
        for expert in self.experts_:
            expert.fit(train, stream=stream, progress=tell.share(500))
        trained = self._train(train, seed, tell)
        self.network_, self.units_ = trained.network, trained.units

    def predict(self, sample: SampleFeatures) -> Prediction:
        """Score one sample. Raises RuntimeError before `fit` or `load`."""
        scores = self.patch_scores(sample)
        blur = blur_pillow8 if self.config.blur == "pillow8" else blur_float
        return Prediction(blur(upsample(scores, GRID)), float(scores.max()))

    def patch_scores(self, sample: SampleFeatures) -> FloatArray:
        """Scores float32 (3136,) of the 56 x 56 patches: the metric, over the nearest and its neighbours.

        Local scales of background patches are 1.
        """
        if not hasattr(self, "experts_"):
            raise RuntimeError("the method is not fitted; call fit or load first")
        ranks = 1 if self.config.aggregation == "nearest" else self.config.neighbours + 1
        cells = [expert.cells(sample) for expert in self.experts_]
        from mmad_cli.methods.g2sf.scoring import over_ranks

        return over_ranks(self._metrics(cells, ranks), self.config.aggregation)

    def banks(self) -> dict[str, BankSize]:
        """Sizes of both banks."""
        if not hasattr(self, "experts_"):
            raise RuntimeError("the method is not fitted; call fit or load first")
        return {expert.source.name: expert.size for expert in self.experts_}

    def save(self, folder: Path) -> None:
        """Write banks, network and units into an existing empty folder."""
        from safetensors.torch import save_file

        state: dict[str, Any] = {
            "banks": {name: [size.rows, size.dim] for name, size in self.banks().items()},
            "units": list(self.units_),
            "network": self.network_ is not None,
        }
        for expert in self.experts_:
            expert.save(folder)
        if self.network_ is not None:
            tensors = {name: value.cpu().contiguous() for name, value in self.network_.state_dict().items()}
            save_file(tensors, str(folder / _NETWORK_FILE))
        (folder / _STATE_FILE).write_text(json.dumps(state) + "\n")

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. Raises DataError when the files do not belong together."""
        state = json.loads((folder / _STATE_FILE).read_text())
        experts = self._experts()
        for expert in experts:
            expert.load(folder)
        if {expert.source.name: list(expert.bank_.rows_.shape) for expert in experts} != state["banks"]:
            raise DataError(f"{folder}: the memory banks are not those described in {_STATE_FILE}; fit again")
        self.experts_ = experts
        self.units_ = (float(state["units"][0]), float(state["units"][1]))
        self.network_ = self._read_network(folder) if state["network"] else None

    def memory_estimate(self, n_train: int) -> int:
        """Peak bytes of `fit` beyond the networks: projected rows of the larger bank, or banks and training patches."""
        from mmad_cli.memory import projected_dimension

        config, n = self.config, max(n_train, 1)
        shapes = [source.shape() for source in self.sources]
        selecting = held = 0
        for rows, channels in shapes:
            width = projected_dimension(n * rows, channels, config.coreset_eps) or channels
            per_entry = 12.0 if config.coreset_dtype == "float16" else 5.2
            selecting = max(selecting, int(per_entry * n * rows * width))
            held += int(8 * config.coreset_fraction * n * rows * channels)
        made = min(n * len(config.augmentations), config.pseudo_samples)
        per_value = 2 if config.pool_dtype == "float16" else 4
        # gathered in parts, then joined
        pool = 2 * made * sum(min(rows, _FOREGROUND) * per_value * channels for rows, channels in shapes)
        width = sum(channels for _, channels in shapes)
        batch = 4 * 12 * config.batch * (config.distal + 1) * width if config.epochs else 0
        return max(selecting, held + pool + min(batch, pool)) + 256 * _MEBIBYTE

    def _experts(self) -> list[Expert]:
        config = self.config
        selection = bank_selection(config.coreset_fraction, config.coreset_eps, config.coreset_dtype)
        return [Expert(source, selection, self.device) for source in self.sources]

    def _train(self, train: FeatureSet, seed: int, tell: SharedProgress) -> Trained:
        from mmad_cli.methods.g2sf import training
        from mmad_cli.methods.g2sf.pool import build_pool

        pool = build_pool(
            self.experts_,
            pseudo_samples(train, self.config.augmentations),
            lambda sample: cell_labels(sample, POINTS),
            _foreground,
            ranks=self.config.distal + 1,
            dtype=self.config.pool_dtype,
            device=self.device,
            progress=tell.share(1000),
        )
        try:
            return training.train(pool, self.config, seed=seed, progress=tell.share(2000))
        except ValueError as error:
            raise DataError(f"the pseudo anomalies of {len(train)} training samples cannot be used: {error}") from error

    def _metrics(self, cells: Sequence[Cells], ranks: int) -> FloatArray:
        """The metric of each cell to its prototypes of rank 0 to `ranks` - 1, float32 (3136, ranks)."""
        from mmad_cli.methods.g2sf.scoring import Seen, patch_metrics

        found = [expert.look_up(one, ranks) for expert, one in zip(self.experts_, cells, strict=True)]
        seen = [
            Seen(at.rows, part.row, at.neighbours, at.distances, expert.bank_.rows_)
            for at, part, expert in zip(found, cells, self.experts_, strict=True)
        ]
        return patch_metrics(self.network_, self.units_, seen, _foreground(cells), self.device)

    def _read_network(self, folder: Path) -> LocalScaleNetwork:
        from safetensors.torch import load_file

        from mmad_cli.methods.g2sf.network import LocalScaleNetwork

        network = LocalScaleNetwork(sum(expert.size.dim for expert in self.experts_), self.config.dropout)
        network.load_state_dict(load_file(str(folder / _NETWORK_FILE)))
        return network.to(self.device).eval().requires_grad_(False)


def _sources(config: G2SFConfig) -> tuple[Source, Source]:
    """RGB and points, as the variant has them."""
    if config.variant == "cnn+fpfh":
        return (
            Source.image(
                RGB, config.image_network, outputs=config.rgb_outputs, norm=config.rgb_norm, size=config.rgb_size
            ),
            Source.fpfh(POINTS, xyz_resize=config.xyz_resize),
        )
    return (
        Source.image(RGB, config.image_network, norm=config.rgb_norm, size=config.rgb_size),
        Source.point(
            POINTS,
            config.point_backbone,
            groups=config.groups,
            group_size=config.group_size,
            point_bn=config.point_bn,
            fps_skip_origin=config.fps_skip_origin,
            idw=config.idw,
            xyz_resize=config.xyz_resize,
        ),
    )


def _foreground(cells: Sequence[Cells]) -> BoolArray:
    """Cells with points under them: the point feature is not zero."""
    return cells[1].filled


DEFINITION = MethodDefinition(
    name="g2sf",
    title="G2SF",
    version=1,
    config=G2SFConfig,
    build=G2SF,
    variants={
        "dino+point_mae": "DINO tokens and Point-MAE (the published method)",
        "cnn+fpfh": "outputs of a convolutional network and FPFH: no large weights",
    },
    default_variant="dino+point_mae",
    modalities={"dino+point_mae": "RGB+3D", "cnn+fpfh": "RGB+3D"},
    protocol="m3dm",
    recipes={"official": {}, "corrected": CORRECTED},
    source="arXiv 2503.10091",
    libraries=("numpy", "scipy", "torch", "faiss", "pillow"),
    notes=(
        "Trains on pseudo anomalies of the training samples, whose features are extracted too: four more scans per "
        "training sample, 800 per category at most (pseudo_per_sample, pseudo_samples).",
        "The training takes minutes on a GPU and hours on a CPU at the published size; epochs and consistency_share "
        "shorten it.",
    ),
)

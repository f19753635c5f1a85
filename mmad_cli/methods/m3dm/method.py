"""M3DM (CVPR 2023, arXiv 2303.00601): memory banks of RGB, point and fused patches, joined by decision layer fusion."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmad_cli.errors import DataError, UsageError
from mmad_cli.methods.anomaly_map import blur_float, blur_pillow8, upsample
from mmad_cli.methods.base import (
    MAP_SIZE,
    BankSize,
    FeatureSet,
    MethodDefinition,
    Prediction,
    ProgressCallback,
    SampleFeatures,
    View,
)
from mmad_cli.methods.m3dm.banks import filters_zeros, fit_bank, plan_banks, require_room, selection
from mmad_cli.methods.m3dm.config import BUILTIN, CORRECTED, UFF_WEIGHTS, BankName, M3DMConfig
from mmad_cli.methods.m3dm.dlf import Coefficients, DecisionFusion, one_class_coefficients
from mmad_cli.methods.m3dm.patches import (
    POINT_GRID,
    POINT_PATCHES,
    on_point_grid,
    point_patches,
    rgb_patches,
    scrambled_cells,
)
from mmad_cli.methods.m3dm.streams import Samples, SharedProgress, first
from mmad_cli.types import FloatArray

if TYPE_CHECKING:
    from torch import Tensor

    from mmad_cli.backbones.specs import FeatureSpec
    from mmad_cli.memory import MemoryBank
    from mmad_cli.methods.m3dm.uff import FusionNetwork
    from mmad_cli.methods.m3dm.uff_training import Training

_STATE_FILE = "state.json"
_NETWORK_FILE = "uff.safetensors"

# of the point networks, for estimates
_POINT_CHANNELS = 1152
_BUILTIN_CHANNELS = 288
# the only grid that the published code makes its scrambled training pairs from
_SCRAMBLED_GRID = 28
_MEBIBYTE = 1 << 20
# peak bytes per entry of the projected rows; in half precision both forms of the rows are held (measured)
_SELECTION_BYTES = {"float32": 5.2, "float16": 12.0}


@dataclass(frozen=True)
class BankScore:
    """What one bank says of a sample: blurred anomaly map (224, 224) and image score."""

    anomaly_map: FloatArray
    image_score: float


class M3DM:
    """Multimodal anomaly detection with memory banks and decision layer fusion.

    Fitted: `banks_`, a memory bank for each part of the variant; `fusion_`, the learned weighting, None for variants
    without; `uff_`, the feature fusion network, None where none is needed or it was not read yet.
    """

    banks_: dict[BankName, MemoryBank]
    fusion_: DecisionFusion | None
    uff_: FusionNetwork | None = None

    def __init__(self, config: M3DMConfig, device: str = "cpu") -> None:
        self.config = config
        self.device = device

    @property
    def view(self) -> View:
        """The whole scan."""
        return "resize"

    @property
    def needs_validation(self) -> bool:
        """Whether `fit` reads the validation samples."""
        return self.config.needs_decision_fusion and self.config.dlf_fit == "validation"

    def features(self) -> dict[str, FeatureSpec]:
        """Tokens of the RGB network, tokens and geometry of the point network; what the variant needs of them."""
        from mmad_cli.backbones.specs import FeatureSpec

        config, specs = self.config, {}
        if config.parts != ("rgb",):
            specs["points"] = FeatureSpec.point(
                config.point_backbone,
                groups=config.groups,
                group_size=config.group_size,
                point_bn=config.point_bn,
                point_droppath=config.point_droppath,
                droppath_seed=config.droppath_seed,
                fps_skip_origin=config.fps_skip_origin,
                idw=config.idw,
                xyz_resize=config.xyz_resize,
                precision=config.precision,
            )
        if config.parts != ("points",):
            specs["rgb"] = FeatureSpec.timm(
                config.rgb_backbone,
                outputs=None,
                norm=config.rgb_norm,
                size=config.rgb_size,
                precision=config.precision,
            )
        return specs

    def weights_names(self) -> list[str]:
        """Weights beyond those of the features: the published fusion block, where it is used."""
        return [UFF_WEIGHTS] if self._fuses and self.config.uff == "released" else []

    # Training across categories

    def needs_shared(self) -> bool:
        """Whether the fusion block is to be trained on all categories before any of them is fitted."""
        return self._fuses and self.config.uff == "retrained"

    def fit_shared(
        self,
        train: Mapping[str, FeatureSet],
        *,
        seed: int,
        folder: Path | None = None,
        progress: ProgressCallback | None = None,
    ) -> None:
        """Train the fusion block on the good samples of all categories.

        An interrupted training goes on from its checkpoint in `folder`. Raises DataError without samples.
        """
        from mmad_cli.methods.m3dm.uff import new_network
        from mmad_cli.methods.m3dm.uff_training import train as train_network

        sets = [train[name] for name in sorted(train)]
        samples = [one for features in sets for one in first(features, self.config.sample_limit)]
        if not samples:
            raise DataError("there are no training samples; the feature fusion block needs at least one good sample")
        points, rgb = self._training_pair(samples[0])
        network = new_network(points.shape[1], rgb.shape[1], seed)
        names = [f"{name}/{one.id}" for name in sorted(train) for one in first(train[name], self.config.sample_limit)]
        train_network(
            network,
            lambda index: self._training_pair(samples[index]),
            len(samples),
            self._training(),
            seed=seed,
            folder=folder,
            identity=hashlib.sha256("\n".join([self.config.uff_pairs, *names]).encode()).hexdigest(),
            device=self.device,
            progress=progress,
        )
        self.uff_ = network

    def save_shared(self, folder: Path) -> None:
        """Write the trained fusion block. Raises RuntimeError without one."""
        from mmad_cli.methods.m3dm.uff import save_network

        if self.uff_ is None:
            raise RuntimeError("there is no feature fusion block; call fit_shared or load_shared first")
        save_network(self.uff_, folder / _NETWORK_FILE)

    def load_shared(self, folder: Path) -> None:
        """Read the fusion block that `save_shared` wrote."""
        from mmad_cli.methods.m3dm.uff import load_network

        self.uff_ = load_network(folder / _NETWORK_FILE).to(self.device)

    # One category

    def fit(
        self,
        train: FeatureSet,
        validation: FeatureSet,
        *,
        seed: int,
        progress: ProgressCallback | None = None,
    ) -> None:
        """Select the banks, then learn how to weigh them.

        Features are gone through several times and never all held. `seed` starts the one random stream that the
        projections of the point, RGB and fused bank draw from in turn. Raises DataError without training samples.
        """
        train = first(train, self.config.sample_limit)
        if len(train) == 0:
            raise DataError("there are no training samples; a memory bank needs at least one good sample")
        if self._fuses:
            self._fusion_network()
        plans = plan_banks(self.config, self._streams(train))
        weighed = self._fusion_samples(train, validation)
        if len(weighed):
            require_room(self.config, {plan.name: plan.survey.channels for plan in plans}, len(weighed))
        tell = SharedProgress(progress, sum(plan.kept for plan in plans) + len(weighed))
        stream = np.random.RandomState(seed)
        self.banks_ = {}
        for plan in plans:
            self.banks_[plan.name] = fit_bank(plan, self.config, stream, self.device, tell.part(plan.kept))
        self.fusion_ = None
        if self.config.needs_decision_fusion:
            learns = self.config.dlf_fit != "fixed"
            self.fusion_ = self._fit_fusion(weighed, tell.part(len(weighed))) if learns else self._fixed_fusion()

    def predict(self, sample: SampleFeatures) -> Prediction:
        """Score one sample. Raises RuntimeError before `fit` or `load`."""
        scores = self.bank_scores(sample)
        if len(scores) == 1:
            return Prediction(scores[0].anomaly_map, scores[0].image_score)
        if self.fusion_ is None:
            joined = scores[0].anomaly_map + scores[1].anomaly_map
            return Prediction(joined, scores[0].image_score + scores[1].image_score)
        image_row, maps = self._weighted(scores)
        return Prediction(self.fusion_.anomaly_map(maps), self.fusion_.image_score(image_row))

    def bank_scores(self, sample: SampleFeatures) -> list[BankScore]:
        """What each bank says of a sample, in the order of `config.parts`, before they are joined."""
        if not hasattr(self, "banks_"):
            raise RuntimeError("the method is not fitted; call fit or load first")
        return [self._score(self.banks_[name], *rows, sample) for name, rows in self._patches(sample).items()]

    def banks(self) -> dict[str, BankSize]:
        """Sizes of the fitted banks."""
        if not hasattr(self, "banks_"):
            raise RuntimeError("the method is not fitted; call fit or load first")
        return {name: BankSize(*map(int, bank.rows_.shape)) for name, bank in self.banks_.items()}

    def save(self, folder: Path) -> None:
        """Write banks, weighting and fusion block into an existing empty folder."""
        from mmad_cli.methods.m3dm.uff import save_network

        state: dict[str, Any] = {"banks": {name: [size.rows, size.dim] for name, size in self.banks().items()}}
        if self.fusion_ is not None:
            state["fusion"] = {"image": self.fusion_.image.tolist(), "pixel": self.fusion_.pixel.tolist()}
        for name, bank in self.banks_.items():
            bank.save(folder / _bank_file(name))
        state["uff"] = self._fuses and self._fusion_network() is not None
        if state["uff"] and self.uff_ is not None:
            save_network(self.uff_, folder / _NETWORK_FILE)
        (folder / _STATE_FILE).write_text(json.dumps(state) + "\n")

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. Raises DataError when the files do not belong together."""
        from mmad_cli.memory import MemoryBank

        state = json.loads((folder / _STATE_FILE).read_text())
        require_room(self.config, {name: size[1] for name, size in state["banks"].items()})
        banks = {name: MemoryBank.load(folder / _bank_file(name), self.device) for name in self.config.parts}
        sizes = {name: list(bank.rows_.shape) for name, bank in banks.items()}
        if sizes != state["banks"] or self.config.needs_decision_fusion != ("fusion" in state):
            raise DataError(f"{folder}: the memory banks are not those described in {_STATE_FILE}; fit again")
        self.banks_, self.fusion_ = banks, None
        if "fusion" in state:
            self.fusion_ = DecisionFusion(*(np.asarray(state["fusion"][kind]) for kind in ("image", "pixel")))
        if state["uff"]:
            self.load_shared(folder)

    def memory_estimate(self, n_train: int) -> int:
        """Peak bytes of `fit` beyond the networks: projected rows of the largest bank, or banks with their indices."""
        from mmad_cli.memory import projected_dimension

        selecting, kept_bytes = 0, 0
        for rows, kept, channels in self._expected_banks(n_train):
            width = projected_dimension(rows, channels, self.config.coreset_eps) or channels
            selecting = max(selecting, int(_SELECTION_BYTES[self.config.coreset_dtype] * rows * width) + kept_bytes)
            kept_bytes += 4 * kept * channels
        # per pixel: a score of every bank, and the sample weight, order and sign that the one-class machine makes
        learns = self.config.needs_decision_fusion and self.config.dlf_fit != "fixed"
        samples = min(max(n_train, 1), self.config.sample_limit)
        weighing = samples * MAP_SIZE**2 * 8 * (len(self.config.parts) + 3) if learns else 0
        return max(selecting, 2 * kept_bytes + weighing) + 256 * _MEBIBYTE

    def disk_estimate(self, n_train: int) -> int:
        """Bytes of what `save` writes after fitting on `n_train` samples: the rows of the banks, the fusion block."""
        banks = self._expected_banks(n_train)
        block = self._block_parameters() if self._fuses and self.config.uff != "concat" else 0
        return sum(kept * (4 * channels + 8) for _, kept, channels in banks) + 4 * block

    def _expected_banks(self, n_train: int) -> list[tuple[int, int, int]]:
        """Rows before and after the selection, and channels, of each bank after `n_train` samples."""
        config, banks, first_kept = self.config, [], 0
        samples = min(max(n_train, 1), config.sample_limit)
        for name in config.parts:
            patches, channels = self._bank_shape(name)
            rows = patches * (samples if name == "rgb" else min(samples, config.asy_memory_bank or samples))
            kept = selection(config, rows, first_kept).rows_to_keep(rows)
            first_kept = first_kept or kept
            banks.append((rows, kept, channels))
        return banks

    def _block_parameters(self) -> int:
        from mmad_cli.methods.m3dm.uff import parameter_count

        point_channels = self._bank_shape("points")[1]
        return parameter_count(point_channels, self._bank_shape("fused")[1] - point_channels)

    # Features

    @property
    def _fuses(self) -> bool:
        return "fused" in self.config.parts

    def _bank_shape(self, name: BankName) -> tuple[int, int]:
        """Patches per sample and channels of a bank, from the architecture; builds the RGB network without values."""
        point_channels = _POINT_CHANNELS if self.config.point_backbone != "builtin_points" else _BUILTIN_CHANNELS
        if name == "points":
            return POINT_PATCHES, point_channels
        patches, channels = _token_shape(self.config.rgb_backbone, self.config.rgb_size)
        return (patches, channels) if name == "rgb" else (POINT_PATCHES, point_channels + channels)

    def _patches(self, sample: SampleFeatures) -> dict[BankName, tuple[FloatArray, int]]:
        """Patch rows of a sample and the side of their grid for each bank of the variant; not normalised."""
        parts = self.config.parts
        points = None if parts == ("rgb",) else point_patches(sample)
        tokens, grid = (None, 0) if parts == ("points",) else rgb_patches(sample)
        rows: dict[BankName, tuple[FloatArray, int]] = {}
        for name in parts:
            if name == "points" and points is not None:
                rows[name] = points, POINT_GRID
            elif name == "rgb" and tokens is not None:
                rows[name] = tokens, grid
            elif points is not None and tokens is not None:
                rows[name] = self._fused(points, tokens, grid), POINT_GRID
        return rows

    def _rows(self, name: BankName, sample: SampleFeatures) -> FloatArray:
        """Rows that a training sample gives to one bank, without making those of the others."""
        if name == "rgb":
            return rgb_patches(sample)[0]
        points = point_patches(sample)
        if name == "fused":
            return self._fused(points, *rgb_patches(sample))
        return points[(points != 0).all(axis=1)] if filters_zeros(self.config, name) else points

    def _fused(self, points: FloatArray, tokens: FloatArray, grid: int) -> FloatArray:
        from mmad_cli.methods.m3dm.uff import fuse

        network = self._fusion_network()
        if network is not None and network.rgb_channels != tokens.shape[1]:
            raise UsageError(
                f"rgb_backbone={self.config.rgb_backbone}: its tokens have {tokens.shape[1]} channels, the feature "
                f"fusion block takes {network.rgb_channels}; choose a network of that width, uff=retrained or "
                "uff=concat"
            )
        if network is not None and network.point_channels != points.shape[1]:
            raise DataError(
                f"the feature fusion block takes {network.point_channels} point channels, the features have "
                f"{points.shape[1]}; choose uff=retrained or uff=concat"
            )
        return fuse(network, points, *on_point_grid(tokens, grid))

    def _fusion_network(self) -> FusionNetwork | None:
        if self.config.uff == "concat":
            return None
        if self.uff_ is None:
            if self.config.uff == "retrained":
                raise RuntimeError("uff=retrained: the feature fusion block is not trained; call fit_shared first")
            from mmad_cli.methods.m3dm.uff import released_network

            self.uff_ = released_network().to(self.device)
        return self.uff_

    def _training_pair(self, sample: SampleFeatures) -> tuple[Tensor, Tensor]:
        import torch

        tokens, grid = rgb_patches(sample)
        points = torch.from_numpy(point_patches(sample))
        if self.config.uff_pairs == "scrambled":
            if grid != _SCRAMBLED_GRID:
                raise UsageError(
                    f"uff_pairs=scrambled: exists for {_SCRAMBLED_GRID} x {_SCRAMBLED_GRID} RGB tokens only, "
                    f"rgb_backbone={self.config.rgb_backbone} with rgb_size={self.config.rgb_size} gives "
                    f"{grid} x {grid}; set uff_pairs=aligned"
                )
            return points, torch.from_numpy(tokens[scrambled_cells(len(tokens))])
        rgb, spread = on_point_grid(tokens, grid)
        return points, torch.from_numpy(rgb[spread])

    def _training(self) -> Training:
        from mmad_cli.methods.m3dm.uff_training import Training

        config = self.config
        return Training(
            recipe=config.uff_recipe,
            temperature=config.uff_temperature,
            rate=config.uff_rate,
            batch=config.uff_batch,
            accumulate=config.uff_accumulate,
            epochs=config.uff_epochs,
            warmup_epochs=config.uff_warmup_epochs,
            steps=config.uff_steps,
            cycle=config.uff_cycle,
        )

    # Banks

    def _streams(self, train: FeatureSet) -> dict[BankName, tuple[Callable[[], Iterator[FloatArray]], int]]:
        """Row blocks of each bank and the number of samples that give them."""
        limit = self.config.asy_memory_bank
        fewer = train if limit is None else first(train, limit)
        sources = {name: train if name == "rgb" else fewer for name in self.config.parts}
        return {name: (self._blocks(name, source), len(source)) for name, source in sources.items()}

    def _blocks(self, name: BankName, samples: FeatureSet) -> Callable[[], Iterator[FloatArray]]:
        def blocks() -> Iterator[FloatArray]:
            channels = None
            for sample in samples:
                rows = self._rows(name, sample)
                channels = channels or rows.shape[1]
                if rows.shape[1] != channels:
                    raise DataError(f"{sample.id}: {name} patches have {rows.shape[1]} channels, others {channels}")
                yield rows

        return blocks

    # Scores

    def _score(self, bank: MemoryBank, rows: FloatArray, grid: int, sample: SampleFeatures) -> BankScore:
        from mmad_cli.memory import patch_distances, reweighted_score

        if rows.shape[1] != bank.rows_.shape[1]:
            raise DataError(
                f"{sample.id}: patches have {rows.shape[1]} channels, the bank {bank.rows_.shape[1]}; "
                "fit again with the same features"
            )
        patches = bank.normalise(rows)
        distinct, position = _distinct(rows)
        nearest, indices = patch_distances(patches[distinct], bank.index, self.config.distances)
        nearest, indices = nearest[position], indices[position]
        image_score = reweighted_score(
            patches,
            bank.index,
            nearest,
            indices,
            eps=self.config.weight_eps,
            scale=self.config.scale,
            form=self.config.score_form,
        )
        blur = blur_pillow8 if self.config.blur == "pillow8" else blur_float
        return BankScore(blur(upsample(nearest, grid)), float(image_score))

    def _weighted(self, scores: Sequence[BankScore]) -> tuple[FloatArray, list[FloatArray]]:
        """Image scores (k,) and maps, times the weights that decision fusion takes them with."""
        config, names = self.config, self.config.parts
        image = [config.image_lambda(name) * score.image_score for name, score in zip(names, scores, strict=True)]
        maps = [
            np.float32(config.map_lambda(name)) * score.anomaly_map for name, score in zip(names, scores, strict=True)
        ]
        return np.asarray(image, dtype=np.float32), maps

    def _fusion_samples(self, train: FeatureSet, validation: FeatureSet) -> FeatureSet:
        if not self.config.needs_decision_fusion or self.config.dlf_fit == "fixed":
            return Samples([])
        if self.config.dlf_fit == "train":
            if self._learns_from_rounding:
                warnings.warn(
                    "decision fusion learns from samples that are in the banks with every patch: their scores are the "
                    "rounding noise of distances that should be 0, as in the published code, and so are its weights. "
                    "Set dlf_fit=validation or a smaller coreset_fraction",
                    stacklevel=3,
                )
            return train
        if len(validation) == 0:
            warnings.warn(
                "dlf_fit=validation: there are no validation samples, so decision fusion learns from the training "
                "samples; their scores are too good, as they are in the memory banks",
                stacklevel=3,
            )
            return train
        return validation

    @property
    def _learns_from_rounding(self) -> bool:
        config = self.config
        return config.distances == "expanded" and config.coreset_fraction == 1 and config.asy_memory_bank is None

    def _fit_fusion(self, samples: FeatureSet, progress: ProgressCallback) -> DecisionFusion:
        """Score the samples against the banks and learn the weights. Holds one number per pixel, bank and sample."""
        from mmad_cli.memory.limit import bounded_empty

        width, pixels = len(self.config.parts), MAP_SIZE * MAP_SIZE
        image_rows = np.empty((len(samples), width), dtype=np.float64)
        pixel_rows = bounded_empty((len(samples) * pixels, width), np.float64)
        for i, sample in enumerate(samples):
            image_rows[i], maps = self._weighted(self.bank_scores(sample))
            for column, one in enumerate(maps):
                pixel_rows[i * pixels : (i + 1) * pixels, column] = one.ravel()
            progress(i + 1, len(samples))
        return DecisionFusion(
            image=self._coefficients(image_rows, self.config.image_lambda, "image scores"),
            pixel=self._coefficients(pixel_rows, self.config.map_lambda, "anomaly maps"),
        )

    def _coefficients(self, rows: NDArray[np.float64], weight: Callable[[BankName], float], what: str) -> Coefficients:
        config = self.config
        if rows.any():
            return one_class_coefficients(
                rows, config.ocsvm_nu, config.ocsvm_maxiter, config.ocsvm_random_state, what=what
            )
        warnings.warn(
            f"decision fusion of {what}: every sample that it learns from scores 0, as its patches are all in the "
            "banks; fixed weights are taken instead. Set dlf_fit=validation or a smaller coreset_fraction",
            stacklevel=4,
        )
        return self._fixed(weight)

    def _fixed_fusion(self) -> DecisionFusion:
        return DecisionFusion(image=self._fixed(self.config.image_lambda), pixel=self._fixed(self.config.map_lambda))

    def _fixed(self, weight: Callable[[BankName], float]) -> Coefficients:
        """What decision fusion would learn if the distances of all banks were equal, but for a common factor."""
        return np.array([weight(name) for name in self.config.parts])


def _distinct(rows: FloatArray) -> tuple[Any, Any]:
    """Indices of rows to look up, and for every row the position of its own among them.

    Patches without points under them are exactly zero and often half of all; they are looked up once.
    """
    filled = rows.any(axis=1)
    distinct = np.flatnonzero(filled)
    position = np.full(len(rows), len(distinct))
    position[filled] = np.arange(len(distinct))
    if len(distinct) < len(rows):
        distinct = np.append(distinct, np.argmin(filled))
    return distinct, position


def _token_shape(model: str, size: int) -> tuple[int, int]:
    """Tokens per image and channels of a timm network."""
    from mmad_cli.backbones.specs import TimmParams
    from mmad_cli.backbones.timm_backbone import output_shapes

    patches, channels = output_shapes(TimmParams(model=model, size=size))["tokens"]
    return patches, channels


def _bank_file(name: BankName) -> str:
    return f"bank_{name}.safetensors"


DEFINITION = MethodDefinition(
    name="m3dm",
    title="M3DM",
    version=2,
    config=M3DMConfig,
    build=M3DM,
    variants={
        "dino": "RGB bank",
        "point_mae": "point bank",
        "fusion": "bank of fused features",
        "dino+point_mae": "RGB and point bank, decision fusion",
        "dino+point_mae+add": "RGB and point bank, scores added",
        "dino+point_mae+fusion": "RGB, point and fused bank, decision fusion (the published method)",
    },
    default_variant="dino+point_mae+fusion",
    modalities={
        "dino": "RGB",
        "point_mae": "3D",
        "fusion": "RGB+3D",
        "dino+point_mae": "RGB+3D",
        "dino+point_mae+add": "RGB+3D",
        "dino+point_mae+fusion": "RGB+3D",
    },
    protocol="m3dm",
    recipes={"official": {}, "corrected": CORRECTED},
    builtin=BUILTIN,
    source="arXiv 2303.00601",
    libraries=("numpy", "scipy", "scikit-learn", "torch", "faiss", "pillow"),
    notes=(
        "The published point network runs in training mode; here its batch statistics are kept and stochastic depth is "
        "off, so features are deterministic (point_droppath=on draws it).",
        "The published fusion block cannot be downloaded by name: `mmad weights import m3dm_uff FILE`, or set "
        "uff=concat or uff=retrained.",
        "The corrected recipe trains the fusion block on all categories first; that wants a GPU.",
    ),
)

"""The ways of joining the experts' scores, one class each, behind one small interface."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmad_cli.errors import DataError
from mmad_cli.methods.base import ProgressCallback, SampleFeatures
from mmad_cli.methods.experts import CELLS, GRID, Normaliser, Panel, PseudoSample, Scan, fit_normaliser
from mmad_cli.methods.iaenet.calibration import Calibration, normalised
from mmad_cli.methods.iaenet.config import IMAGE, IMPORTANCE, IAENetConfig
from mmad_cli.methods.iaenet.fusion import Alignment, Rule, fit_alignment, image_product, image_score, joined
from mmad_cli.types import FloatArray

if TYPE_CHECKING:
    from torch import nn

    from mmad_cli.methods.g2sf.network import LocalScaleNetwork
    from mmad_cli.methods.iaenet.networks import Fusion

_JOINER_FILE = "fusion.json"
_NETWORK_FILE = "fusion.safetensors"


@dataclass(frozen=True)
class Material:
    """What a fusion may learn from; calibration and pseudo anomalies only where the configuration asks for them."""

    calibration: Calibration | None
    pseudo: Sequence[tuple[PseudoSample, Scan]]
    seed: int
    folder: Path | None
    progress: ProgressCallback | None


@dataclass(frozen=True)
class Joined:
    """Scores float32 (3136,) of the cells of a scan, 0 in the background unless experts scored it; image score."""

    cells: FloatArray
    image: float


class Joiner(ABC):
    """Makes one score map of several. `curves` holds losses per epoch of what was trained."""

    def __init__(self, config: IAENetConfig, panel: Panel) -> None:
        self.config, self.panel = config, panel
        self.curves: dict[str, list[float]] = {}

    @abstractmethod
    def fit(self, material: Material) -> None:
        """Learn what there is to learn."""

    @abstractmethod
    def join(self, sample: SampleFeatures, scan: Scan) -> Joined:
        """Joined scores of a scan."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """The fitted state but for networks, as JSON."""

    @abstractmethod
    def restore(self, state: dict[str, Any], folder: Path) -> None:
        """Take the state that `state` and `save` gave."""

    def save(self, folder: Path) -> None:
        """Write the fitted state."""
        (folder / _JOINER_FILE).write_text(json.dumps({"state": self.state(), "curves": self.curves}) + "\n")

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        record = json.loads((folder / _JOINER_FILE).read_text())
        self.curves = record["curves"]
        self.restore(record["state"], folder)


class Alone(Joiner):
    """One expert's scores as they are; the image score re-weighted as in PatchCore, or the largest."""

    @property
    def place(self) -> int:
        """Its number among the experts."""
        return [source.name for source in self.panel.sources].index(self.config.variant)

    def fit(self, material: Material) -> None:
        """Nothing to learn."""

    def join(self, sample: SampleFeatures, scan: Scan) -> Joined:
        """Joined scores of a scan."""
        from mmad_cli.memory import reweighted_score

        cells = scan.scores[self.place]
        look = scan.looks[self.place]
        if self.config.single_score == "max" or not len(look.used):
            return Joined(cells, image_score(cells, scan.front, self.config.image_score))
        rows = self.panel.rows(sample, scan, self.place)
        index = self.panel.experts_[self.place].bank_.index
        score = reweighted_score(rows, index, look.distances[:, 0], look.neighbours[:, 0], form="stable")
        return Joined(cells, score)

    def state(self) -> dict[str, Any]:
        """The fitted state as JSON."""
        return {}

    def restore(self, state: dict[str, Any], folder: Path) -> None:
        """Nothing to take."""


class Scaled(Joiner):
    """What joins scores on one scale has a normaliser per expert."""

    normalisers: tuple[Normaliser, ...]

    def fit(self, material: Material) -> None:
        """A normaliser per expert."""
        self.normalisers = fit_normalisers(self.config, material.calibration, len(self.panel.sources))

    def u(self, scan: Scan) -> FloatArray:
        """Scores (K, 3136) on the common scale."""
        return normalised(scan.scores, self.normalisers)

    def state(self) -> dict[str, Any]:
        """The fitted state as JSON."""
        return {"normalisers": [[one.offset, one.scale] for one in self.normalisers]}

    def restore(self, state: dict[str, Any], folder: Path) -> None:
        """Take the state back."""
        self.normalisers = tuple(Normaliser(offset, scale) for offset, scale in state["normalisers"])


class ByRule(Scaled):
    """Mean, largest or product of the normalised scores; of the product, image scores are multiplied too."""

    def join(self, sample: SampleFeatures, scan: Scan) -> Joined:
        """Joined scores of a scan."""
        u, form = self.u(scan), self.config.image_score
        rule: Rule = self.config.variant  # type: ignore[assignment]
        cells = joined(u, rule)
        if rule == "product":
            return Joined(cells, image_product(u, scan.front, form))
        return Joined(cells, image_score(cells, scan.front, form))


class Aligned(Joiner):
    """Largest of the scores after an affine map to those of the first 3D expert (Shape-Guided)."""

    alignment: Alignment

    def fit(self, material: Material) -> None:
        """The affine maps, from good patches."""
        patches = _calibration(material.calibration).patches
        reference = next((k for k, source in enumerate(self.panel.sources) if source.of_points), 0)
        self.alignment = fit_alignment(list(patches.T), reference)

    def join(self, sample: SampleFeatures, scan: Scan) -> Joined:
        """Joined scores of a scan."""
        cells = self.alignment(scan.scores)
        return Joined(cells, image_score(cells, scan.front, self.config.image_score))

    def state(self) -> dict[str, Any]:
        """The fitted state as JSON."""
        return {"scale": list(self.alignment.scale), "offset": list(self.alignment.offset)}

    def restore(self, state: dict[str, Any], folder: Path) -> None:
        """Take the state back."""
        self.alignment = Alignment(tuple(state["scale"]), tuple(state["offset"]))


class OneClass(Joiner):
    """Weighted sums that linear one-class machines learn, one for image scores and one for patches (M3DM)."""

    image: NDArray[np.float64]
    patch: NDArray[np.float64]

    def fit(self, material: Material) -> None:
        """The weights, from good patches and image scores."""
        from mmad_cli.methods.m3dm.dlf import one_class_coefficients

        calibration, config = _calibration(material.calibration), self.config
        settings = (config.ocsvm_nu, config.ocsvm_maxiter, config.ocsvm_random_state)
        self.image = one_class_coefficients(calibration.largest * self.factors, *settings, what="image scores")
        self.patch = one_class_coefficients(calibration.patches * self.factors, *settings, what="patch scores")

    @property
    def factors(self) -> FloatArray:
        """By which scores are multiplied first, (K,)."""
        factor = {IMAGE: self.config.ocsvm_image_factor}
        return np.asarray([factor.get(source.name, 1.0) for source in self.panel.sources], dtype=np.float32)  # type: ignore[call-overload]

    def join(self, sample: SampleFeatures, scan: Scan) -> Joined:
        """Joined scores of a scan."""
        scores = scan.scores * self.factors[:, None]
        images = np.asarray([image_score(one, scan.front, self.config.image_score) for one in scores])
        return Joined(np.asarray(self.patch @ scores, dtype=np.float32), float(self.image @ images))

    def state(self) -> dict[str, Any]:
        """The fitted state as JSON."""
        return {"image": self.image.tolist(), "patch": self.patch.tolist()}

    def restore(self, state: dict[str, Any], folder: Path) -> None:
        """Take the state back."""
        self.image, self.patch = np.asarray(state["image"]), np.asarray(state["patch"])


class Importance(Scaled):
    """Importance-aware fusion: a network weighs the experts patch by patch."""

    network: Fusion

    def fit(self, material: Material) -> None:
        """Train the network on pseudo anomalies, half of them for choosing the epoch."""
        from mmad_cli.methods.iaenet import training

        super().fit(material)
        scans = [scan for _, scan in material.pseudo]
        groups = [sample.position for sample, _ in material.pseudo]
        u = [self.u(scan) for scan in scans]
        channels = [bank.shape[1] for bank in self.panel.banks()]
        device, seed = self.panel.device, material.seed
        fusion = training.new_fusion(self.config, channels, seed=seed).to(device)
        self.curves = {}
        if self.config.epochs:
            data: training.Material
            if self.config.variant == "iaf_f":
                rows = [
                    [self.panel.rows(sample, scan, k) for k in range(len(channels))] for sample, scan in material.pseudo
                ]
                banks = self.panel.banks()
                data = training.as_rows(scans, groups, u, rows, banks, seed=seed, device=device)
            else:
                data = training.as_maps(scans, groups, u, self.config, seed=seed, device=device)
            fusion, self.curves = training.train(
                fusion,
                data,
                self.config,
                seed=seed,
                folder=material.folder,
                device=device,
                progress=material.progress,
            )
        self.network = fusion

    def join(self, sample: SampleFeatures, scan: Scan) -> Joined:
        """Joined scores of a scan."""
        u = self.u(scan)
        cells = joined(u, "mean")
        if scan.front.any():
            cells[scan.front] = (self.weights(sample, scan) * u[:, scan.front].T).sum(axis=1)
        return Joined(cells, image_score(cells, scan.front, self.config.image_score))

    def weights(self, sample: SampleFeatures, scan: Scan) -> FloatArray:
        """Weights (n, K) of the experts in the foreground cells."""
        import torch

        from mmad_cli.methods.iaenet import training
        from mmad_cli.methods.iaenet.networks import over_foreground

        u, device = self.u(scan), self.panel.device
        with torch.inference_mode():
            if self.config.variant == "iaf_f":
                logits = torch.cat(
                    [
                        self.network.network(features, prototypes, contexts)
                        for features, prototypes, contexts in training.feature_tiles(
                            u,
                            scan,
                            [self.panel.rows(sample, scan, k) for k in range(len(u))],
                            self.panel.banks(),
                            device,
                        )
                    ]
                )
            else:
                maps = torch.from_numpy(np.where(scan.front, u, 0)).reshape(1, -1, GRID, GRID).to(device)
                front = torch.from_numpy(scan.front.copy()).reshape(1, GRID, GRID).to(device)
                logits = over_foreground(self.network.network(maps), front, self.config.level)
            weights: FloatArray = self.network.weights(logits).cpu().numpy()
        return weights

    def save(self, folder: Path) -> None:
        """Write state and network."""
        super().save(folder)
        _write_network(self.network, folder)

    def restore(self, state: dict[str, Any], folder: Path) -> None:
        """Take the state back."""
        from safetensors.torch import load_file

        from mmad_cli.methods.iaenet import training

        super().restore(state, folder)
        channels = [bank.shape[1] for bank in self.panel.banks()]
        fusion = training.new_fusion(self.config, channels, seed=0)
        fusion.load_state_dict(load_file(str(folder / _NETWORK_FILE)))
        self.network = fusion.to(self.panel.device)


class Geometric(Joiner):
    """G2SF on the 2D expert and the last 3D expert, which scales distances patch by patch."""

    network: LocalScaleNetwork | None
    units: tuple[float, float]

    @property
    def pair(self) -> tuple[int, int]:
        """Numbers of the two experts."""
        names = [source.name for source in self.panel.sources]
        return names.index(IMAGE), max(k for k, name in enumerate(names) if name != IMAGE)

    def fit(self, material: Material) -> None:
        """Train the local scales on pseudo anomalies."""
        from mmad_cli.methods.g2sf import training
        from mmad_cli.methods.g2sf.config import G2SFConfig
        from mmad_cli.methods.g2sf.pool import Found, PoolBuilder

        config = G2SFConfig(
            split="sample",
            epochs=self.config.g2sf_epochs,
            batch_share=self.config.g2sf_batch_share,
            consistency_share=self.config.g2sf_consistency_share,
        )
        builder = PoolBuilder(config.pool_dtype)
        for sample, scan in material.pseudo:
            looks = [scan.looks[k] for k in self.pair]
            found = [
                Found(self.panel.rows(sample, scan, k), look.row, look.neighbours, look.distances[:, 0])
                for k, look in zip(self.pair, looks, strict=True)
            ]
            builder.add(found, scan.labels()[scan.front], sample.position)
        banks = self.panel.banks()
        pool = builder.build([banks[k] for k in self.pair], self.panel.device)
        try:
            trained = training.train(pool, config, seed=material.seed, progress=material.progress)
        except ValueError as error:
            raise DataError(f"the pseudo anomalies cannot be used: {error}") from error
        self.network, self.units = trained.network, trained.units
        self.curves = {"g2sf/validation": trained.history} if trained.history else {}

    def join(self, sample: SampleFeatures, scan: Scan) -> Joined:
        """Joined scores of a scan."""
        from mmad_cli.methods.g2sf.config import G2SFConfig
        from mmad_cli.methods.g2sf.scoring import Seen, over_ranks, patch_metrics

        config, banks = G2SFConfig(), self.panel.banks()
        ranks = config.neighbours + 1
        cells = np.zeros(CELLS, dtype=np.float32)
        if self.config.background == "uniform":
            both = scan.scores[list(self.pair)] / np.asarray(self.units, dtype=np.float32)[:, None]
            cells = np.asarray(both.mean(axis=0), dtype=np.float32)
        if scan.front.any():
            seen = [
                Seen(
                    self.panel.rows(sample, scan, k),
                    scan.looks[k].row,
                    scan.looks[k].neighbours[:, :ranks],
                    scan.looks[k].distances[:, :ranks],
                    banks[k],
                )
                for k in self.pair
            ]
            everywhere = np.ones(int(scan.front.sum()), dtype=bool)
            metrics = patch_metrics(self.network, self.units, seen, everywhere, self.panel.device)
            cells[scan.front] = over_ranks(metrics, config.aggregation)
        return Joined(cells, image_score(cells, scan.front, self.config.image_score))

    def state(self) -> dict[str, Any]:
        """The fitted state as JSON."""
        return {"units": list(self.units), "network": self.network is not None}

    def save(self, folder: Path) -> None:
        """Write state and network."""
        super().save(folder)
        if self.network is not None:
            _write_network(self.network, folder)

    def restore(self, state: dict[str, Any], folder: Path) -> None:
        """Take the state back."""
        from safetensors.torch import load_file

        from mmad_cli.methods.g2sf.network import LocalScaleNetwork

        self.units = (float(state["units"][0]), float(state["units"][1]))
        self.network = None
        if state["network"]:
            banks = self.panel.banks()
            network = LocalScaleNetwork(sum(banks[k].shape[1] for k in self.pair))
            network.load_state_dict(load_file(str(folder / _NETWORK_FILE)))
            self.network = network.to(self.panel.device).eval().requires_grad_(False)


def joiner(config: IAENetConfig, panel: Panel) -> Joiner:
    """The one that the configuration asks for."""
    if config.single:
        return Alone(config, panel)
    if config.variant in IMPORTANCE:
        return Importance(config, panel)
    others: dict[str, type[Joiner]] = {"aligned_max": Aligned, "ocsvm": OneClass, "g2sf": Geometric}
    return others.get(config.variant, ByRule)(config, panel)


def fit_normalisers(config: IAENetConfig, calibration: Calibration | None, experts: int) -> tuple[Normaliser, ...]:
    """One per expert, from its scores on good patches."""
    if config.normaliser == "none":
        return (Normaliser(),) * experts
    patches = _calibration(calibration).patches
    return tuple(fit_normaliser(one, config.normaliser, config.quantile) for one in patches.T)


def _calibration(calibration: Calibration | None) -> Calibration:
    if calibration is None:
        raise ValueError("calibration: must be given to a fusion that compares scores")
    return calibration


def _write_network(network: nn.Module, folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = {name: value.cpu().contiguous() for name, value in network.state_dict().items()}
    save_file(tensors, str(folder / _NETWORK_FILE))

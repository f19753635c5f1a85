"""An importance-aware ensemble of a 2D expert and 3D experts, and the fusions that it has to beat.

A re-design after the abstract of IAENet (arXiv 2508.20492), which is all of the paper that is public to us.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from mmad_cli.errors import DataError
from mmad_cli.methods.anomaly_map import blur_float, upsample
from mmad_cli.methods.base import (
    BankSize,
    FeatureSet,
    LookedAt,
    MethodDefinition,
    Prediction,
    ProgressCallback,
    SampleFeatures,
    View,
)
from mmad_cli.methods.experts import (
    CELLS,
    GRID,
    RANKS,
    Panel,
    PseudoSample,
    Scan,
    Source,
    bank_selection,
    pseudo_samples,
    with_pseudo,
)
from mmad_cli.methods.iaenet.calibration import Calibration
from mmad_cli.methods.iaenet.config import FAST, INPUTS, IAENetConfig, Variant
from mmad_cli.methods.iaenet.joiners import Joiner, Material, joiner
from mmad_cli.methods.iaenet.noise import with_noise
from mmad_cli.methods.m3dm.streams import SharedProgress

if TYPE_CHECKING:
    from mmad_cli.backbones.specs import FeatureSpec

_STATE_FILE = "state.json"
_MEBIBYTE = 1 << 20
_FOREGROUND = CELLS // 2


class IAENet:
    """Fitted: the experts, and the fusion `joiner_`."""

    joiner_: Joiner

    def __init__(self, config: IAENetConfig, device: str = "cpu") -> None:
        self.config = config
        self.device = device
        self.panel = Panel(
            sources(config),
            bank_selection(config.coreset_fraction, config.coreset_eps, config.coreset_dtype),
            config.augmentations,
            bank_rows=config.bank_rows,
            background=config.background == "uniform",
            device=device,
        )
        # whether the experts are saved with the fusion: not where a stage keeps them
        self._own_experts = True

    @property
    def view(self) -> View:
        """The whole scan."""
        return "resize"

    @property
    def experts(self) -> Panel:
        """The experts, which the stages fit once for all fusions."""
        return self.panel

    @property
    def needs_validation(self) -> bool:
        """Whether the scores of the experts are compared on validation samples."""
        return self.config.needs_validation

    def features(self) -> dict[str, FeatureSpec]:
        """Features of every expert, and those of the pseudo anomalies of training samples where a fusion learns."""
        return with_pseudo(self.panel.sources, self.config.augmentations)

    def fit(
        self,
        train: FeatureSet,
        validation: FeatureSet,
        *,
        seed: int,
        progress: ProgressCallback | None = None,
    ) -> None:
        """Fit experts and fusion; see `fit_resumable`."""
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
        """Select the banks unless a stage has; look at validation samples and pseudo anomalies; train the fusion.

        `seed` starts the stream of the banks' projections, and the training. Raises DataError without training samples,
        and without validation samples or pseudo-anomalous patches where they are needed.
        """
        if len(train) == 0:
            raise DataError("there are no training samples; a memory bank needs at least one good sample")
        tell = SharedProgress(progress, 4000)
        self._own_experts = not isinstance(train[0], LookedAt)
        if self._own_experts:
            self.panel.fit(train, seed=seed, progress=tell.share(1000))
        material = self._material(train, validation, seed, folder, tell)
        fusion = joiner(self.config, self.panel)
        fusion.fit(material)
        self.joiner_ = fusion

    def losses(self) -> dict[str, list[float]]:
        """Mean loss per epoch of the fusion's network; empty without one."""
        return self._fitted().curves

    def predict(self, sample: SampleFeatures) -> Prediction:
        """Score one sample. Raises RuntimeError before `fit` or `load`."""
        fusion = self._fitted()
        joined = fusion.join(sample, self._scan(sample, test=True))
        return Prediction(blur_float(upsample(joined.cells, GRID)), joined.image)

    def banks(self) -> dict[str, BankSize]:
        """Sizes of the banks by expert."""
        return self.panel.sizes

    def save(self, folder: Path) -> None:
        """Write the fusion, and the experts where no stage keeps them, into an existing empty folder."""
        fusion = self._fitted()
        sizes = {name: [size.rows, size.dim] for name, size in self.panel.sizes.items()}
        if self._own_experts:
            self.panel.save(folder)
        (folder / _STATE_FILE).write_text(json.dumps({"variant": self.config.variant, "banks": sizes}) + "\n")
        fusion.save(folder)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. Raises DataError when the files do not belong together."""
        state = json.loads((folder / _STATE_FILE).read_text())
        self._own_experts = self.panel.saved_in(folder)
        if self._own_experts:
            self.panel.load(folder)
        sizes = {name: [size.rows, size.dim] for name, size in self.panel.sizes.items()}
        if sizes != state["banks"] or state["variant"] != self.config.variant:
            raise DataError(f"{folder}: the memory banks are not those described in {_STATE_FILE}; fit again")
        fusion = joiner(self.config, self.panel)
        fusion.load(folder)
        self.joiner_ = fusion

    def memory_estimate(self, n_train: int) -> int:
        """Peak bytes of `fit` beyond the networks: projected rows of the largest bank, or banks and looks."""
        from mmad_cli.memory import projected_dimension

        config, n = self.config, max(n_train, 1)
        selecting = held = 0
        made = min(n * len(config.augmentations), config.pseudo_samples)
        for rows, channels in (source.shape() for source in self.panel.sources):
            width = projected_dimension(n * rows, channels, config.coreset_eps) or channels
            selecting = max(selecting, int((12.0 if config.coreset_dtype == "float16" else 5.2) * n * rows * width))
            held += int(8 * config.coreset_fraction * n * rows * channels)
            if config.variant in ("iaf_f", "g2sf"):
                # gathered in parts, then joined, in half precision
                held += 4 * made * min(rows, _FOREGROUND) * channels
        return max(selecting, held + 12 * RANKS * _FOREGROUND * len(self.panel.sources) * made) + 256 * _MEBIBYTE

    def _material(
        self, train: FeatureSet, validation: FeatureSet, seed: int, folder: Path | None, tell: SharedProgress
    ) -> Material:
        config, look = self.config, tell.share(1500)
        made = pseudo_samples(train, config.augmentations)
        samples: list[SampleFeatures | PseudoSample] = [*(validation if config.needs_validation else ()), *made]
        scans: list[Scan] = []
        for done, sample in enumerate(samples, start=1):
            scans.append(self._scan(sample))
            look(done, len(samples))
        first = len(samples) - len(made)
        pseudo = [(one, scan) for one, scan in zip(made, scans[first:], strict=True) if scan.front.any()]
        good = scans[:first] if config.needs_validation else [scan for _, scan in pseudo]
        return Material(
            calibration=Calibration.of(good) if config.calibrated else None,
            pseudo=pseudo,
            seed=seed,
            folder=folder,
            progress=tell.share(1500),
        )

    def _scan(self, sample: SampleFeatures | PseudoSample, *, test: bool = False) -> Scan:
        """What the experts say of a sample, with noise where the configuration asks for it."""
        config, scan = self.config, self.panel.scan(sample)
        if config.noise_expert is None or (config.noise_when == "test" and not test):
            return scan
        name = str(sample.index) if isinstance(sample, PseudoSample) else ""
        return with_noise(scan, config.experts.index(config.noise_expert), name)

    def _fitted(self) -> Joiner:
        if not hasattr(self, "joiner_"):
            raise RuntimeError("the method is not fitted; call fit or load first")
        return self.joiner_


def sources(config: IAENetConfig) -> list[Source]:
    """The experts' views of a scan."""
    known = {
        "image": lambda: Source.image(
            "image",
            config.rgb_backbone,
            input=INPUTS[config.mode2d],
            outputs=config.rgb_outputs,
            size=config.rgb_size,
            norm=config.rgb_norm,
            xyz_resize=config.xyz_resize,
        ),
        "fpfh": lambda: Source.fpfh("fpfh", xyz_resize=config.xyz_resize),
        "points": lambda: Source.point(
            "points",
            config.point_backbone,
            groups=config.groups,
            group_size=config.group_size,
            point_bn=config.point_bn,
            fps_skip_origin=False,
            idw="direct",
            xyz_resize=config.xyz_resize,
        ),
    }
    return [known[name]() for name in config.experts]


DEFINITION = MethodDefinition(
    name="iaenet",
    title="importance-aware ensemble of experts",
    version=2,
    config=IAENetConfig,
    build=IAENet,
    variants={
        "iaf_s": "importance-aware fusion of scores and their neighbourhood",
        "iaf_f": "importance-aware fusion that sees features and prototypes too",
        "mean": "mean of the experts' scores on one scale",
        "max": "largest of the experts' scores on one scale",
        "product": "product of the experts' scores on one scale",
        "aligned_max": "largest score after an affine map to one expert (Shape-Guided)",
        "ocsvm": "weights of linear one-class machines (M3DM)",
        "g2sf": "G2SF on the 2D expert and the last 3D expert",
        "image": "the 2D expert alone",
        "fpfh": "FPFH alone",
        "points": "the point network alone",
    },
    default_variant="iaf_s",
    modalities=dict.fromkeys(get_args(Variant), "3D"),
    protocol="m3dm",
    recipes={"official": {}, "corrected": {}, "fast": FAST},
    source="after the abstract of arXiv 2508.20492",
    libraries=("numpy", "scipy", "scikit-learn", "torch", "faiss"),
    notes=(
        "Only the abstract of IAENet is public to us: this is our own design after it, not a reproduction, so no "
        "printed number is compared with it.",
        "With mode2d=rgb the 2D expert sees colours and the ensemble is one of RGB and 3D.",
    ),
    qualifier="re-design after the abstract",
)

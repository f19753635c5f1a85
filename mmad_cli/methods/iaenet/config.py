"""Every switch of the importance-aware ensemble.

Of IAENet (arXiv 2508.20492) only the abstract is public to us: one 2D expert, several 3D experts, late fusion of their
scores by a trained module with several losses. Every default below is ours.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from mmad_cli.methods.btf import as_tuple
from mmad_cli.methods.experts.pseudo_config import PseudoConfig, Share
from mmad_cli.pseudo.config import Augmentation

ExpertName = Literal["image", "fpfh", "points"]
IMAGE: ExpertName = "image"

Importance = Literal["iaf_s", "iaf_f"]
Variant = Literal[
    "iaf_s", "iaf_f", "mean", "max", "product", "aligned_max", "ocsvm", "g2sf", "image", "fpfh", "points"
]  # fmt: skip
IMPORTANCE: tuple[Importance, ...] = ("iaf_s", "iaf_f")

Mode2D = Literal["normal", "depth", "render", "rgb"]
INPUTS: dict[Mode2D, str] = {"normal": "normals", "depth": "relief", "render": "render", "rgb": "rgb"}

Weight = Annotated[float, Field(ge=0)]


def _names(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class IAENetConfig(PseudoConfig):
    """Switches of the ensemble; the defaults are our design."""

    variant: Variant = "iaf_s"

    experts: Annotated[tuple[ExpertName, ...], BeforeValidator(_names), Field(min_length=1)] = (
        "image", "fpfh", "points",
    )  # fmt: skip
    # what the 2D network sees; with `rgb` the ensemble is one of RGB and 3D
    mode2d: Mode2D = "normal"
    rgb_backbone: str = Field(default="vit_base_patch8_224.dino", min_length=1)
    # None: a ViT's tokens; a convolutional network needs the numbers of its outputs
    rgb_outputs: Annotated[tuple[int, ...] | None, BeforeValidator(as_tuple)] = None
    rgb_size: int = Field(default=224, ge=8)
    rgb_norm: Literal["imagenet", "model"] = "imagenet"
    point_backbone: Literal["point_mae", "point_bert", "builtin_points"] = "point_mae"
    groups: int = Field(default=512, ge=3)
    group_size: int = Field(default=128, ge=1)
    point_bn: Literal["batch", "eval"] = "batch"
    xyz_resize: Literal["floor", "center"] = "center"

    # rows that a bank is selected from
    bank_rows: Literal["foreground", "all"] = "foreground"
    coreset_fraction: float = Field(default=0.1, gt=0, le=1)
    coreset_eps: float = Field(default=0.9, gt=0, lt=1)
    coreset_dtype: Literal["float16", "float32"] = "float32"

    # how scores of the experts are brought to one scale, and on which patches
    normaliser: Literal["quantile", "mean", "zscore", "none"] = "quantile"
    quantile: float = Field(default=0.995, gt=0, le=1)
    normaliser_on: Literal["validation", "pseudo"] = "validation"

    # of the pseudo anomalies: fewer than G2SF has, moved with their coordinates, and some with bumps and holes
    pseudo_samples: int = Field(default=400, ge=1)
    geometry: Literal["resample", "consistent"] = "consistent"
    bump_probability: Share = 0.5
    hole_probability: Share = 0.15

    # `softmax` sums to 1; `sigmoid` does not; `scaled`: exp(tanh) in [1/e, e] times a global share (G2SF)
    weights: Literal["softmax", "sigmoid", "scaled"] = "softmax"
    # `image`: one set of weights for a whole scan
    level: Literal["patch", "image"] = "patch"
    # None: the module's own, 0.1 of `iaf_s` and 0.5 of `iaf_f`
    dropout: float | None = Field(default=None, ge=0, lt=1)
    # 0: nothing is trained, the weights are equal
    epochs: int = Field(default=50, ge=0)
    # None: the module's own, 1e-3 of `iaf_s` and 1.5e-4 of `iaf_f`
    rate: float | None = Field(default=None, gt=0)
    # pseudo anomalies of `iaf_s`, patches of `iaf_f`
    batch_samples: int = Field(default=8, ge=1)
    batch_patches: int = Field(default=8192, ge=2)
    weight_decay: Weight = 1e-4
    loss_det: Weight = 1.0
    loss_col: Weight = 1.0
    loss_str: Weight = 1.0
    loss_imp: Weight = 0.5
    loss_bal: Weight = 0.01
    # of the target of the importance loss
    temperature: float = Field(default=0.5, gt=0)
    # epoch that is kept: the lowest false-positive rate at 95 % on pseudo anomalies, or the last
    keep: Literal["best", "last"] = "best"

    # scores of cells without points: none, or those of equal weights
    background: Literal["zero", "uniform"] = "zero"
    # `max` of the foreground cells, or the mean of the highest 0.1 % of them
    image_score: Literal["max", "top"] = "max"
    # image score of a lone expert: re-weighted as in PatchCore, or the largest distance
    single_score: Literal["reweighted", "max"] = "reweighted"

    # an expert whose scores are replaced by noise, from the start or in test scans only: how a fusion stands that
    noise_expert: ExpertName | None = None
    noise_when: Literal["always", "test"] = "always"

    # of the one-class machine of `ocsvm`, as M3DM has them
    ocsvm_nu: float = Field(default=0.5, gt=0, le=1)
    ocsvm_maxiter: int = Field(default=1000, ge=1)
    ocsvm_random_state: int = 42
    # by which the 2D expert's scores are multiplied before it
    ocsvm_image_factor: float = Field(default=0.1, gt=0)
    # of the network of `g2sf`
    g2sf_epochs: int = Field(default=80, ge=0)
    g2sf_batch_share: float = Field(default=0.035, gt=0, le=1)
    g2sf_consistency_share: float = Field(default=1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _combination_exists(self) -> IAENetConfig:
        if len(set(self.experts)) != len(self.experts):
            raise ValueError(f"experts: must be different ones, got {', '.join(self.experts)}")
        if self.variant in ("image", "fpfh", "points") and self.variant not in self.experts:
            raise ValueError(f"experts: variant {self.variant} needs {self.variant}, got {', '.join(self.experts)}")
        if self.variant == "g2sf" and (IMAGE not in self.experts or len(self.experts) < 2):
            raise ValueError(f"experts: variant g2sf needs image and a 3D expert, got {', '.join(self.experts)}")
        if self.noise_expert is not None and self.noise_expert not in self.experts:
            raise ValueError(f"noise_expert: must be one of {', '.join(self.experts)}, got {self.noise_expert}")
        if self.variant == "iaf_f" and self.level == "image":
            raise ValueError("level: weights of a whole scan exist for variant iaf_s only")
        return self

    @property
    def single(self) -> bool:
        """Whether the variant is one expert alone."""
        return self.variant in self.experts

    @property
    def calibrated(self) -> bool:
        """Whether scores of good patches are needed: not for a lone expert, and G2SF has units of its own."""
        if self.single or self.variant == "g2sf":
            return False
        return self.normaliser != "none" or self.variant in ("aligned_max", "ocsvm")

    @property
    def needs_validation(self) -> bool:
        """Whether these good patches are those of validation samples."""
        return self.calibrated and self.normaliser_on == "validation"

    @property
    def needs_pseudo(self) -> bool:
        """Whether pseudo anomalies are needed."""
        return self.variant in (*IMPORTANCE, "g2sf") or (self.calibrated and self.normaliser_on == "pseudo")

    @property
    def augmentations(self) -> list[Augmentation]:
        """The pseudo anomalies of a training sample; none where nothing reads them."""
        return super().augmentations if self.needs_pseudo else []


FAST: dict[str, Any] = {
    "pseudo_per_sample": 2,
    "pseudo_samples": 100,
    # smaller batches, so that few pseudo anomalies still make hundreds of steps
    "batch_samples": 2,
    "batch_patches": 1024,
    "epochs": 60,
    "g2sf_epochs": 5,
    "g2sf_consistency_share": 0.1,
}

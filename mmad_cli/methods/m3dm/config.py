"""Every switch of M3DM. Defaults are what the published code computes; `CORRECTED` repairs its known defects."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mmad_cli.methods.base import MethodConfig

Variant = Literal["dino", "point_mae", "fusion", "dino+point_mae", "dino+point_mae+add", "dino+point_mae+fusion"]
BankName = Literal["points", "rgb", "fused"]

# Banks in the order in which the published code draws their projections and lists their scores
PARTS: dict[str, tuple[BankName, ...]] = {
    "dino": ("rgb",),
    "point_mae": ("points",),
    "fusion": ("fused",),
    "dino+point_mae": ("points", "rgb"),
    "dino+point_mae+add": ("points", "rgb"),
    "dino+point_mae+fusion": ("points", "rgb", "fused"),
}
# Name of the published fusion block in the weights registry
UFF_WEIGHTS = "m3dm_uff"
WITH_DECISION_FUSION = ("dino+point_mae", "dino+point_mae+fusion")

_TWO_BANK_SCALE = 1000.0
_SINGLE_BANK_EPS = 1e-5


class M3DMConfig(MethodConfig):
    """Switches of M3DM; the defaults are what the published code computes."""

    variant: Variant = "dino+point_mae+fusion"

    rgb_backbone: str = "vit_base_patch8_224.dino"
    # input pixels of the RGB network; with its patch size it makes the grid, 28 x 28 as published
    rgb_size: int = Field(default=224, ge=8)
    # `model`: the constants that the network was trained with
    rgb_norm: Literal["imagenet", "model"] = "imagenet"
    point_backbone: Literal["point_mae", "point_bert", "builtin_points"] = "point_mae"
    groups: int = Field(default=1024, ge=3)
    group_size: int = Field(default=128, ge=1)
    # `batch` normalises with the statistics of the scan at hand (the published network is left in training mode),
    # `eval` with the stored ones
    point_bn: Literal["batch", "eval"] = "batch"
    # the published code leaves stochastic depth on, which makes its features random
    point_droppath: Literal["off", "on"] = "off"
    droppath_seed: int = Field(default=0, ge=0)
    # `expanded`: squared distances as |a|^2 + |b|^2 - 2ab in float32, inexact near group centres
    idw: Literal["expanded", "direct"] = "expanded"
    # no group centre within 3.2 cm of the sensor's origin
    fps_skip_origin: bool = True
    # `floor` shifts the cloud by half a target pixel against image and mask; `center` does not
    xyz_resize: Literal["floor", "center"] = "floor"
    # of both networks; features are kept in float32
    precision: Literal["float32", "bfloat16"] = "float32"

    max_sample: int = Field(default=400, ge=1)
    # the published loop takes one sample more than `max_sample`
    max_sample_extra: bool = True
    # only so many samples enter the point and the fused bank
    asy_memory_bank: int | None = Field(default=None, ge=1)
    # `shared_rgb_std`: with several banks all share the mean of the point and the deviation of the RGB bank, and a
    # lone point or fused bank is not normalised; `per_bank`: each bank its own mean and deviation
    norm: Literal["shared_rgb_std", "per_bank"] = "shared_rgb_std"
    coreset_fraction: float = Field(default=0.1, gt=0, le=1)
    # `chained`: RGB and fused bank keep `coreset_fraction` of the size of the reduced point bank
    coreset_count: Literal["chained", "own"] = "chained"
    coreset_eps: float = Field(default=0.9, gt=0, lt=1)
    # `float16` makes ties; `float32` is exact
    coreset_dtype: Literal["float16", "float32"] = "float16"
    # None: one random stream from the run's seed for all projections; a number: each projection starts from it
    random_state: int | None = Field(default=None, ge=0)
    # three banks. `official` drops zero rows after the normalisation, which removes none, and appends a row of zeros
    # that is no background patch; `filtered` drops them before and appends the background patch, normalised
    zero_row: Literal["official", "filtered"] = "official"
    # lone point bank: drop rows with a zero before the selection and append one row of zeros
    rm_zero_for_project: bool = False

    # `expanded`: patch distances by |a|^2 + |b|^2 - 2ab in float32, which leaves rounding noise where a patch is in the
    # bank; decision fusion learns from it
    distances: Literal["expanded", "direct"] = "expanded"
    # divides distances before the image score; None: 1000 with two banks and decision fusion, else 1
    score_scale: float | None = Field(default=None, gt=0)
    # added to the denominator of the weight; None: 1e-5 for a lone RGB or point bank, else 0
    w_eps: float | None = Field(default=None, ge=0)
    # equal but for overflow: `stable` divides numerator and denominator of the weight by exp(s*)
    score_form: Literal["exact", "stable"] = "exact"
    # `pillow8` goes through 256 levels of the map's own maximum
    blur: Literal["pillow8", "float"] = "pillow8"

    # the samples that decision fusion learns from; those of `train` are in the banks, so their scores are too good.
    # `fixed`: it learns nothing and takes the weights below once more, for a few samples teach it little
    dlf_fit: Literal["train", "validation", "fixed"] = "train"
    xyz_s_lambda: float = Field(default=1.0, ge=0)
    rgb_s_lambda: float = Field(default=0.1, ge=0)
    fusion_s_lambda: float = Field(default=1.0, ge=0)
    xyz_smap_lambda: float = Field(default=1.0, ge=0)
    rgb_smap_lambda: float = Field(default=0.1, ge=0)
    fusion_smap_lambda: float = Field(default=1.0, ge=0)
    ocsvm_nu: float = Field(default=0.5, gt=0, le=1)
    ocsvm_maxiter: int = Field(default=1000, ge=1)
    ocsvm_random_state: int = Field(default=42, ge=0)

    # the fused feature: the published block, one trained on the dataset at hand, or both features side by side
    uff: Literal["released", "retrained", "concat"] = "released"
    # `scrambled`: training pairs as the published code saves them, 8 of 3136 RGB patches in their place
    uff_pairs: Literal["scrambled", "aligned"] = "scrambled"
    # `official`: 3 epochs, 30 updates on MVTec 3D-AD; `corrected`: a fixed number of updates, annealed rate
    uff_recipe: Literal["official", "corrected"] = "official"
    uff_temperature: float = Field(default=1.0, gt=0)
    uff_rate: float = Field(default=0.003, gt=0)
    uff_batch: int = Field(default=16, ge=1)
    uff_accumulate: int = Field(default=16, ge=1)
    uff_epochs: int = Field(default=3, ge=1)
    uff_warmup_epochs: int = Field(default=1, ge=0)
    uff_steps: int = Field(default=750, ge=1)
    uff_cycle: int = Field(default=250, ge=1)

    @property
    def parts(self) -> tuple[BankName, ...]:
        """Banks of the variant, in the order of their scores."""
        return PARTS[self.variant]

    @property
    def needs_decision_fusion(self) -> bool:
        """Whether a learned weighting joins the banks."""
        return self.variant in WITH_DECISION_FUSION

    @property
    def sample_limit(self) -> int:
        """Largest number of training samples that are used."""
        return self.max_sample + int(self.max_sample_extra)

    @property
    def scale(self) -> float:
        """Divisor of the distances in the image score."""
        if self.score_scale is not None:
            return self.score_scale
        return _TWO_BANK_SCALE if self.variant == "dino+point_mae" else 1.0

    @property
    def weight_eps(self) -> float:
        """Addend in the denominator of the image score's weight."""
        if self.w_eps is not None:
            return self.w_eps
        return _SINGLE_BANK_EPS if self.variant in ("dino", "point_mae") else 0.0

    def image_lambda(self, part: BankName) -> float:
        """Weight of a bank's image score before decision fusion."""
        return {"points": self.xyz_s_lambda, "rgb": self.rgb_s_lambda, "fused": self.fusion_s_lambda}[part]

    def map_lambda(self, part: BankName) -> float:
        """Weight of a bank's anomaly map before decision fusion."""
        return {"points": self.xyz_smap_lambda, "rgb": self.rgb_smap_lambda, "fused": self.fusion_smap_lambda}[part]


CORRECTED: dict[str, Any] = {
    "rgb_norm": "model",
    "idw": "direct",
    "fps_skip_origin": False,
    "xyz_resize": "center",
    "max_sample_extra": False,
    "norm": "per_bank",
    "coreset_count": "own",
    "coreset_dtype": "float32",
    "zero_row": "filtered",
    "distances": "direct",
    "score_scale": 1.0,
    "w_eps": 0.0,
    "score_form": "stable",
    "blur": "float",
    "dlf_fit": "validation",
    # 0.1 makes up for the shared deviation, which is no longer shared
    "rgb_s_lambda": 1.0,
    "rgb_smap_lambda": 1.0,
    "uff": "retrained",
    "uff_pairs": "aligned",
    "uff_recipe": "corrected",
    "uff_temperature": 0.1,
}
# with the built-in backbones: the published fusion block does not fit them, and what banks share is scaled to the
# published networks, so each bank has its own normalisation and size, and weights are learned from unseen samples
BUILTIN: dict[str, Any] = {
    **{
        name: CORRECTED[name]
        for name in (
            "norm",
            "coreset_count",
            "coreset_dtype",
            "zero_row",
            "distances",
            "dlf_fit",
            "rgb_s_lambda",
            "rgb_smap_lambda",
        )
    },
    "uff": "concat",
}

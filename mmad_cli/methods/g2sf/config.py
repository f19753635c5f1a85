"""Every switch of G2SF. Defaults are what the released code computes; `CORRECTED` repairs its known defects."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from mmad_cli.methods.btf import as_tuple
from mmad_cli.methods.experts.pseudo_config import PseudoConfig

Variant = Literal["dino+point_mae", "cnn+fpfh"]
Weight = Annotated[float, Field(ge=0)]

_IMAGE_NETWORKS: dict[Variant, str] = {
    "dino+point_mae": "vit_base_patch8_224.dino",
    "cnn+fpfh": "resnet18.tv_in1k",
}


class G2SFConfig(PseudoConfig):
    """Switches of G2SF; the defaults are what the released code computes."""

    variant: Variant = "dino+point_mae"

    # None: the variant's own
    rgb_backbone: str | None = None
    # of the network of `cnn+fpfh`
    rgb_outputs: Annotated[tuple[int, ...], BeforeValidator(as_tuple), Field(min_length=1)] = (2, 3)
    rgb_size: int = Field(default=224, ge=8)
    # `model`: the constants that the network was trained with
    rgb_norm: Literal["imagenet", "model"] = "imagenet"
    point_backbone: Literal["point_mae", "point_bert", "builtin_points"] = "point_mae"
    groups: int = Field(default=512, ge=3)
    group_size: int = Field(default=128, ge=1)
    point_bn: Literal["batch", "eval"] = "batch"
    idw: Literal["expanded", "direct"] = "expanded"
    fps_skip_origin: bool = True
    xyz_resize: Literal["floor", "center"] = "floor"

    coreset_fraction: float = Field(default=0.1, gt=0, le=1)
    coreset_eps: float = Field(default=0.9, gt=0, lt=1)
    # `float16` makes ties; `float32` is exact
    coreset_dtype: Literal["float16", "float32"] = "float16"

    # `patch` lets patches of one scan be on both sides; `sample` divides training scans
    split: Literal["patch", "sample"] = "patch"
    # how features of pseudo anomalies are held while training
    pool_dtype: Literal["float16", "float32"] = "float16"
    noise: float = Field(default=0.1, ge=0)
    dropout: float = Field(default=0.5, ge=0, lt=1)
    # 0: nothing is trained; local scales are 1 and both global ones 0.5
    epochs: int = Field(default=80, ge=0)
    batch: int = Field(default=8192, ge=2)
    batch_share: float = Field(default=0.035, gt=0, le=1)
    rate: float = Field(default=1.5e-4, gt=0)
    global_rate: float = Field(default=5e-3, gt=0)
    weight_decay: Weight = 1e-4

    # q of separation and margin: the code squares the metric, the paper's figure does not
    metric_power: Literal[1, 2] = 2
    # weights of the separation loss, added to the code after the paper; `none` is the paper's form
    separation_weights: Literal["clamped", "none"] = "clamped"
    alpha: Weight = 10.0
    beta: Weight = 40.0
    gamma: Weight = 3.0
    mu: Weight = 20.0
    l1: Weight = 5e-4
    proximal: int = Field(default=5, ge=1)
    distal: int = Field(default=10, ge=2)
    proximal_factor: float = Field(default=1.2, gt=0)
    # share of a batch that the consistency loss, which costs most, is computed on
    consistency_share: float = Field(default=1.0, gt=0, le=1)

    # neighbours beside the nearest that the score of a patch is taken over
    neighbours: int = Field(default=5, ge=0)
    aggregation: Literal["min", "nearest", "mean", "max"] = "min"
    blur: Literal["pillow8", "float"] = "pillow8"

    @model_validator(mode="after")
    def _neighbourhood(self) -> G2SFConfig:
        if self.distal <= self.proximal:
            raise ValueError(f"distal: must be above proximal={self.proximal}, got {self.distal}")
        return self

    @property
    def image_network(self) -> str:
        """The RGB network."""
        return self.rgb_backbone or _IMAGE_NETWORKS[self.variant]


CORRECTED: dict[str, Any] = {
    "rgb_norm": "model",
    "idw": "direct",
    "fps_skip_origin": False,
    "xyz_resize": "center",
    "coreset_dtype": "float32",
    "geometry": "consistent",
    "split": "sample",
    "blur": "float",
}

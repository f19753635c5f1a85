"""What features a method asks for: a small, canonical, comparable description.

A `FeatureSpec` names a backbone, what the backbone sees and every setting that changes a feature value. Two specs
that mean the same compare equal and have the same `canonical()` form, which the store derives its keys from.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from math import prod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mmad_cli.errors import UsageError, unknown_name
from mmad_cli.pseudo.config import PSEUDO_VERSION, Augmentation

View = Literal["resize", "crop"]
Input = Literal["rgb", "depth", "relief", "normals", "render", "xyz"]
XyzResize = Literal["floor", "center"]
Normalisation = Literal["imagenet", "model", "none"]
Precision = Literal["float32", "bfloat16"]

PointNetworkName = Literal["point_mae", "point_bert", "builtin_points"]

NETWORK_SIZE = 224


class _Params(BaseModel, ABC):
    """Base of the per-backbone settings: unknown names are errors, values do not change."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    version: ClassVar[str]
    libraries: ClassVar[tuple[str, ...]]
    inputs: ClassVar[tuple[Input, ...]]
    views: ClassVar[tuple[View, ...]] = ("resize",)

    def weights_names(self) -> list[str]:
        """Names of the pretrained weights that the backbone needs, in the registry's terms."""
        return []

    @abstractmethod
    def estimated_bytes(self) -> int:
        """About how many bytes the features of one sample take."""


class FpfhParams(_Params):
    """Fast point feature histograms as BTF computes them (arXiv 2203.05550; Rusu et al., ICRA 2009).

    BTF writes its radii as 2 x and 5 x a "voxel size" of 0.05 m; nothing is down-sampled.
    """

    version: ClassVar[str] = "1"
    libraries: ClassVar[tuple[str, ...]] = ("open3d",)
    inputs: ClassVar[tuple[Input, ...]] = ("xyz",)

    size: int = Field(default=NETWORK_SIZE, ge=8)
    xyz_resize: XyzResize = "floor"
    normal_radius: float = Field(default=0.1, gt=0)
    normal_neighbours: int = Field(default=30, ge=3)
    feature_radius: float = Field(default=0.25, gt=0)
    feature_neighbours: int = Field(default=100, ge=2)

    def estimated_bytes(self) -> int:
        """33 bins and a pixel index for every pixel; scans have points at half of them, more or less."""
        return self.size * self.size * (33 + 1) * 4


class TimmParams(_Params):
    """A timm network: feature maps of a CNN (`outputs` given) or the final patch tokens of a ViT (`outputs` None).

    `norm`: `imagenet` the ImageNet mean and standard deviation for every network (as M3DM and BTF do), `model` the
    network's own constants, `none` raw values. `precision` bfloat16 computes in bfloat16; features stay float32.

    Of the cloud a network sees, by `input`: `depth` z in metres in three equal channels; `relief` the same, brought to
    0 to 1 between the 1 % and 99 % quantiles of the scan; `normals` surface normals as colours; `render` 27 shaded
    views, whose features are averaged over the points under each cell of a 56 x 56 grid (CPMF).
    """

    version: ClassVar[str] = "1"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "timm")
    inputs: ClassVar[tuple[Input, ...]] = ("rgb", "depth", "relief", "normals", "render")
    views: ClassVar[tuple[View, ...]] = ("resize", "crop")

    model: str = Field(min_length=1)
    outputs: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    norm: Normalisation = "imagenet"
    size: int = Field(default=NETWORK_SIZE, ge=8)
    xyz_resize: XyzResize = "floor"
    precision: Precision = "float32"
    # of a ViT, so many blocks are used; None: all
    blocks: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _outputs_ascend(self) -> TimmParams:
        if self.outputs is not None and (not self.outputs or list(self.outputs) != sorted(set(self.outputs))):
            raise ValueError(f"outputs: expected distinct indices in ascending order, got {list(self.outputs)}")
        if self.outputs is not None and self.blocks is not None:
            raise ValueError("blocks: is for patch tokens; feature outputs are chosen with outputs")
        return self

    def weights_names(self) -> list[str]:
        """The timm model name with its tag."""
        return [self.model]

    def estimated_bytes(self) -> int:
        """The output arrays, from the architecture."""
        from mmad_cli.backbones.timm_backbone import output_shapes

        return sum(4 * prod(shape) for shape in output_shapes(self).values())


class DepthParams(_Params):
    """The Z image of the cloud at network size, without a network (BTF's raw, HoG and SIFT ablations)."""

    version: ClassVar[str] = "1"
    libraries: ClassVar[tuple[str, ...]] = ("numpy",)
    inputs: ClassVar[tuple[Input, ...]] = ("depth",)

    size: int = Field(default=NETWORK_SIZE, ge=8)
    xyz_resize: XyzResize = "floor"

    def estimated_bytes(self) -> int:
        """One float32 per pixel."""
        return self.size * self.size * 4


class PointParams(_Params):
    """Group tokens of a point transformer and what carries them to points, pixels and patches (M3DM, section 3).

    `point_bn`: `batch` normalises with the statistics of the sample, as the published code does by staying in
    training mode; `eval` with the stored ones. `point_droppath`: `on` draws stochastic depth as that mode does, seeded
    by `droppath_seed` and the sample. `fps_skip_origin`: points within 3 cm of the sensor are no centres. `fps_start`:
    the first centre is the first point, or one drawn with `fps_seed` (CMDR-IAD). `idw`: interpolation distances as
    published (`expanded`, float32) or exact (`direct`). `blocks`: transformer blocks that are used (CFM prunes them).
    `precision` bfloat16 computes the wide layers in bfloat16; features stay float32.
    """

    version: ClassVar[str] = "2"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "scipy")
    inputs: ClassVar[tuple[Input, ...]] = ("xyz",)
    network: ClassVar[PointNetworkName]

    groups: int = Field(default=1024, ge=3)
    group_size: int = Field(default=128, ge=1)
    point_bn: Literal["batch", "eval"] = "batch"
    point_droppath: Literal["off", "on"] = "off"
    droppath_seed: int = Field(default=0, ge=0)
    fps_skip_origin: bool = True
    fps_start: Literal["first", "random"] = "first"
    fps_seed: int = Field(default=0, ge=0)
    blocks: int = Field(default=12, ge=1, le=12)
    idw: Literal["expanded", "direct"] = "expanded"
    size: int = Field(default=NETWORK_SIZE, ge=8)
    xyz_resize: XyzResize = "floor"
    precision: Precision = "float32"

    @model_validator(mode="before")
    @classmethod
    def _seed_only_where_drawn(cls, data: Any) -> Any:
        # where nothing is drawn a seed must not make two equal features differ
        if not isinstance(data, dict):
            return data
        idle = set()
        if data.get("point_droppath", "off") == "off":
            idle.add("droppath_seed")
        if data.get("fps_start", "first") == "first":
            idle.add("fps_seed")
        return {name: value for name, value in data.items() if name not in idle}

    def weights_names(self) -> list[str]:
        """The network is the name of its weights."""
        return [self.network]

    def estimated_bytes(self) -> int:
        """Tokens and centres per group; pixel, neighbours and weights for every pixel, half of which have a point."""
        channels = 1152 if self.blocks in (4, 8, 12) else 384
        return self.groups * (channels + 3) * 4 + self.size * self.size * (4 + 3 * 2 + 3 * 4)


class PointMaeParams(PointParams):
    """Point-MAE (arXiv 2203.06604)."""

    network: ClassVar[PointNetworkName] = "point_mae"


class PointBertParams(PointParams):
    """Point-BERT (arXiv 2111.14819)."""

    network: ClassVar[PointNetworkName] = "point_bert"


class BuiltinPointsParams(PointParams):
    """The built-in point network; what concerns transformers that were trained elsewhere has no effect on it."""

    network: ClassVar[PointNetworkName] = "builtin_points"

    @model_validator(mode="before")
    @classmethod
    def _without_foreign_settings(cls, data: Any) -> Any:
        # they change nothing, so they must not make two equal features differ
        foreign = ("point_bn", "point_droppath", "droppath_seed", "blocks")
        return {k: v for k, v in data.items() if k not in foreign} if isinstance(data, dict) else data

    def estimated_bytes(self) -> int:
        """As for the other point networks, with narrower tokens."""
        return self.groups * (288 + 3) * 4 + self.size * self.size * (4 + 3 * 2 + 3 * 4)


PARAMS: dict[str, type[_Params]] = {
    "builtin_points": BuiltinPointsParams,
    "depth": DepthParams,
    "fpfh": FpfhParams,
    "point_bert": PointBertParams,
    "point_mae": PointMaeParams,
    "timm": TimmParams,
}


class FeatureSpec(BaseModel):
    """Which features of a sample: the backbone, what it sees, and its settings.

    backbone: a key of `PARAMS`. view: `resize` (the whole scan at network size) or `crop` (PatchCore's 256/224
    centre crop, RGB only). input: what the backbone reads. params: the backbone's settings; defaults are filled in,
    so `params` is always complete. An unknown backbone or setting is a `UsageError`.

    augmentation: asks for the feature of a pseudo anomaly instead, made from the sample before the backbone sees it;
    its mask comes with the arrays as `pseudo_mask`. Such features exist for training samples only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone: str
    view: View = "resize"
    input: Input
    params: dict[str, Any] = Field(default_factory=dict)
    augmentation: Augmentation | None = None

    @model_validator(mode="before")
    @classmethod
    def _complete_params(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        backbone = data.get("backbone")
        if backbone not in PARAMS:
            raise unknown_name("backbone", str(backbone), PARAMS, "backbone")
        given = dict(data.get("params") or {})
        if data.get("input") == "rgb":
            # the cloud is not read, so how it would be resized must not make two equal features differ
            given.pop("xyz_resize", None)
        try:
            params = PARAMS[backbone].model_validate(given)
        except ValidationError as error:
            raise UsageError(f"backbone {backbone}: {_first_error(error)}") from error
        return {**data, "params": params.model_dump(mode="json")}

    @model_validator(mode="after")
    def _combination_exists(self) -> FeatureSpec:
        kind = PARAMS[self.backbone]
        if self.input not in kind.inputs:
            raise UsageError(f"backbone {self.backbone}: input must be {' or '.join(kind.inputs)}, got {self.input!r}")
        if self.view not in kind.views or (self.view == "crop" and self.input != "rgb"):
            raise UsageError(f"backbone {self.backbone}: view {self.view!r} does not exist for input {self.input!r}")
        if self.view == "crop" and self.params["size"] != NETWORK_SIZE:
            raise UsageError(f"size: the crop view is {NETWORK_SIZE} pixels wide, got {self.params['size']}")
        return self

    def __hash__(self) -> int:
        return hash(json.dumps(self.canonical(), sort_keys=True))

    @property
    def settings(self) -> _Params:
        """`params` as the typed model of the backbone (`FpfhParams`, `TimmParams`)."""
        return PARAMS[self.backbone].model_validate(self.params)

    def canonical(self) -> dict[str, Any]:
        """JSON-able form that is the same for equal specs; every setting that changes a value is in it."""
        form: dict[str, Any] = {
            "backbone": self.backbone,
            "view": self.view,
            "input": self.input,
            "params": dict(sorted(self.params.items())),
        }
        if self.augmentation is not None:
            form["augmentation"] = self.augmentation.canonical()
        return form

    @property
    def plain(self) -> FeatureSpec:
        """The feature of the sample itself: what the backbone computes, pseudo anomaly or not."""
        return self if self.augmentation is None else self.model_copy(update={"augmentation": None})

    def augmented(self, augmentation: Augmentation) -> FeatureSpec:
        """The same feature of a pseudo anomaly of the sample."""
        return self.model_copy(update={"augmentation": augmentation})

    def weights_names(self) -> list[str]:
        """Names of the pretrained weights that the features depend on; empty for hand-made features."""
        return self.settings.weights_names()

    def estimated_bytes(self) -> int:
        """About how many bytes the features of one sample take at most; a timm network is built without values."""
        return self.settings.estimated_bytes()

    def version(self) -> str:
        """Version of the backbone's own code; raised when the same settings give other values."""
        version = PARAMS[self.backbone].version
        return version if self.augmentation is None else f"{version}, pseudo anomalies {PSEUDO_VERSION}"

    def libraries(self) -> tuple[str, ...]:
        """Packages whose versions may change the values, so they enter the store key."""
        libraries = PARAMS[self.backbone].libraries
        return libraries if self.augmentation is None else (*libraries, "scipy", "pillow")

    @classmethod
    def fpfh(cls, **params: Any) -> FeatureSpec:
        """FPFH with BTF's settings unless told otherwise."""
        return cls(backbone="fpfh", input="xyz", params=params)

    @classmethod
    def depth(cls, **params: Any) -> FeatureSpec:
        """The Z image."""
        return cls(backbone="depth", input="depth", params=params)

    @classmethod
    def point(cls, network: PointNetworkName = "point_mae", **params: Any) -> FeatureSpec:
        """Tokens of a point transformer with M3DM's settings unless told otherwise."""
        return cls(backbone=network, input="xyz", params=params)

    @classmethod
    def timm(cls, model: str, *, input: Input = "rgb", view: View = "resize", **params: Any) -> FeatureSpec:
        """Features of a timm network; metres are fed without normalisation unless told otherwise (BTF)."""
        if input == "depth":
            params.setdefault("norm", "none")
        return cls(backbone="timm", view=view, input=input, params={"model": model, **params})


def _first_error(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}, got {first.get('input')!r}" if where else first["msg"]

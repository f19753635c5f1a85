"""BTF, "Back to the Feature" (Horwitz and Hoshen, arXiv 2203.05550): one memory bank of 28 x 28 patches.

Colour features come from an ImageNet network, shape features from FPFH of the point cloud; the published
ablations use the depth image instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field

from mmad_cli.alignment.pooling import patches_from_map, patches_from_points
from mmad_cli.errors import DataError
from mmad_cli.methods.anomaly_map import blur_float, blur_pillow8, upsample
from mmad_cli.methods.base import MAP_SIZE, MethodConfig, MethodDefinition, Prediction, SampleFeatures, View
from mmad_cli.methods.single_bank import SingleBankMethod, coreset_bytes, read_array
from mmad_cli.types import FloatArray

if TYPE_CHECKING:
    from mmad_cli.backbones.specs import FeatureSpec
    from mmad_cli.memory import BankConfig

GRID = 28
PATCHES = GRID * GRID
FPFH_BINS = 33

# FPFH radii in units of `voxel_size`
_NORMAL_RADIUS = 2
_FEATURE_RADIUS = 5

_PARTS: dict[str, tuple[str, ...]] = {
    "rgb": ("rgb",),
    "depth": ("depth",),
    "raw": ("raw",),
    "hog": ("hog",),
    "sift": ("sift",),
    "fpfh": ("fpfh",),
    "rgb+fpfh": ("rgb", "fpfh"),
}
_FROM_Z = ("raw", "hog", "sift")
_CHANNELS = {"raw": 64, "hog": 8, "sift": 128, "fpfh": FPFH_BINS}

Variant = Literal["rgb", "depth", "raw", "hog", "sift", "fpfh", "rgb+fpfh"]


def as_tuple(value: Any) -> Any:
    """A single index as a tuple of one, so that a switch can be given as `rgb_outputs=2`."""
    return (value,) if isinstance(value, int) else value


Outputs = Annotated[tuple[int, ...], BeforeValidator(as_tuple), Field(min_length=1)]


class BTFConfig(MethodConfig):
    """Switches of BTF; the defaults are what the published code computes."""

    variant: Variant = "rgb+fpfh"
    # timm's own checkpoint, not torchvision's: what the plain name resolved to
    rgb_backbone: str = "wide_resnet50_2.racm_in1k"
    rgb_outputs: Outputs = (2, 3)
    # `model`: the constants that the network was trained with
    rgb_norm: Literal["imagenet", "model"] = "imagenet"
    # `floor` shifts the cloud by half a target pixel against image and mask; `center` does not
    xyz_resize: Literal["floor", "center"] = "floor"
    # metres; normals use a radius of 2, FPFH of 5 voxels (nothing is down-sampled)
    voxel_size: float = Field(default=0.05, gt=0)
    # `rows` takes 64 consecutive pixels of an image row as a patch, so the map is spatially wrong; `blocks` 8
    # x 8 blocks
    raw_patches: Literal["rows", "blocks"] = "rows"
    coreset_fraction: float = Field(default=0.1, gt=0, le=1)
    coreset_eps: float = Field(default=0.9, gt=0, lt=1)
    # `float16` makes ties; `float32` is exact
    coreset_dtype: Literal["float16", "float32"] = "float16"
    neighbours: int = Field(default=3, ge=2)
    w_eps: float = Field(default=0.0, ge=0)
    # equal but for overflow: `stable` divides numerator and denominator of the weight by exp(s*)
    score_form: Literal["exact", "stable"] = "exact"
    # `pillow8` goes through 256 levels of the map's own maximum
    blur: Literal["pillow8", "float"] = "pillow8"


class BTF(SingleBankMethod):
    """Back to the Feature."""

    def __init__(self, config: BTFConfig, device: str = "cpu") -> None:
        super().__init__(device)
        self.config = config

    @property
    def view(self) -> View:
        """The whole scan."""
        return "resize"

    def features(self) -> dict[str, FeatureSpec]:
        """One feature for each part of the variant."""
        return {_feature_name(part): self._feature(part) for part in _PARTS[self.config.variant]}

    def patches(self, sample: SampleFeatures) -> FloatArray:
        """Patch rows (784, C): the parts of the variant side by side, not scaled against each other."""
        parts = [self._part(part, sample) for part in _PARTS[self.config.variant]]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def bank_config(self) -> BankConfig:
        """Greedy coreset on sparsely projected rows, starting at row 0."""
        from mmad_cli.memory import BankConfig

        return BankConfig(
            fraction=self.config.coreset_fraction,
            eps=self.config.coreset_eps,
            projection="sparse",
            coreset="greedy",
            coreset_dtype=self.config.coreset_dtype,
        )

    def score(self, patches: FloatArray) -> Prediction:
        """Distance to the nearest row per patch; the image score is the largest one, re-weighted."""
        from mmad_cli.memory import patch_distances, reweighted_score

        nearest, indices = patch_distances(patches, self.bank_.index)
        image_score = reweighted_score(
            patches,
            self.bank_.index,
            nearest,
            indices,
            eps=self.config.w_eps,
            form=self.config.score_form,
            neighbours=self.config.neighbours,
        )
        blur = blur_pillow8 if self.config.blur == "pillow8" else blur_float
        return Prediction(blur(upsample(nearest, GRID)), float(image_score))

    def memory_estimate(self, n_train: int) -> int:
        """Peak bytes of `fit`: the projected rows and the bank."""
        from mmad_cli.memory import projected_dimension

        rows = PATCHES * max(n_train, 1)
        channels = sum(self._channels(part) for part in _PARTS[self.config.variant])
        projected = projected_dimension(rows, channels, self.config.coreset_eps) or channels
        return coreset_bytes(rows, channels, projected, self.bank_config().rows_to_keep(rows))

    def _feature(self, part: str) -> FeatureSpec:
        from mmad_cli.backbones.specs import FeatureSpec

        config = self.config
        if part == "rgb":
            return FeatureSpec.timm(config.rgb_backbone, outputs=list(config.rgb_outputs), norm=config.rgb_norm)
        if part == "depth":
            return FeatureSpec.timm(
                config.rgb_backbone,
                input="depth",
                outputs=list(config.rgb_outputs),
                xyz_resize=config.xyz_resize,
            )
        if part == "fpfh":
            return FeatureSpec.fpfh(
                xyz_resize=config.xyz_resize,
                normal_radius=_NORMAL_RADIUS * config.voxel_size,
                feature_radius=_FEATURE_RADIUS * config.voxel_size,
            )
        return FeatureSpec.depth(xyz_resize=config.xyz_resize)

    def _part(self, part: str, sample: SampleFeatures) -> FloatArray:
        if part in ("rgb", "depth"):
            maps = [read_array(sample, part, f"out{i}") for i in self.config.rgb_outputs]
            return np.concatenate([patches_from_map(one, GRID) for one in maps], axis=1)
        if part == "fpfh":
            return fpfh_patches(sample)
        z = read_array(sample, "z", "z")
        if not z.any():
            raise DataError(f"{sample.id}: no valid 3D points, so there is no depth image; check its xyz file")
        return self._from_z()[part](z)

    def _from_z(self) -> dict[str, Callable[[NDArray[Any]], FloatArray]]:
        raw = raw_row_patches if self.config.raw_patches == "rows" else raw_block_patches
        return {"raw": raw, "hog": hog_patches, "sift": sift_patches}

    def _channels(self, part: str) -> int:
        if part in _CHANNELS:
            return _CHANNELS[part]
        return network_channels(self.config.rgb_backbone, self.config.rgb_outputs)


def fpfh_patches(sample: SampleFeatures) -> FloatArray:
    """FPFH pooled to patch rows (784, 33); empty pixels count as zero. DataError without points."""
    points = read_array(sample, "fpfh", "points")
    if len(points) == 0:
        raise DataError(f"{sample.id}: no valid 3D points, so there are no FPFH features; check its xyz file")
    return patches_from_points(points, read_array(sample, "fpfh", "pixel"), MAP_SIZE, GRID)


def raw_row_patches(z: NDArray[np.floating]) -> FloatArray:
    """Z image (224, 224) cut into 784 runs of 64 consecutive pixels (the published form): (784, 64)."""
    return np.asarray(z, dtype=np.float32).reshape(PATCHES, -1)


def raw_block_patches(z: NDArray[np.floating]) -> FloatArray:
    """Z image (224, 224) cut into 28 x 28 blocks of 8 x 8 pixels, each flattened row-major: (784, 64)."""
    side = z.shape[0] // GRID
    blocks = np.asarray(z, dtype=np.float32).reshape(GRID, side, GRID, side).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(blocks).reshape(PATCHES, side * side)


def hog_patches(z: NDArray[np.floating]) -> FloatArray:
    """Histograms of oriented gradients of the Z image, 8 bins per cell of 8 x 8 pixels: (784, 8)."""
    from skimage.feature import hog

    histogram = hog(
        np.asarray(z, dtype=np.float32),
        orientations=8,
        pixels_per_cell=(8, 8),
        cells_per_block=(1, 1),
        feature_vector=False,
    )
    return np.asarray(histogram.reshape(PATCHES, 8), dtype=np.float32)


def sift_patches(z: NDArray[np.floating]) -> FloatArray:
    """Dense RootSIFT of the Z image, 8 angle bins and 4 x 4 spatial bins of 4 pixels, pooled: (784, 128)."""
    import torch
    from kornia.feature import DenseSIFTDescriptor

    descriptor = DenseSIFTDescriptor(
        num_ang_bins=8,
        num_spatial_bins=4,
        spatial_bin_size=4,
        rootsift=True,
        clipval=0.2,
        stride=1,
        padding=1,
    )
    with torch.inference_mode():
        maps = descriptor(torch.tensor(z, dtype=torch.float32)[None, None])
    return patches_from_map(maps[0].numpy(), GRID)


def network_channels(model: str, outputs: tuple[int, ...]) -> int:
    """Channels of a residual network's outputs together; an upper estimate for other networks."""
    shallow = model.startswith(("resnet18", "resnet34", "resnet10", "resnet14"))
    widths = (64, 64, 128, 256, 512) if shallow else (64, 256, 512, 1024, 2048)
    return sum(widths[min(i, len(widths) - 1)] for i in outputs)


def _feature_name(part: str) -> str:
    return "z" if part in _FROM_Z else part


DEFINITION = MethodDefinition(
    name="btf",
    title="BTF (Back to the Feature)",
    version=1,
    config=BTFConfig,
    build=BTF,
    variants={
        "rgb": "ImageNet features of the image",
        "depth": "ImageNet features of the depth image",
        "raw": "depth values",
        "hog": "histograms of oriented gradients of the depth image",
        "sift": "dense SIFT of the depth image",
        "fpfh": "FPFH of the point cloud",
        "rgb+fpfh": "ImageNet features of the image with FPFH (the published method)",
    },
    default_variant="rgb+fpfh",
    modalities={
        "rgb": "RGB",
        "depth": "3D",
        "raw": "3D",
        "hog": "3D",
        "sift": "3D",
        "fpfh": "3D",
        "rgb+fpfh": "RGB+3D",
    },
    protocol="m3dm",
    other_protocols=("none",),
    recipes={
        "official": {},
        "corrected": {
            "coreset_dtype": "float32",
            "blur": "float",
            "xyz_resize": "center",
            "raw_patches": "blocks",
            "rgb_norm": "model",
            "score_form": "stable",
        },
    },
    source="arXiv 2203.05550",
    libraries=("numpy", "scipy", "torch", "faiss", "pillow", "scikit-image", "kornia"),
    notes=(
        "The published runner lets seven methods draw from one random stream in turn; here each has its own, "
        "so coresets of projected variants other than rgb differ from the published ones.",
        "FPFH bins are of order 100, network activations of order 1; they are not scaled to each other.",
    ),
)

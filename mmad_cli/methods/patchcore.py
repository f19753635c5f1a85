"""PatchCore (Roth et al., arXiv 2106.08265): locally aware patch features in one memory bank.

Image only; for RGB + 3D datasets the image is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from pydantic import Field

from mmad_cli.alignment.pooling import adaptive_bins
from mmad_cli.methods.anomaly_map import bilinear_matrix, blur_float, blur_pillow8, upsample
from mmad_cli.methods.base import MethodConfig, MethodDefinition, Prediction, SampleFeatures, View
from mmad_cli.methods.btf import Outputs
from mmad_cli.methods.single_bank import SingleBankMethod, coreset_bytes, read_array
from mmad_cli.types import FloatArray

if TYPE_CHECKING:
    from mmad_cli.backbones.specs import FeatureSpec
    from mmad_cli.memory import BankConfig

PATCH_SIZE = 3


class PatchCoreConfig(MethodConfig):
    """Switches of PatchCore; the defaults are the published WRN-50, 224 px, 10 % run."""

    variant: Literal["rgb"] = "rgb"
    rgb_backbone: str = "wide_resnet50_2.tv_in1k"
    rgb_outputs: Outputs = (2, 3)
    rgb_norm: Literal["imagenet", "model"] = "imagenet"
    # `crop`: shorter side to 256, centre 224, so the border of a scan is never seen; `resize`: the whole scan
    view: View = "crop"
    # channels of one layer, and of the layers together, after pooling
    pretrain_dim: int = Field(default=1024, ge=1)
    target_dim: int = Field(default=1024, ge=1)
    # `greedy` starts at the first row, `approximate` at the row farthest from `n_starts` random ones on
    # average
    coreset: Literal["approximate", "greedy", "random", "identity"] = "approximate"
    coreset_fraction: float = Field(default=0.1, gt=0, le=1)
    projection_dim: int = Field(default=128, ge=1)
    n_starts: int = Field(default=10, ge=1)
    neighbours: int = Field(default=1, ge=1)
    # the search library returns squared distances and the published code keeps them so; the paper's are plain
    distance: Literal["squared", "plain"] = "squared"
    # `reweighted`: equation 7 of the paper, which the published code leaves out
    scoring: Literal["max", "reweighted"] = "max"
    reweight_neighbours: int = Field(default=3, ge=2)
    blur: Literal["float", "pillow8"] = "float"
    blur_sigma: float = Field(default=4.0, gt=0)


class PatchCore(SingleBankMethod):
    """PatchCore."""

    def __init__(self, config: PatchCoreConfig, device: str = "cpu") -> None:
        super().__init__(device)
        self.config = config

    @property
    def view(self) -> View:
        """The centre crop, or the whole scan."""
        return self.config.view

    def features(self) -> dict[str, FeatureSpec]:
        """Outputs of the network under `rgb`."""
        from mmad_cli.backbones.specs import FeatureSpec

        config = self.config
        spec = FeatureSpec.timm(
            config.rgb_backbone, view=config.view, outputs=list(config.rgb_outputs), norm=config.rgb_norm
        )
        return {"rgb": spec}

    def patches(self, sample: SampleFeatures) -> FloatArray:
        """Patch rows (P, target_dim) on the grid of the first output."""
        maps = [read_array(sample, "rgb", f"out{i}") for i in self.config.rgb_outputs]
        return locally_aware_patches(maps, self.config.pretrain_dim, self.config.target_dim)

    def bank_config(self) -> BankConfig:
        """Selection on densely projected rows."""
        from mmad_cli.memory import BankConfig

        config = self.config
        return BankConfig(
            fraction=config.coreset_fraction,
            coreset="all" if config.coreset == "identity" else config.coreset,
            coreset_dtype="float32",
            projection="dense",
            dense_dimension=config.projection_dim,
            n_starts=config.n_starts,
        )

    def score(self, patches: FloatArray) -> Prediction:
        """Mean distance to the nearest rows per patch; image score is the largest patch score."""
        config = self.config
        distances, indices = self.bank_.nearest(patches, min(config.neighbours, len(self.bank_.rows_)))
        powered = distances**2 if config.distance == "squared" else distances
        patch_scores = powered.mean(axis=1)
        image_score = float(patch_scores.max())
        if config.scoring == "reweighted":
            worst = int(distances[:, 0].argmax())
            image_score *= self._weight(patches[worst], indices[worst, 0])
        grid = round(len(patches) ** 0.5)
        patch_map = upsample(patch_scores, grid)
        blurred = blur_pillow8(patch_map) if config.blur == "pillow8" else blur_float(patch_map, config.blur_sigma)
        return Prediction(blurred, image_score)

    def memory_estimate(self, n_train: int) -> int:
        """Peak bytes of `fit`: the projected rows and the bank."""
        config = self.config
        rows = (224 // 2 ** (config.rgb_outputs[0] + 1)) ** 2 * max(n_train, 1)
        projected = config.projection_dim if config.coreset in ("approximate", "greedy") else 0
        return coreset_bytes(rows, config.target_dim, projected, self.bank_config().rows_to_keep(rows))

    def _weight(self, patch: FloatArray, nearest: int) -> float:
        rows = self.bank_.rows_
        count = min(self.config.reweight_neighbours, len(rows))
        _, neighbours = self.bank_.nearest(rows[nearest][None], count)
        distances = np.linalg.norm(rows[neighbours[0]] - patch, axis=1)
        return reweighting(float(np.linalg.norm(rows[nearest] - patch)), distances)


def reweighting(distance: float, neighbour_distances: FloatArray) -> float:
    """Weight of the image score: 1 - exp(s*) / (sum of exp(d)), equation 7 of arXiv 2106.08265.

    distance: s*, of the most anomalous patch to its nearest row m*; neighbour_distances (b,): of that patch
    to the b rows around m*, m* included. In [0, 1); differences only are exponentiated, so nothing overflows.
    """
    exponents = np.asarray(neighbour_distances, dtype=np.float64) - distance
    largest = max(float(exponents.max()), 0.0)
    return float(1.0 - np.exp(-largest) / np.exp(exponents - largest).sum())


def unfold(feature_map: NDArray[np.floating], size: int = PATCH_SIZE) -> FloatArray:
    """Neighbourhood of every cell, stride 1, zero padding: (C, h, w) to float32 (C * size * size, h * w).

    Order of the first axis: channel, row offset, column offset. `size` must be odd.
    """
    if size % 2 == 0:
        raise ValueError(f"size must be odd, got {size}")
    channels, height, width = feature_map.shape
    border = size // 2
    padded = np.pad(np.asarray(feature_map, dtype=np.float32), ((0, 0), (border, border), (border, border)))
    windows = sliding_window_view(padded, (size, size), axis=(1, 2))
    return np.ascontiguousarray(windows.transpose(0, 3, 4, 1, 2)).reshape(channels * size * size, height * width)


def locally_aware_patches(
    maps: Sequence[NDArray[np.floating]], pretrain_dim: int = 1024, target_dim: int = 1024
) -> FloatArray:
    """Patch rows of PatchCore (arXiv 2106.08265, section 3.1) from the outputs of a network.

    maps: one (C_i, h_i, w_i) per output. Each layer: 3 x 3 neighbourhoods, brought to the first map's grid
    bilinearly, pooled over (channel, offset) to `pretrain_dim`; then the layers one after the other, pooled
    to `target_dim`. Returns float32 (h_0 * w_0, target_dim). Raises ValueError without maps.

    Both poolings act on channels and the interpolation on positions, so each layer is pooled once, to its
    share of the result, and interpolated last.
    """
    if not maps:
        raise ValueError("maps must hold at least one feature map, got none")
    _, height, width = maps[0].shape
    patches = np.zeros((height * width, target_dim), dtype=np.float32)
    for layer, one in enumerate(maps):
        first, pooling = _layer_pooling(one.shape[0] * PATCH_SIZE**2, layer, len(maps), pretrain_dim, target_dim)
        pooled = np.ascontiguousarray((pooling @ unfold(one)).T)
        interpolation = _interpolation(one.shape[1], one.shape[2], height, width)
        patches[:, first : first + pooling.shape[0]] += interpolation @ pooled
    return patches


@lru_cache(maxsize=32)
def _layer_pooling(size: int, layer: int, layers: int, pretrain_dim: int, target_dim: int) -> tuple[int, Any]:
    """The two poolings of one layer as one sparse matrix (n, size), and the first of the n channels it yields."""
    within = _channel_pooling(size, pretrain_dim)
    across = _channel_pooling(layers * pretrain_dim, target_dim)
    both = (across[:, layer * pretrain_dim : (layer + 1) * pretrain_dim] @ within).tocsr()
    used = np.flatnonzero(np.diff(both.indptr))
    first, last = int(used[0]), int(used[-1])
    return first, both[first : last + 1].astype(np.float32)


def _channel_pooling(size: int, out: int) -> Any:
    """Adaptive average pooling as a sparse CSR matrix (out, size)."""
    from scipy.sparse import csr_matrix

    bins = adaptive_bins(size, out)
    columns = np.concatenate([np.arange(begin, end) for begin, end in bins])
    lengths = np.array([end - begin for begin, end in bins])
    values = np.repeat(1.0 / lengths, lengths)
    return csr_matrix((values, columns, np.concatenate([[0], np.cumsum(lengths)])), shape=(out, size))


@lru_cache(maxsize=32)
def _interpolation(from_height: int, from_width: int, height: int, width: int) -> Any:
    """Bilinear interpolation of flattened images as a sparse matrix (height * width, from_height * from_width)."""
    from scipy.sparse import csr_matrix, identity, kron

    if (from_height, from_width) == (height, width):
        return identity(height * width, dtype=np.float32, format="csr")
    rows = csr_matrix(bilinear_matrix(from_height, height))
    columns = csr_matrix(bilinear_matrix(from_width, width))
    return kron(rows, columns, format="csr")


DEFINITION = MethodDefinition(
    name="patchcore",
    title="PatchCore",
    version=1,
    config=PatchCoreConfig,
    build=PatchCore,
    variants={"rgb": "ImageNet features of the image"},
    default_variant="rgb",
    modalities={"rgb": "RGB"},
    protocol="none",
    recipes={"official": {}, "corrected": {"view": "resize"}},
    source="arXiv 2106.08265",
    libraries=("numpy", "scipy", "torch", "faiss"),
    notes=("The official recipe sees the centre crop of a scan only; its maps cover that crop.",),
)

"""Features of every pixel, assembled from cached tokens when they are needed and never kept.

Both streams are linear in their tokens: RGB by bilinear interpolation, points by the sparse operator of the alignment
(interpolation to points, 3 x 3 mean, adaptive mean). A sample at 224 x 224 takes 385 MB as float32, its tokens 7 MB.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mmad_cli.alignment.interpolation import pooled_operator
from mmad_cli.errors import DataError
from mmad_cli.methods.anomaly_map import bilinear_matrix
from mmad_cli.methods.base import FeatureSet, SampleFeatures
from mmad_cli.methods.mapping.config import POINTS, RGB
from mmad_cli.methods.single_bank import read_array

if TYPE_CHECKING:
    from mmad_cli.types import FloatArray

_CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class DenseFeatures:
    """Per-pixel features of one sample in raster order of a `side` x `side` grid.

    rgb (P, C2) and points (P, C3) float32, P = side * side; a stream that was not asked for is None. valid bool (P,)
    where there are point features, or everywhere without points.
    """

    rgb: Tensor | None
    points: Tensor | None
    valid: Tensor
    side: int

    def both(self) -> tuple[Tensor, Tensor]:
        """RGB and point features. Raises ValueError when one was not asked for."""
        if self.rgb is None or self.points is None:
            raise ValueError("features: both RGB and point features are needed here")
        return self.rgb, self.points


@dataclass(frozen=True)
class DenseReader:
    """How features of a sample are laid out: streams, grid, and what counts as valid.

    `cloud_size` is the side of the image grid that the points were taken from. `channel_sum`: a pixel is valid where
    its point channels do not sum to zero, as published; otherwise where any channel is not zero.
    """

    side: int = 224
    cloud_size: int = 224
    streams: tuple[str, ...] = (RGB, POINTS)
    channel_sum: bool = True
    device: str = "cpu"

    def __call__(self, sample: SampleFeatures) -> DenseFeatures:
        """Dense features of a sample. Raises DataError naming it when a feature is missing or empty."""
        return self.assemble(self.tokens(sample))

    def tokens(self, sample: SampleFeatures) -> Tokens:
        """What the dense features are made from."""
        rgb = grid = points = operator = None
        if RGB in self.streams:
            rgb, grid = _rgb_tokens(sample)
        if POINTS in self.streams:
            points, operator = _point_tokens(sample, self.cloud_size, self.side)
        return Tokens(rgb, grid, points, operator)

    def assemble(self, tokens: Tokens) -> DenseFeatures:
        """Every pixel's features."""
        rgb = points = None
        valid = torch.ones(self.side * self.side, dtype=torch.bool, device=self.device)
        if tokens.rgb is not None and tokens.grid is not None:
            rgb = upsampled(torch.from_numpy(tokens.rgb).to(self.device), tokens.grid, self.side)
        if tokens.points is not None:
            points = _product(tokens.operator, tokens.points, self.device)
            valid = points.sum(dim=1) != 0 if self.channel_sum else (points != 0).any(dim=1)
        return DenseFeatures(rgb, points, valid, self.side)

    def valid_pixels(self, tokens: Tokens) -> ValidPixels:
        """Features of the valid pixels only; both streams must be read."""
        if tokens.points is None or tokens.rgb is None or tokens.grid is None:
            raise ValueError("tokens: both RGB and point tokens are needed here")
        # rows without entries are pixels that no point reaches: their features are zero
        reached = np.flatnonzero(np.diff(tokens.operator.indptr))
        points = _product(tokens.operator[reached], tokens.points, self.device)
        valid = points.sum(dim=1) != 0 if self.channel_sum else (points != 0).any(dim=1)
        index = reached[valid.cpu().numpy()]
        return ValidPixels(
            torch.from_numpy(index).to(self.device),
            points[valid],
            tokens,
            (_bilinear_operator(tokens.grid, self.side)[index], tokens.operator[index]),
            self.device,
        )


@dataclass(frozen=True)
class ValidPixels:
    """Features of the n valid pixels of a sample, at flat indices `index` of the grid.

    Both streams are linear in their tokens, so a linear map of all pixels' features costs a map of the tokens.
    """

    index: Tensor
    points: Tensor
    tokens: Tokens
    operators: tuple[Any, Any]
    device: str

    @property
    def rgb(self) -> Tensor:
        """RGB features (n, C2)."""
        return self._carried(0, self.tokens.rgb)

    def rgb_mapped(self, weight: Tensor) -> Tensor:
        """RGB features times `weight` (out, C2) transposed: (n, out)."""
        return self._carried(0, self._mapped(self.tokens.rgb, weight))

    def points_mapped(self, weight: Tensor) -> Tensor:
        """Point features times `weight` (out, C3) transposed: (n, out)."""
        return self._carried(1, self._mapped(self.tokens.points, weight))

    def _mapped(self, tokens: FloatArray | None, weight: Tensor) -> FloatArray:
        return np.asarray((torch.from_numpy(tokens).to(self.device) @ weight.T).cpu().numpy())

    def _carried(self, which: int, tokens: FloatArray | None) -> Tensor:
        return _product(self.operators[which], tokens, self.device)


@dataclass(frozen=True)
class Tokens:
    """Tokens of a sample and the sparse operator (P, groups) that carries point tokens to pixels."""

    rgb: FloatArray | None
    grid: int | None
    points: FloatArray | None
    operator: Any

    @property
    def channels(self) -> dict[str, int]:
        """Channels of each stream that was read."""
        streams = {RGB: self.rgb, POINTS: self.points}
        return {name: int(array.shape[1]) for name, array in streams.items() if array is not None}

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        arrays = [array.nbytes for array in (self.rgb, self.points) if array is not None]
        if self.operator is not None:
            arrays += [self.operator.data.nbytes, self.operator.indices.nbytes, self.operator.indptr.nbytes]
        return sum(arrays)


class DenseSet:
    """Dense features of several samples by index; tokens of as many as fit a limit are kept between epochs."""

    def __init__(self, samples: FeatureSet, reader: DenseReader, cache_bytes: int = _CACHE_BYTES) -> None:
        self.samples, self.reader, self.cache_bytes = samples, reader, cache_bytes
        self._kept: OrderedDict[int, Tokens] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> DenseFeatures:
        tokens = self._kept.get(index)
        if tokens is None:
            tokens = self.reader.tokens(self.samples[index])
            # what is kept stays: an epoch reads every sample once, so dropping the oldest would never find any
            if self._bytes + tokens.nbytes <= self.cache_bytes:
                self._kept[index] = tokens
                self._bytes += tokens.nbytes
        return self.reader.assemble(tokens)

    def batch(self, indices: Sequence[int]) -> list[DenseFeatures]:
        """Dense features of several samples."""
        return [self[index] for index in indices]


def upsampled(tokens: Tensor, grid: int, side: int) -> Tensor:
    """Tokens (grid * grid, C) brought to (side * side, C), bilinear with half-pixel centres, border repeated."""
    matrix = torch.from_numpy(np.array(bilinear_matrix(grid, side))).to(tokens.device)
    channels = tokens.shape[1]
    rows = (matrix @ tokens.reshape(grid, grid * channels)).reshape(side, grid, channels)
    return torch.matmul(matrix, rows).reshape(side * side, channels)


@lru_cache(maxsize=8)
def _bilinear_operator(grid: int, side: int) -> Any:
    """`upsampled` as a SciPy CSR matrix (side * side, grid * grid): four entries a row at most."""
    from scipy.sparse import csr_matrix, kron

    axis = csr_matrix(bilinear_matrix(grid, side))
    return kron(axis, axis, format="csr").astype(np.float32)


def pixel_image(values: Tensor, pixel: Tensor, side: int) -> FloatArray:
    """Values (n,) at flat pixels (n,) of an image float32 (side, side) that is zero elsewhere, on the host."""
    image = torch.zeros(side * side, device=values.device)
    image[pixel] = values
    return np.asarray(image.reshape(side, side).cpu().numpy())


def _product(operator: Any, tokens: FloatArray | None, device: str) -> Tensor:
    if tokens is None:
        raise ValueError("tokens: this stream was not read")
    if device == "cpu":
        return torch.from_numpy(np.asarray(operator @ tokens, dtype=np.float32))
    parts = (operator.indptr.astype(np.int64), operator.indices.astype(np.int64), operator.data)
    rows, columns, values = (torch.from_numpy(part).to(device) for part in parts)
    with warnings.catch_warnings():
        # each process would tell once that these are young in PyTorch
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support", category=UserWarning)
        sparse = torch.sparse_csr_tensor(rows, columns, values, size=operator.shape, check_invariants=False)
    return sparse @ torch.from_numpy(tokens).to(device)


def _rgb_tokens(sample: SampleFeatures) -> tuple[FloatArray, int]:
    # a copy: stored arrays are read-only, which PyTorch cannot take
    tokens = np.array(read_array(sample, RGB, "tokens"), dtype=np.float32)
    height, width = (int(side) for side in read_array(sample, RGB, "grid"))
    if height != width or height * width != len(tokens):
        raise DataError(
            f"{sample.id}: {len(tokens)} RGB tokens on a grid of {height} x {width}; this method needs a square grid "
            "with one token per cell"
        )
    return tokens, height


def _point_tokens(sample: SampleFeatures, size: int, side: int) -> tuple[FloatArray, Any]:
    tokens = np.array(read_array(sample, POINTS, "tokens"), dtype=np.float32)
    pixel, neighbours, weights = (read_array(sample, POINTS, name) for name in ("pixel", "neighbours", "weights"))
    if len(pixel) == 0:
        raise DataError(f"{sample.id}: no valid 3D points, so there are no point features; check its xyz file")
    operator = pooled_operator(neighbours, weights, pixel, len(tokens), grid=side, size=size)
    return tokens, operator.tocsr()

"""What the networks of CMDR-IAD read of one scan at test time, from features of all pixels or from tokens.

Features are linear in tokens, so a network's first layer can be applied to the tokens, of which there are few, and
carried to the pixels afterwards; features of pixels that are not valid are then never made.
"""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mmad_cli.methods.mapping.config import RGB
from mmad_cli.methods.mapping.dense import DenseReader, Tokens, upsampled


class Scan(Protocol):
    """Features of the n valid pixels among N, in raster order; streams are `rgb` and `points`."""

    @property
    def valid(self) -> Tensor:
        """Bool (N,)."""

    def observed(self, stream: str) -> Tensor:
        """Features (n, C) of the valid pixels."""

    def first(self, stream: str, layer: nn.Linear) -> Tensor:
        """Output (n, out) of a linear layer at the valid pixels."""

    def first_of_image(self, layer: nn.Linear, begin: int, end: int) -> Tensor:
        """Output (end - begin, out) of a linear layer on the RGB features of a range of all pixels."""

    def filled(self) -> tuple[Tensor, Tensor]:
        """Flat indices (m,) of all pixels with a point feature, in ascending order or not, and the features (m, C)."""


class DenseScan:
    """Given features of all pixels: rgb (N, C_rgb), points (N, C_pt), either may be None; valid bool (N,)."""

    def __init__(self, rgb: Tensor | None, points: Tensor | None, valid: Tensor) -> None:
        self.rgb, self.points, self.valid = rgb, points, valid

    def observed(self, stream: str) -> Tensor:
        """Features (n, C) of the valid pixels. Raises ValueError for a stream that is not there."""
        return self._stream(stream)[self.valid]

    def first(self, stream: str, layer: nn.Linear) -> Tensor:
        """Output (n, out) of a linear layer at the valid pixels."""
        out: Tensor = layer(self.observed(stream))
        return out

    def first_of_image(self, layer: nn.Linear, begin: int, end: int) -> Tensor:
        """Output of a linear layer on the RGB features of a range of all pixels."""
        out: Tensor = layer(self._stream(RGB)[begin:end])
        return out

    def filled(self) -> tuple[Tensor, Tensor]:
        """Pixels with a point feature, and their features."""
        points = self._stream("points")
        index = torch.nonzero((points != 0).any(dim=1)).squeeze(1)
        return index, points[index]

    def _stream(self, stream: str) -> Tensor:
        features = self.rgb if stream == RGB else self.points
        if features is None:
            raise ValueError(f"{stream}: needed by one of the networks, got None")
        return features


class TokenScan:
    """Made from the tokens of both streams of a sample."""

    def __init__(self, reader: DenseReader, tokens: Tokens) -> None:
        self.reader, self.tokens = reader, tokens
        self._pixels = reader.valid_pixels(tokens)

    @cached_property
    def valid(self) -> Tensor:
        """Bool (N,)."""
        valid = torch.zeros(self.reader.side**2, dtype=torch.bool, device=self._pixels.index.device)
        valid[self._pixels.index] = True
        return valid

    def observed(self, stream: str) -> Tensor:
        """Features (n, C) of the valid pixels."""
        return self._rgb if stream == RGB else self._pixels.points

    @cached_property
    def _rgb(self) -> Tensor:
        return self._pixels.rgb

    def first(self, stream: str, layer: nn.Linear) -> Tensor:
        """Output (n, out) of a linear layer at the valid pixels."""
        mapped = self._pixels.rgb_mapped if stream == RGB else self._pixels.points_mapped
        return mapped(layer.weight) + layer.bias

    def first_of_image(self, layer: nn.Linear, begin: int, end: int) -> Tensor:
        """Output of a linear layer on the RGB features of a range of all pixels."""
        if self._of_image is None or self._of_image[0] is not layer:
            tokens = torch.from_numpy(self.tokens.rgb).to(self.valid.device)
            # interpolation weights add up to 1, so the bias may come first
            mapped = functional.linear(tokens, layer.weight, layer.bias)
            self._of_image = (layer, upsampled(mapped, self.tokens.grid or 0, self.reader.side))
        return self._of_image[1][begin:end]

    _of_image: tuple[nn.Linear, Tensor] | None = None

    def filled(self) -> tuple[Tensor, Tensor]:
        """Pixels with a point feature, and their features: the valid ones, and those whose channels sum to zero."""
        reached = np.flatnonzero(np.diff(self.tokens.operator.indptr))
        others = np.setdiff1d(reached, self._pixels.index.cpu().numpy(), assume_unique=True)
        rows = np.asarray(self.tokens.operator[others] @ self.tokens.points, dtype=np.float32)
        device = self._pixels.index.device
        index = torch.cat([self._pixels.index, torch.from_numpy(others).to(device)])
        return index, torch.cat([self._pixels.points, torch.from_numpy(rows).to(device)])

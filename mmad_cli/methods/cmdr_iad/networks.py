"""The four networks of CMDR-IAD: two mappers between the modalities and one reconstruction decoder for each.

Parameters bear the names and layouts of the published networks, so a published state dictionary fits as it is.
Layers are evaluated in the order that is fastest on a CPU: features stay (positions, channels) throughout, and
transposed convolutions become plain convolutions or matrix products, with equal results.
Source: CMDR-IAD (arXiv 2603.03939), figures, and its published code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmad_cli.errors import WeightsError
from mmad_cli.methods.cmdr_iad.config import PUBLISHED_NAMES, SHORTENING, NetworkName

RGB_CHANNELS = 768
POINT_CHANNELS = 1152
SIDE = 224
DROPOUT = 0.1

# consecutive tokens that attend to each other
WINDOW = 128
HEADS = 8
# channels inside the RGB decoder
RGB_WIDTH = 384

_MAPPER_WIDTH = 960
_HEAD_WIDTH = 1536
_POINT_WIDTHS = (768, 512, 256, 128)
_GATE_REDUCTION = 8


class Mapper(nn.Module):
    """Predicts the features of one modality from those of the other, pixel by pixel.

    Four linear layers with 960 channels between, GELU, and two layer norms: 3 694 272 parameters from RGB to points,
    3 693 888 the other way at the published widths.
    """

    def __init__(self, channels_in: int, channels_out: int, dropout: float = DROPOUT) -> None:
        super().__init__()
        self.input = nn.Linear(channels_in, _MAPPER_WIDTH)
        self.projection = nn.Sequential(
            nn.Linear(_MAPPER_WIDTH, _MAPPER_WIDTH),
            nn.GELU(),
            nn.LayerNorm(_MAPPER_WIDTH),
            nn.Dropout(dropout),
            nn.Linear(_MAPPER_WIDTH, _MAPPER_WIDTH),
            nn.GELU(),
            nn.LayerNorm(_MAPPER_WIDTH),
        )
        self.output = nn.Linear(_MAPPER_WIDTH, channels_out)

    def forward(self, features: Tensor) -> Tensor:
        """Predicted features (..., channels_out) of features (..., channels_in)."""
        return self.after_first(self.input(features))

    def after_first(self, hidden: Tensor) -> Tensor:
        """Predicted features from what the first linear layer gave."""
        out: Tensor = self.output(self.projection(functional.gelu(hidden)))
        return out


class WindowAttention(nn.Module):
    """Multi-head attention inside windows of consecutive tokens.

    Tokens are taken in raster order, 128 to a window, so windows follow neither rows nor columns of the image; a last
    window that is not full is filled up with tokens of zeros, as published.
    """

    def __init__(self, channels: int, dropout: float = DROPOUT) -> None:
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.dropout = dropout

    def forward(self, tokens: Tensor) -> Tensor:
        """Attended tokens (B, N, C) of tokens (B, N, C)."""
        batch, count, channels = tokens.shape
        qkv = self.qkv(tokens)
        missing = -count % WINDOW
        if missing:
            qkv = functional.pad(qkv, (0, 0, 0, missing))
        windows = (count + missing) // WINDOW
        qkv = qkv.view(batch * windows, WINDOW, 3, HEADS, channels // HEADS).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(
            qkv[0], qkv[1], qkv[2], dropout_p=self.dropout if self.training else 0.0
        )
        attended = attended.transpose(1, 2).reshape(batch, count + missing, channels)[:, :count]
        out: Tensor = self.proj(attended)
        return functional.dropout(out, self.dropout, self.training)


class AttentionBlock(nn.Module):
    """Window attention and a two-layer perceptron, each after a layer norm and with a residual connection."""

    def __init__(self, channels: int, dropout: float = DROPOUT) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, dropout)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, 2 * channels),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(2 * channels, channels),
            nn.Dropout(dropout),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, C) of tokens (B, N, C)."""
        tokens = tokens + self.attn(self.norm1(tokens))
        out: Tensor = tokens + self.mlp(self.norm2(tokens))
        return out


class _SameConvolution(nn.ConvTranspose2d):
    """Transposed 3 x 3 convolution with stride 1: a plain one with mirrored kernels."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, kernel_size=3, padding=1)

    def forward(self, maps: Tensor, output_size: list[int] | None = None) -> Tensor:
        kernels = self.weight.flip(2, 3).transpose(0, 1)
        return functional.conv2d(maps, kernels.contiguous(memory_format=torch.channels_last), self.bias, padding=1)


class RGBDecoder(nn.Module):
    """Reconstructs the RGB features of the whole image: 5 026 176 parameters at the published width.

    A projection to 384 channels per pixel, one window attention block, three 3 x 3 convolutions, a head per pixel.
    """

    def __init__(self, channels: int = RGB_CHANNELS, dropout: float = DROPOUT) -> None:
        super().__init__()
        self.projection = nn.Sequential(
            nn.Linear(channels, RGB_WIDTH),
            nn.GELU(),
            nn.LayerNorm(RGB_WIDTH),
            nn.Dropout(dropout),
            nn.Linear(RGB_WIDTH, RGB_WIDTH),
            nn.GELU(),
            nn.LayerNorm(RGB_WIDTH),
        )
        self.attn = AttentionBlock(RGB_WIDTH, dropout)
        self.conv_decoder = nn.Sequential(
            _SameConvolution(RGB_WIDTH, 256),
            nn.BatchNorm2d(256),
            nn.GELU(),
            _SameConvolution(256, 128),
            nn.BatchNorm2d(128),
            nn.GELU(),
            _SameConvolution(128, RGB_WIDTH),
            nn.BatchNorm2d(RGB_WIDTH),
            nn.GELU(),
        )
        self.reconstruct = nn.Sequential(
            nn.Linear(RGB_WIDTH, _HEAD_WIDTH),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(_HEAD_WIDTH, channels),
            nn.LayerNorm(channels),
        )

    def forward(self, features: Tensor, kept: Tensor | None = None) -> Tensor:
        """Reconstructed features (B, N, C) of features (B, N, C), N the pixels of a square image in raster order.

        kept: bool (B, N); only the rows of these pixels come back then, (number of kept pixels, C), and the head sees
        no others. Raises ValueError when N is not a square.
        """
        batch, count, _ = features.shape
        side = square_side(count)
        tokens = self.attn(self.projection(features))
        # (B, N, C) read as (B, C, H, W) is the channels-last layout already
        maps = self.conv_decoder(tokens.view(batch, side, side, RGB_WIDTH).permute(0, 3, 1, 2))
        rows = maps.permute(0, 2, 3, 1).reshape(batch, count, RGB_WIDTH)
        out: Tensor = self.reconstruct(rows if kept is None else rows[kept])
        return out


class _DoublingConvolution(nn.ConvTranspose1d):
    """Transposed convolution with kernel 4, stride 2 and padding 1, on (B, L, C) instead of (B, C, L).

    Position 2 i of the result takes kernel entries 1 and 3 at positions i and i - 1 of the input, position 2 i + 1
    takes entries 2 and 0 at i and i + 1; that makes two matrix products.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, kernel_size=4, stride=2, padding=1)

    def forward(self, rows: Tensor, output_size: list[int] | None = None) -> Tensor:
        batch, length, _ = rows.shape
        around = functional.pad(rows, (0, 0, 1, 1))
        before = torch.cat([around[:, :-2], rows], dim=2)
        after = torch.cat([rows, around[:, 2:]], dim=2)
        taps = self.weight.unbind(2)
        even = functional.linear(before, torch.cat([taps[3], taps[1]]).T, self.bias)
        odd = functional.linear(after, torch.cat([taps[2], taps[0]]).T, self.bias)
        return torch.stack([even, odd], dim=2).view(batch, 2 * length, self.out_channels)


class _RowNorm(nn.BatchNorm1d):
    """Batch normalisation of channels, on (B, L, C) instead of (B, C, L)."""

    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows.reshape(-1, rows.shape[-1])).view(rows.shape)


class PointDecoder(nn.Module):
    """Reconstructs point features, channels over the pixels as one sequence of N positions.

    The first linear layers act along the positions, so the network is tied to N and to raster order. 87 840 208
    parameters at the published width with N = 224 x 224, 9 435 088 with N = 96 x 96. Values lie in (-1, 1).
    """

    def __init__(self, positions: int, channels: int = POINT_CHANNELS, dropout: float = DROPOUT) -> None:
        super().__init__()
        if positions < SHORTENING or positions % SHORTENING:
            raise ValueError(f"positions: must be a positive multiple of {SHORTENING}, got {positions}")
        short, gate = positions // SHORTENING, max(channels // _GATE_REDUCTION, 1)
        self.projection = nn.Sequential(
            nn.Linear(positions, short),
            nn.GELU(),
            nn.LayerNorm(short),
            nn.Dropout(dropout),
            nn.Linear(short, short),
            nn.GELU(),
            nn.LayerNorm(short),
        )
        layers: list[nn.Module] = []
        for before, after in zip((channels, *_POINT_WIDTHS), _POINT_WIDTHS, strict=False):
            layers += [_DoublingConvolution(before, after), _RowNorm(after), nn.GELU()]
        self.decoder = nn.Sequential(*layers, _DoublingConvolution(_POINT_WIDTHS[-1], channels), nn.Tanh())
        self.attention = nn.Sequential(
            nn.AdaptiveAvgPool1d(1),
            nn.Conv1d(channels, gate, 1),
            nn.ReLU(),
            nn.Conv1d(gate, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Reconstructed features (B, N, C) of features (B, N, C)."""
        rows = self.decoder(self.projection(features.transpose(1, 2)).transpose(1, 2))
        out: Tensor = rows * self.attention(rows.mean(dim=1, keepdim=True).transpose(1, 2)).transpose(1, 2)
        return out


def square_side(count: int) -> int:
    """Side of a square image with `count` pixels. Raises ValueError when there is none."""
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(f"features: must hold the pixels of a square image, got {count} of them")
    return side


def new_networks(
    rgb_channels: int = RGB_CHANNELS,
    point_channels: int = POINT_CHANNELS,
    side: int = SIDE,
    dropout: float = DROPOUT,
    names: tuple[NetworkName, ...] = tuple(PUBLISHED_NAMES),
) -> dict[NetworkName, nn.Module]:
    """Freshly initialised networks by name (PyTorch's defaults), drawn from PyTorch's current random stream."""
    return {name: _new_network(name, rgb_channels, point_channels, side, dropout) for name in names}


def _new_network(name: NetworkName, rgb_channels: int, point_channels: int, side: int, dropout: float) -> nn.Module:
    match name:
        case "rgb_to_points":
            return Mapper(rgb_channels, point_channels, dropout)
        case "points_to_rgb":
            return Mapper(point_channels, rgb_channels, dropout)
        case "rgb_decoder":
            return RGBDecoder(rgb_channels, dropout)
        case "point_decoder":
            return PointDecoder(side * side, point_channels, dropout)


def load_tensors(network: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Put tensors under the published names into a network, in place.

    Raises WeightsError that names `where` and the keys when a tensor is missing, unknown or of a wrong shape.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != given:
        wrong = sorted(name for name in {*expected, *given} if expected.get(name) != given.get(name))
        kind = type(network).__name__
        raise WeightsError(f"{where}: not the tensors of a {kind}; missing, unknown or misshapen: {wrong}")
    network.load_state_dict(dict(tensors))

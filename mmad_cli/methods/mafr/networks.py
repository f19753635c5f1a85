"""Networks of MAFR: one encoder that fuses both modalities, and a decoder per modality that restores its features.

All of them act on single pixels. The published attention modules run on maps of one pixel, where pooling is the
identity and a padded convolution has its two centre taps only, so here they are written in that closed form. Every
published tensor is kept, so that checkpoints go both ways.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmad_cli.errors import WeightsError
from mmad_cli.methods.mafr.config import DROPOUT, POINT_CHANNELS, RGB_CHANNELS

ATTENTION_REDUCTION = 16
ATTENTION_KERNEL = 7

# published network -> the part of `RestorationNetwork` that it is
PUBLISHED_NETWORKS = {"fusion_encoder": "encoder", "decoder_2D": "rgb_decoder", "decoder_3D": "point_decoder"}


class FusionEncoder(nn.Module):
    """Three linear layers from both features of a pixel to one vector; a single LayerNorm serves twice.

    The order is linear, GELU, LayerNorm, dropout. Parameter names are those of the published code.
    Source: MAFR (arXiv 2510.21793), fusion encoder, as its code computes it.
    """

    def __init__(self, rgb_channels: int, point_channels: int, dropout: float) -> None:
        super().__init__()
        self.rgb_channels = rgb_channels
        width = hidden_channels(rgb_channels, point_channels)
        self.input_fc = nn.Linear(rgb_channels + point_channels, width)
        self.layers = nn.ModuleList([nn.Linear(width, width)])
        self.output_fc = nn.Linear(width, width)
        self.layer_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def input_weights(self) -> tuple[Tensor, Tensor]:
        """Weights of the first layer for RGB (width, C_rgb) and for point features (width, C_pt)."""
        for_rgb, for_points = self.input_fc.weight.tensor_split([self.rgb_channels], dim=1)
        return for_rgb, for_points

    def mixed(self, rgb: Tensor, points: Tensor) -> Tensor:
        """First layer before its activation, (..., width); what `input_fc` gives for [rgb, points] side by side.

        The weight is split instead of the features joined, which saves a copy of both.
        """
        for_rgb, for_points = self.input_weights()
        return nn.functional.linear(rgb, for_rgb, self.input_fc.bias) + nn.functional.linear(points, for_points)

    def after_first(self, mixed: Tensor) -> Tensor:
        """The rest, from what `mixed` gives: the fused vector (..., width)."""
        hidden: Tensor = self.dropout(self.layer_norm(nn.functional.gelu(mixed)))
        for layer in self.layers:
            hidden = self.dropout(self.layer_norm(nn.functional.gelu(layer(hidden))))
        fused: Tensor = self.output_fc(hidden)
        return fused

    def forward(self, rgb: Tensor, points: Tensor) -> Tensor:
        """Fused vector (..., width) of RGB (..., C_rgb) and point features (..., C_pt)."""
        return self.after_first(self.mixed(rgb, points))


class ChannelAttention(nn.Module):
    """A gate per channel: h times sigmoid(2 a(h)), a being a two-layer perceptron.

    On a map of one pixel average and maximum pooling both give h, so the published sum a(avg) + a(max) is 2 a(h).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = max(1, channels // ATTENTION_REDUCTION)
        self.fc = nn.Sequential(nn.Linear(channels, width), nn.ReLU(), nn.Linear(width, channels))

    def forward(self, hidden: Tensor) -> Tensor:
        """Gated copy of `hidden` (..., C)."""
        return hidden * torch.sigmoid(2.0 * self.fc(hidden))


class SpatialAttention(nn.Module):
    """A gate per pixel: h times sigmoid(w_avg mean_c(h) + w_max max_c(h)).

    w_avg and w_max are the two centre taps of the published 7 x 7 convolution; on a map of one pixel the others meet
    zero padding only and are never trained.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, ATTENTION_KERNEL, padding=ATTENTION_KERNEL // 2, bias=False)

    def gate(self, hidden: Tensor) -> Tensor:
        """Gate before the sigmoid, (..., 1)."""
        centre = self.conv.weight[0, :, ATTENTION_KERNEL // 2, ATTENTION_KERNEL // 2]
        # max and not amax: with equal maxima the published gradient goes to one of them
        return centre[0] * hidden.mean(-1, keepdim=True) + centre[1] * hidden.max(-1, keepdim=True).values

    def forward(self, hidden: Tensor) -> Tensor:
        """Gated copy of `hidden` (..., C)."""
        return hidden * torch.sigmoid(self.gate(hidden))


class Attention(nn.Module):
    """Convolutional block attention on maps of one pixel: the channel gate, then the pixel's gate.

    Source: Woo et al., "CBAM" (arXiv 1807.06521), as MAFR's code applies it.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channel_attention = ChannelAttention(channels)
        self.spatial_attention = SpatialAttention()

    def forward(self, hidden: Tensor) -> Tensor:
        """Gated copy of `hidden` (..., C)."""
        gated: Tensor = self.spatial_attention(self.channel_attention(hidden))
        return gated


class Decoder(nn.Module):
    """From the fused vector to the features of one modality; a single LayerNorm serves three times.

    The order is linear, LayerNorm, GELU, dropout; attention stands before the last layer, and a linear skip of the
    fused vector is added after it. Parameter names are those of the published code.
    Source: MAFR (arXiv 2510.21793), attention-guided decoders, as its code computes them.
    """

    def __init__(self, width: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.input_fc = nn.Linear(width, channels)
        self.layers = nn.ModuleList([nn.Linear(channels, channels) for _ in range(2)])
        self.output_fc = nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels)
        self.cbam = Attention(channels)
        self.skip = nn.Linear(width, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, fused: Tensor) -> Tensor:
        """Restored features (..., C) of fused vectors (..., width)."""
        hidden: Tensor = self.dropout(nn.functional.gelu(self.norm(self.input_fc(fused))))
        for layer in self.layers:
            hidden = self.dropout(nn.functional.gelu(self.norm(layer(hidden))))
        restored: Tensor = self.output_fc(self.cbam(hidden)) + self.skip(fused)
        return restored


class RestorationNetwork(nn.Module):
    """Encoder and both decoders; 13 383 676 parameters at the published widths.

    rgb_channels, point_channels: widths of the features, C_rgb and C_pt; the fused vector has half their sum.
    dropout: share of hidden channels that training drops.
    """

    def __init__(
        self,
        rgb_channels: int = RGB_CHANNELS,
        point_channels: int = POINT_CHANNELS,
        dropout: float = DROPOUT,
    ) -> None:
        super().__init__()
        self.rgb_channels, self.point_channels = rgb_channels, point_channels
        width = hidden_channels(rgb_channels, point_channels)
        self.encoder = FusionEncoder(rgb_channels, point_channels, dropout)
        self.rgb_decoder = Decoder(width, rgb_channels, dropout)
        self.point_decoder = Decoder(width, point_channels, dropout)

    def forward(self, rgb: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """Restored RGB (..., C_rgb) and point features (..., C_pt) from the features themselves."""
        return self.after_first(self.encoder.mixed(rgb, points))

    def after_first(self, mixed: Tensor) -> tuple[Tensor, Tensor]:
        """The rest, from the output (..., width) of the encoder's first layer."""
        fused = self.encoder.after_first(mixed)
        return self.rgb_decoder(fused), self.point_decoder(fused)


def hidden_channels(rgb_channels: int, point_channels: int) -> int:
    """Width of the fused vector: half of both widths together. Raises ValueError for widths below 1."""
    if rgb_channels < 1 or point_channels < 1:
        raise ValueError(f"rgb_channels, point_channels: must be at least 1, got {rgb_channels} and {point_channels}")
    return (rgb_channels + point_channels) // 2


def new_network(
    rgb_channels: int = RGB_CHANNELS, point_channels: int = POINT_CHANNELS, *, dropout: float = DROPOUT, seed: int
) -> RestorationNetwork:
    """A freshly initialised network (PyTorch's defaults), the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RestorationNetwork(rgb_channels, point_channels, dropout)


def to_published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a `RestorationNetwork` under `<published network>.<published key>`. Raises KeyError for others."""
    published = {ours: theirs for theirs, ours in PUBLISHED_NETWORKS.items()}
    return {_renamed(name, published): tensor for name, tensor in tensors.items()}


def from_published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_published`."""
    return {_renamed(name, PUBLISHED_NETWORKS): tensor for name, tensor in tensors.items()}


def network_from_published(tensors: Mapping[str, Tensor], where: str, dropout: float = DROPOUT) -> RestorationNetwork:
    """A network from tensors under `<published network>.<published key>`; its widths follow from them.

    Raises WeightsError that names `where` and the keys when a tensor is missing, unknown or of a wrong shape.
    """
    widths = [
        tensors[name].shape[0] if name in tensors else 0
        for name in ("decoder_2D.norm.weight", "decoder_3D.norm.weight")
    ]
    with torch.device("meta"):
        network = RestorationNetwork(widths[0] or RGB_CHANNELS, widths[1] or POINT_CHANNELS, dropout)
    expected = {name: tuple(tensor.shape) for name, tensor in to_published(network.state_dict()).items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != given:
        wrong = sorted(name for name in {*expected, *given} if expected.get(name) != given.get(name))
        raise WeightsError(f"{where}: not the tensors of MAFR's networks; missing, unknown or misshapen: {wrong}")
    ours = {name: tensor.float().clone() for name, tensor in from_published(tensors).items()}
    network.load_state_dict(ours, assign=True)
    return network


def _renamed(name: str, networks: Mapping[str, str]) -> str:
    network, _, key = name.partition(".")
    return f"{networks[network]}.{key}"

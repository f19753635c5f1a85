"""The encoders of Point-MAE (arXiv 2203.06604) and Point-BERT (arXiv 2111.14819) as M3DM reads them.

Names of modules are those of the published checkpoints, so that their tensors load without renaming.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional

Network = Literal["point_mae", "point_bert"]

WIDTH = 384
DEPTH = 12
HEADS = 6
# outputs after these blocks (counted from 0) make up the feature, by the number of blocks that are kept: CFM prunes
# to 8 and 4; of any other number only the last output is taken
OUTPUT_BLOCKS = {12: (3, 7, 11), 8: (1, 4, 7), 4: (1, 2, 3)}
DROP_RATES = tuple(0.1 * block / (DEPTH - 1) for block in range(DEPTH))
# the first block's rate is 0, so it has nothing to draw; two branches in each other block
DROP_DECISIONS = 2 * (DEPTH - 1)

_GROUP_WIDTH = {"point_mae": WIDTH, "point_bert": 256}
# points in one piece of the group encoder: its widest layer then takes 8 MB, which stays in a cache
_PIECE = 4096
_PIECE_GPU = 65536


class _Affine(NamedTuple):
    """x -> x * scale + shift, per channel."""

    scale: torch.Tensor
    shift: torch.Tensor


class GroupEncoder(nn.Module):
    """A small PointNet per group: point coordinates (G, M, 3) to group tokens (G, width).

    Linear 3-128, BatchNorm, ReLU, linear 128-256; maximum over the points, put before each point's own 256 values;
    linear 512-512, BatchNorm, ReLU, linear 512-width; maximum. Linear maps are stored as 1 x 1 convolutions.

    Computed in pieces without the (G * M, 512) arrays: the first statistics follow from the covariance of the
    coordinates, the second from that of the first layer's outputs and the group maxima, since both are linear; the
    two linear maps between the second layer and the second normalisation are merged.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first_conv = nn.Sequential(
            nn.Conv1d(3, 128, 1), nn.BatchNorm1d(128), nn.ReLU(inplace=True), nn.Conv1d(128, 256, 1)
        )
        self.second_conv = nn.Sequential(
            nn.Conv1d(512, 512, 1), nn.BatchNorm1d(512), nn.ReLU(inplace=True), nn.Conv1d(512, width, 1)
        )

    def forward(self, groups: torch.Tensor, batch_statistics: bool) -> torch.Tensor:
        """Tokens (G, width) of groups (G, M, 3); `batch_statistics`: of this sample over all its points, else stored.

        Batch statistics are those of training: the biased variance over all G * M points.
        """
        lifted = self._lift(groups, batch_statistics)
        pieces = torch.split(lifted, max(1, (_PIECE_GPU if groups.is_cuda else _PIECE) // groups.shape[1]))
        weight, bias = _linear(self.first_conv[3])
        maxima = torch.cat([functional.linear(piece, weight).amax(dim=1) for piece in pieces]).float() + bias
        to_point, to_group, constant = self._second_layer()
        norm = cast("nn.BatchNorm1d", self.second_conv[1])
        if batch_statistics:
            moments = _joint_moments(lifted, maxima, pieces)
            affine = _normalisation(norm, *_linear_moments(moments, torch.cat([to_point, to_group], dim=1), constant))
        else:
            affine = _normalisation(norm, _double(norm.running_mean), _double(norm.running_var))
        scale, shift = affine
        point_weight = (scale[:, None] * to_point).float()
        group_part = maxima.double() @ (scale[:, None] * to_group).T + (scale * constant + shift)
        last_weight, last_bias = _linear(self.second_conv[3])
        tokens = [
            _last_layers(piece, offset, point_weight, last_weight)
            for piece, offset in zip(pieces, torch.split(group_part.float(), len(pieces[0])), strict=True)
        ]
        return torch.cat(tokens).float() + last_bias

    def _lift(self, groups: torch.Tensor, batch_statistics: bool) -> torch.Tensor:
        """Outputs (G, M, 128) of the first layer, normalised and rectified."""
        weight, bias = (value.double() for value in _linear(self.first_conv[0]))
        norm = cast("nn.BatchNorm1d", self.first_conv[1])
        if batch_statistics:
            points = groups.reshape(-1, 3).double()
            mean = points.mean(dim=0)
            centred = points - mean
            affine = _normalisation(norm, *_linear_moments((mean, centred.T @ centred / len(points)), weight, bias))
        else:
            affine = _normalisation(norm, _double(norm.running_mean), _double(norm.running_var))
        folded = (affine.scale[:, None] * weight).float()
        shift = (affine.scale * bias + affine.shift).float()
        # coordinates are millimetres and the scale is large: this layer stays in float32
        with torch.autocast(groups.device.type, enabled=False):
            return functional.linear(groups, folded, shift).relu_()

    def _second_layer(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The 512-512 map split into its parts for the first layer's outputs (512, 128) and the maxima (512, 256)."""
        first_weight, first_bias = (value.double() for value in _linear(self.first_conv[3]))
        weight, bias = (value.double() for value in _linear(self.second_conv[0]))
        for_group, for_point = weight[:, :256], weight[:, 256:]
        return for_point @ first_weight, for_group, bias + for_point @ first_bias


def _last_layers(
    piece: torch.Tensor, offset: torch.Tensor, point_weight: torch.Tensor, last_weight: torch.Tensor
) -> torch.Tensor:
    wide = functional.linear(piece, point_weight)
    wide += offset[:, None]
    return functional.linear(wide.relu_(), last_weight).amax(dim=1)


def _linear(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrix and bias of a 1 x 1 convolution."""
    convolution = cast("nn.Conv1d", layer)
    return convolution.weight[..., 0], cast("torch.Tensor", convolution.bias)


def _double(values: torch.Tensor | None) -> torch.Tensor:
    return cast("torch.Tensor", values).double()


def _normalisation(norm: nn.BatchNorm1d, mean: torch.Tensor, variance: torch.Tensor) -> _Affine:
    scale = norm.weight.double() / torch.sqrt(variance + norm.eps)
    return _Affine(scale, norm.bias.double() - mean * scale)


def _linear_moments(
    moments: tuple[torch.Tensor, torch.Tensor], weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance per channel of weight x + bias, given mean and covariance of x."""
    mean, covariance = moments
    variance = ((weight @ covariance) * weight).sum(dim=1)
    return weight @ mean + bias, variance.clamp_min(0)


def _joint_moments(
    lifted: torch.Tensor, maxima: torch.Tensor, pieces: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (384,) and covariance (384, 384) in float64 of [first layer's outputs, maxima of the group]."""
    count = lifted.shape[1]
    sums = lifted.sum(dim=1, dtype=torch.float64)
    mean = sums.mean(dim=0) / count
    group_mean = maxima.double().mean(dim=0)
    centred_groups = maxima.double() - group_mean
    square = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=lifted.device)
    # centred before squaring, since the products are float32
    with torch.autocast(lifted.device.type, enabled=False):
        for piece in pieces:
            centred = (piece.reshape(-1, len(mean)) - mean.float()).T
            square += (centred @ centred.T).double()
    cross = (sums / count - mean).T @ centred_groups / len(maxima)
    own = centred_groups.T @ centred_groups / len(maxima)
    covariance = torch.cat(
        [torch.cat([square / (len(maxima) * count), cross], dim=1), torch.cat([cross.T, own], dim=1)]
    )
    return torch.cat([mean, group_mean]), covariance


class _Attention(nn.Module):
    """Multi-head self-attention; queries, keys and values without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        batch, count, _ = tokens.shape
        parts = self.qkv(tokens).view(batch, count, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        return cast("torch.Tensor", self.proj(mixed.transpose(1, 2).reshape(batch, count, WIDTH)))


class _Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.fc2 = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return cast("torch.Tensor", self.fc2(functional.gelu(self.fc1(tokens))))


class _Block(nn.Module):
    """Pre-LayerNorm block; each sample has a weight for each branch, and a branch of weight 0 is dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.attn = _Attention()
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = _Mlp()

    def forward(self, tokens: torch.Tensor, branches: tuple[Sequence[float], Sequence[float]]) -> torch.Tensor:
        for weights, norm, layer in zip(branches, (self.norm1, self.norm2), (self.attn, self.mlp), strict=True):
            if any(weights):
                tokens = _plus(tokens, layer(norm(tokens)), weights)
        return tokens


def _plus(tokens: torch.Tensor, branch: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """tokens + weight * branch, (B, N, C) with a weight per sample."""
    if len(set(weights)) == 1:
        return torch.add(tokens, branch, alpha=weights[0])
    return tokens + torch.tensor(weights, device=tokens.device)[:, None, None] * branch


class _Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block() for _ in range(DEPTH))


class PointTransformer(nn.Module):
    """Group tokens with attention: groups (B, G, M, 3) around centres (B, G, 3) to features (B, G, 1152).

    12 blocks of width 384 and 6 heads; the position embedding of the centres is added to the input of every block.
    Outputs after blocks 3, 7 and 11 (from 0), each through the same final LayerNorm, are concatenated. `point_bert`
    has narrower group tokens, brought to 384 by one more layer, and a class token that takes part in attention and
    is dropped at the end.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        width = _GROUP_WIDTH[network]
        self.encoder = GroupEncoder(width)
        self.pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, WIDTH))
        self.blocks = _Blocks()
        self.norm = nn.LayerNorm(WIDTH)
        if network == "point_bert":
            self.reduce_dim = nn.Linear(width, WIDTH)
            self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
            self.cls_pos = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self._has_class_token = network == "point_bert"

    def forward(
        self,
        groups: torch.Tensor,
        centres: torch.Tensor,
        batch_statistics: bool = True,
        keep: Sequence[Sequence[bool]] | None = None,
        blocks: int = DEPTH,
    ) -> torch.Tensor:
        """Features float32 (B, G, 1152); `blocks` are used, of which (12, 8, 4 of them) three are joined.

        groups: coordinates relative to the centre, metres. batch_statistics: BatchNorm from each sample by itself, as
        in the published code, else stored. keep: stochastic depth of each sample, one flag per branch of blocks 1 to
        11 (attention, MLP); kept branches are divided by the probability of being kept. None: all branches as they
        are. A sample's features do not depend on the others. Raises ValueError for another number of flags.
        """
        weights = [branch_weights(None if keep is None else keep[number]) for number in range(len(groups))]
        # sample by sample, for statistics of its own; its 131 000 points keep any device busy
        tokens = torch.stack([self.encoder(sample, batch_statistics) for sample in groups])
        position = self.pos_embed(centres)
        if self._has_class_token:
            tokens = _behind(self.cls_token, self.reduce_dim(tokens))
            position = _behind(self.cls_pos, position)
        outputs = []
        joined = OUTPUT_BLOCKS.get(blocks, (blocks - 1,))
        for index, block in enumerate(self.blocks.blocks[:blocks]):
            attention, perceptron = zip(*(of_sample[index] for of_sample in weights), strict=True)
            tokens = block(tokens + position, (attention, perceptron))
            if index in joined:
                outputs.append(self.norm(tokens)[:, -centres.shape[1] :].float())
        return torch.cat(outputs, dim=2)


def _behind(first: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """One token (1, 1, C) in front of those of each sample (B, G, C)."""
    return torch.cat([first.expand(len(rest), -1, -1), rest], dim=1)


def branch_weights(keep: Sequence[bool] | None) -> list[tuple[float, float]]:
    """Weight of both branches of each block: 1, or under stochastic depth 0 (dropped) or 1 / (1 - rate) (kept)."""
    if keep is None:
        return [(1.0, 1.0)] * DEPTH
    if len(keep) != DROP_DECISIONS:
        raise ValueError(f"keep: should hold {DROP_DECISIONS} flags, got {len(keep)}")
    flags = [True, True, *map(bool, keep)]
    weights = [flag / (1 - DROP_RATES[i // 2]) for i, flag in enumerate(flags)]
    return list(zip(weights[::2], weights[1::2], strict=True))


def draw_keep(generator: torch.Generator) -> list[bool]:
    """Random decisions of stochastic depth for one sample: a branch of block i is dropped with rate 0.1 i / 11."""
    rates = torch.tensor(DROP_RATES[1:], dtype=torch.float64).repeat_interleave(2)
    drawn = torch.rand(len(rates), generator=generator, dtype=torch.float64)
    return [bool(flag) for flag in drawn >= rates]

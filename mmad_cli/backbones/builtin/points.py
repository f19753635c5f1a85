"""The built-in point network: group tokens that do not change when the scan is turned, with attention to neighbours.

Lengths are measured in radii of the groups of the scan at hand, so neither the unit nor the resolution of a scanner
matters; raw metres would make all groups look alike to a network of this size.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn import functional

WIDTH = 128
POINT_WIDTH = 96
HEADS = 4
DEPTH = 4
NEIGHBOURS = 16
# outputs before the first block and after these blocks (counted from 0) make up the token
OUTPUT_BLOCKS = (1, 3)
LEVELS = 1 + len(OUTPUT_BLOCKS)
TOKEN_PART = 96
CHANNELS = LEVELS * TOKEN_PART
# groups that the group encoder works on at a time
_PIECE = 64
_PIECE_GPU = 8192
# the plane through a group is that of all its points, of which each second one enters the encoder
_STRIDE = 2
_POINT_INPUTS = 4
_GROUP_INPUTS = 5
_RELATION_INPUTS = 5


class GroupEncoder(nn.Module):
    """Group tokens (B, G, 128) from height over and distance along the plane through each group.

    These two numbers per point are those of a spin image (Johnson and Hebert, PAMI 1999); maximum and mean over the
    points are joined with the spread of the group and its angle to the line of sight.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Sequential(
            nn.Linear(_POINT_INPUTS, 32), nn.ReLU(inplace=True), nn.Linear(32, POINT_WIDTH), nn.ReLU(inplace=True)
        )
        self.mix = nn.Sequential(nn.Linear(2 * POINT_WIDTH + _GROUP_INPUTS, 256), nn.GELU(), nn.Linear(256, WIDTH))

    def forward(self, points: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """points (B, G, M / 2, 4) and whole (B, G, 5), as `describe` gives them."""
        # in pieces that stay in a cache
        pieces = torch.split(points.flatten(0, 1), _PIECE_GPU if points.is_cuda else _PIECE)
        pooled = torch.cat([torch.cat([p.amax(dim=1), p.mean(dim=1)], dim=-1) for p in map(self.lift, pieces)])
        return cast("torch.Tensor", self.mix(torch.cat([pooled.view(*whole.shape[:-1], -1), whole], dim=-1)))


class _Block(nn.Module):
    """Attention of each group to its nearest groups, biased by how they lie to each other; then a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH, bias=False)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.relation = nn.Sequential(nn.Linear(_RELATION_INPUTS, 32), nn.GELU(), nn.Linear(32, WIDTH))
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 3 * WIDTH), nn.GELU(), nn.Linear(3 * WIDTH, WIDTH))

    def forward(self, tokens: torch.Tensor, near: torch.Tensor, relations: torch.Tensor) -> torch.Tensor:
        """tokens (B, G, 128); near int64 (B, G, K) neighbours; relations (B, G, K, 5)."""
        inner = self.norm1(tokens)
        query = _heads(self.query(inner))[..., None, :]
        relation = self.relation(relations)
        key = _heads(gather(self.key(inner), near) + relation)
        value = _heads(gather(self.value(inner), near) + relation)
        query = query.transpose(-3, -2)  # (B, G, 1, heads, width of a head)
        weight = ((query * key).sum(dim=-1) * (WIDTH // HEADS) ** -0.5).softmax(dim=-2)
        mixed = (weight[..., None] * value).sum(dim=-3)
        tokens = tokens + self.proj(mixed.flatten(-2))
        return tokens + cast("torch.Tensor", self.mlp(self.norm2(tokens)))


class PointNetwork(nn.Module):
    """Groups (B, G, M, 3) around centres (B, G, 3), camera frame with the sensor at the origin, to tokens.

    A token has three parts of 96 channels, each of length 1: the group alone, with its neighbourhood, and with a
    wider one. Nothing in it depends on where the scan lies or how it is turned about the line of sight.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder = GroupEncoder()
        self.blocks = nn.ModuleList(_Block() for _ in range(DEPTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(LEVELS))
        self.heads = nn.ModuleList(nn.Linear(WIDTH, TOKEN_PART) for _ in range(LEVELS))

    def parts(self, groups: torch.Tensor, centres: torch.Tensor) -> list[torch.Tensor]:
        """The three parts (B, G, 96) of the tokens, each of length 1."""
        points, whole, near, relations = describe(groups, centres)
        tokens = self.encoder(points, whole)
        levels = [tokens]
        for index, block in enumerate(self.blocks):
            tokens = block(tokens, near, relations)
            if index in OUTPUT_BLOCKS:
                levels.append(tokens)
        return [
            functional.normalize(head(norm(level)), dim=-1)
            for level, norm, head in zip(levels, self.norms, self.heads, strict=True)
        ]

    def forward(self, groups: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
        """Tokens (B, G, 288)."""
        return torch.cat(self.parts(groups, centres), dim=-1)


def describe(
    groups: torch.Tensor, centres: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the network reads of groups (B, G, M, 3) and centres (B, G, 3).

    Returns per second point (B, G, M / 2, 4) height and distance in the frame of the group's plane; per group
    (B, G, 5) its spread, its radius and the cosine of its normal to the line of sight; neighbours int64 (B, G, K);
    and how each neighbour lies (B, G, K, 5): the angles of point pair features (Drost et al., CVPR 2010).
    """
    with torch.no_grad():
        radius = groups.square().sum(dim=-1).amax(dim=-1).sqrt()
        scale = radius.median(dim=1).values.clamp_min(1e-9)[:, None, None]
        scaled = groups / scale[..., None]
        spread, normal = _planes(scaled, centres)
        # members come by distance, so these reach as far as all of them
        middle, some = scaled.mean(dim=2, keepdim=True), scaled[:, :, ::_STRIDE]
        rise = (some * normal[:, :, None]).sum(dim=-1)
        height = rise - (middle * normal[:, :, None]).sum(dim=-1)
        along = (some.square().sum(dim=-1) - rise.square()).clamp_min(0).sqrt()
        points = torch.stack([4 * height, along, 8 * height * along, height.abs().sqrt()], dim=-1)
        sight = functional.normalize(centres, dim=-1)
        incidence = -(normal * sight).sum(dim=-1, keepdim=True)
        whole = torch.cat([spread.clamp_min(0).sqrt() * 2, radius[..., None] / scale - 1, incidence], dim=-1)
        near, relations = _relations(centres / scale, normal)
    return points, whole, near, relations


def gather(values: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """Rows of values (B, G, C) at near (B, G, K), as (B, G, K, C)."""
    batch, count, neighbours = near.shape
    index = near.reshape(batch, count * neighbours, 1).expand(-1, -1, values.shape[-1])
    return values.gather(1, index).view(batch, count, neighbours, -1)


def _heads(values: torch.Tensor) -> torch.Tensor:
    return values.view(*values.shape[:-1], HEADS, WIDTH // HEADS)


def _planes(groups: torch.Tensor, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues (B, G, 3), ascending, of the covariance of each group, and its normal (B, G, 3) to the sensor."""
    centred = groups - groups.mean(dim=2, keepdim=True)
    covariance = (centred.transpose(-1, -2) @ centred).double() / groups.shape[2]
    spread, axes = torch.linalg.eigh(covariance)
    normal = axes[..., 0].to(groups.dtype)
    away = (normal * centres).sum(dim=-1, keepdim=True) > 0
    return spread.to(groups.dtype), torch.where(away, -normal, normal)


def _relations(centres: torch.Tensor, normal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    count = min(NEIGHBOURS, centres.shape[1])
    # coordinates relative to the middle: far from the sensor their squares would cancel
    middle = centres - centres.mean(dim=1, keepdim=True)
    near = (
        torch.cdist(middle, middle, compute_mode="donot_use_mm_for_euclid_dist")
        .topk(count, dim=-1, largest=False, sorted=True)
        .indices
    )
    step = gather(middle, near) - middle[:, :, None]
    other = gather(normal, near)
    own = normal[:, :, None]
    length = step.square().sum(dim=-1)
    relations = torch.stack(
        [
            length.sqrt(),
            (own * step).sum(dim=-1),
            (other * step).sum(dim=-1),
            4 * (1 - (own * other).sum(dim=-1)),
            1 / (1 + length),
        ],
        dim=-1,
    )
    return near, relations

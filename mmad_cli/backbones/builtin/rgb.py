"""The built-in RGB network: a small residual CNN with patch tokens at an eighth of the image size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from torch.nn import functional

# channels at 1/2, 1/4, 1/8 and 1/16 of the image side; `outputs` counts them from 0
WIDTHS = (24, 32, 64, 128)
BLOCKS = (0, 1, 2, 2)
# channels of the fine and of the coarse half of what is compared in training
TOKEN_HALF = 96
# tokens come from the map at 1/4
TOKEN_STAGES = 2
CHANNELS = WIDTHS[TOKEN_STAGES - 1]
PATCH = 8
# the image is padded at its lower and right edge to a multiple of this
_STEP = 16


class _Residual(nn.Module):
    """Two 3 x 3 convolutions with batch normalisation around a skip connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        inner = functional.relu(self.norm1(self.conv1(images)))
        return functional.relu(images + self.norm2(self.conv2(inner)))


class _Stage(nn.Module):
    """Smoothed halving of the resolution, one convolution to the new width, residual blocks.

    Averaging before every second row and column is dropped keeps features steady under shifts of a pixel.
    """

    def __init__(self, before: int, width: int, blocks: int, size: int = 3) -> None:
        super().__init__()
        self.pool = before != 3
        self.conv = nn.Conv2d(before, width, size, stride=1 if self.pool else 2, padding=size // 2, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(*(_Residual(width) for _ in range(blocks)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.pool:
            images = functional.avg_pool2d(images, 3, stride=2, padding=1, count_include_pad=False)
        return cast("torch.Tensor", self.blocks(functional.relu(self.norm(self.conv(images)))))


class PatchEmbed(nn.Module):
    """What timm's networks say of their patches; images of any size are taken."""

    patch_size = (PATCH, PATCH)
    img_size = None


class RgbNetwork(nn.Module):
    """Images (B, 3, H, W), ImageNet-normalised, to feature maps, or to tokens of 8 x 8 pixels.

    A token is the square root of the rectified map at 1/4, averaged over 8 x 8 pixels. In training two heads stand on
    top, a fine one on the maps at 1/4 and 1/8 and a coarse one that the map at 1/16 takes part in. What they give knows
    each place too well: on sound parts its distances are nearly as large as on defects.
    """

    num_prefix_tokens = 0

    def __init__(self, outputs: Sequence[int] = (1, 2, 3)) -> None:
        super().__init__()
        self.outputs = tuple(outputs)
        self.patch_embed = PatchEmbed()
        befores = (3, *WIDTHS[:-1])
        self.stages = nn.ModuleList(
            _Stage(before, width, blocks, 5 if before == 3 else 3)
            for before, width, blocks in zip(befores, WIDTHS, BLOCKS, strict=True)
        )
        self.fine = nn.Linear(WIDTHS[1] + WIDTHS[2], TOKEN_HALF)
        self.coarse = nn.Linear(WIDTHS[1] + WIDTHS[2] + WIDTHS[3], TOKEN_HALF)

    def maps(self, images: torch.Tensor, stages: int = len(WIDTHS)) -> list[torch.Tensor]:
        """Maps at 1/2, 1/4, 1/8 and 1/16 of the image side, or the first `stages` of them."""
        height, width = images.shape[-2:]
        images = functional.pad(images, (0, -width % _STEP, 0, -height % _STEP), mode="replicate")
        found = []
        for stage in self.stages[:stages]:
            images = stage(images)
            found.append(images)
        return found

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The maps chosen with `outputs`, each rectified."""
        found = self.maps(images)
        return [found[index] for index in self.outputs]

    def halves(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Fine and coarse half (B, H / 8, W / 8, 96) of what is compared in training, each of length 1."""
        _, quarter, eighth, sixteenth = self.maps(images)
        eighths = [functional.avg_pool2d(quarter, 2), eighth]
        wide = functional.interpolate(sixteenth, scale_factor=2, mode="bilinear", align_corners=False)
        near = torch.cat(eighths, dim=1).permute(0, 2, 3, 1)
        far = torch.cat([*eighths, wide], dim=1).permute(0, 2, 3, 1)
        return (
            functional.normalize(self.fine(near), dim=-1),
            functional.normalize(self.coarse(far), dim=-1),
        )

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """Tokens (B, P, 32), row-major; an incomplete row or column of patches is left out."""
        height, width = images.shape[-2] // PATCH, images.shape[-1] // PATCH
        quarter = self.maps(images, TOKEN_STAGES)[-1]
        tokens = functional.avg_pool2d(quarter, 2).sqrt()[:, :, :height, :width]
        return tokens.flatten(2).transpose(1, 2)

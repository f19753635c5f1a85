"""Three views of image crops: as they are, moved under other conditions, and altered in places."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

# a pixel is altered where a channel changed by more than this
_VISIBLE = 0.03


@dataclass(frozen=True)
class ImageViews:
    """A batch. `first`, `second`, `altered`: images (B, 3, S, S) in [0, 1]; the third has the frame of the second.

    `place` (B, T, T, 2): where each token of the first view lies in the second, in units of `grid_sample`; `cover`
    (B, T, T): share of altered pixels under the tokens of the third view.
    """

    first: torch.Tensor
    second: torch.Tensor
    altered: torch.Tensor
    place: torch.Tensor
    cover: torch.Tensor


def image_views(images: torch.Tensor, crops: int, crop: int, token: int, generator: torch.Generator) -> ImageViews:
    """`crops` random crops (side `crop`) of images (N, 3, S, S) and their views; `token`: pixels per token side."""
    size = images.shape[-1]
    index = torch.arange(crops) % len(images)
    source = images[index]
    first = _poses(crops, crop / size, generator)
    step = _steps(crops, generator)
    second = first @ step
    clean = _sampled(source, first, crop)
    moved = _sampled(source, second, crop)
    tokens = crop // token
    ticks = (torch.arange(tokens) + 0.5) / tokens * 2 - 1
    rows, columns = torch.meshgrid(ticks, ticks, indexing="ij")
    here = torch.stack([columns, rows, torch.ones_like(rows)], dim=-1)
    place = torch.einsum("bij,yxj->byxi", torch.linalg.inv(step), here)[..., :2]
    altered, mask = alter(moved, generator)
    return ImageViews(
        disturbed(clean, generator),
        disturbed(moved, generator),
        disturbed(altered, generator),
        place,
        functional.avg_pool2d(mask[:, None], token)[:, 0],
    )


def _poses(count: int, share: float, generator: torch.Generator) -> torch.Tensor:
    """Maps (B, 3, 3) from crop to canvas, both as [-1, 1] squares: any angle, some zoom, inside the canvas."""
    angle = _uniform(count, 0, 2 * np.pi, generator)
    zoom = share * torch.exp(_uniform(count, -0.4, 0.25, generator))
    room = (1 - zoom * 1.25).clamp_min(0)
    shift = torch.stack([_uniform(count, -1, 1, generator) * room for _ in range(2)])
    return _affine(angle, zoom, shift)


def _steps(count: int, generator: torch.Generator) -> torch.Tensor:
    """Maps (B, 3, 3) from the second view to the first: small turns for most, any turn for some."""
    angle = _uniform(count, -0.25, 0.25, generator)
    anyhow = torch.rand(count, generator=generator) < 0.3
    angle = torch.where(anyhow, _uniform(count, 0, 2 * np.pi, generator), angle)
    zoom = torch.exp(_uniform(count, -0.08, 0.08, generator))
    return _affine(angle, zoom, torch.stack([_uniform(count, -0.12, 0.12, generator) for _ in range(2)]))


def _affine(angle: torch.Tensor, zoom: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    cosine, sine, zero = zoom * angle.cos(), zoom * angle.sin(), torch.zeros_like(angle)
    rows = [cosine, -sine, shift[0], sine, cosine, shift[1], zero, zero, zero + 1]
    return torch.stack(rows, dim=-1).view(-1, 3, 3)


def _sampled(images: torch.Tensor, maps: torch.Tensor, side: int) -> torch.Tensor:
    grid = functional.affine_grid(maps[:, :2], [len(images), 3, side, side], align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def disturbed(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Images under other conditions: exposure, gamma, colour cast, uneven light, blur and noise, each mild."""
    count, _, side, _ = images.shape
    gain = torch.exp(0.07 * torch.randn(count, 1, 1, 1, generator=generator))
    cast = torch.exp(0.02 * torch.randn(count, 3, 1, 1, generator=generator))
    gamma = torch.exp(0.05 * torch.randn(count, 1, 1, 1, generator=generator))
    light = 1 + 0.06 * _smooth(count, side, 3, generator)
    result = images.clamp(1e-4, 1) ** gamma * gain * cast * light
    blur = torch.rand(count, 1, 1, 1, generator=generator) * 0.8
    result = result + blur * (functional.avg_pool2d(_padded(result, 1), 3, 1) - result)
    noise = torch.rand(count, 1, 1, 1, generator=generator) ** 2 * 0.03
    result = result + noise * torch.randn(result.shape, generator=generator)
    return result.clamp(0, 1)


def alter(images: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Images altered in places, and where they visibly are, float (B, S, S) of 0 and 1.

    Places are blobs and strokes of many sizes; inside them the colour shifts, light is lost or gained, content of
    elsewhere or of another image shows, or the image is warped or smoothed.
    """
    count, _, side, _ = images.shape
    mask = _blobs(count, side, generator)
    content = _contents(images, generator)
    strength = 0.25 + 0.75 * torch.rand(count, 1, 1, 1, generator=generator)
    result = images + (content - images) * mask * strength
    visible = (result - images).abs().amax(dim=1) > _VISIBLE
    return result, visible.float()


def _contents(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """What shows inside the altered places of each image: one of several kinds at random."""
    count, _, side, _ = images.shape
    kind = torch.randint(0, 6, (count, 1, 1, 1), generator=generator)
    shift = 0.25 * torch.randn(count, 3, 1, 1, generator=generator)
    shift = torch.where(torch.rand(count, 1, 1, 1, generator=generator) < 0.5, shift, shift.mean(1, keepdim=True))
    tinted = images + shift
    scaled = images * torch.exp(0.7 * torch.randn(count, 1, 1, 1, generator=generator))
    foreign = images.roll(1, 0)
    places = [int(v) for v in torch.randint(side // 5, side - side // 5, (2,), generator=generator)]
    elsewhere = images.roll(places, (2, 3)).flip(3)
    warp = torch.stack([_smooth(count, side, 8, generator) for _ in range(2)], dim=-1)[:, 0] * 0.08
    identity = torch.eye(2, 3).expand(count, 2, 3)
    grid = functional.affine_grid(identity, [count, 3, side, side], align_corners=False)
    warped = functional.grid_sample(images, grid + warp, padding_mode="reflection", align_corners=False)
    smoothed = functional.avg_pool2d(_padded(images, 4), 9, 1)
    smoothed = smoothed + 0.15 * torch.randn(count, 1, 1, 1, generator=generator)
    choices = torch.stack([tinted, scaled, foreign, elsewhere, warped, smoothed])
    picked = choices.gather(0, kind[None].expand(1, *images.shape))[0]
    return picked.clamp(0, 1)


def _blobs(count: int, side: int, generator: torch.Generator) -> torch.Tensor:
    """Soft masks (B, 1, S, S): a few patches at random places, ragged or drawn out into strokes."""
    ticks = torch.arange(side, dtype=torch.float32)
    rows, columns = torch.meshgrid(ticks, ticks, indexing="ij")
    ragged = _smooth(count, side, side // 8, generator)
    mask = torch.zeros(count, 1, side, side)
    for _ in range(4):
        middle = _uniform(2 * count, 0, side, generator).view(2, count, 1, 1)
        radius = torch.exp(_uniform(count, np.log(2.5), np.log(side / 5), generator)).view(-1, 1, 1)
        aspect = torch.exp(_uniform(count, 0, 2.0, generator)).view(-1, 1, 1)
        angle = _uniform(count, 0, np.pi, generator).view(-1, 1, 1)
        y, x = rows - middle[0], columns - middle[1]
        along, across = angle.cos() * x + angle.sin() * y, angle.cos() * y - angle.sin() * x
        distance = ((along / aspect.sqrt()) ** 2 + (across * aspect.sqrt()) ** 2).sqrt()
        edge = radius * (1 + 0.35 * ragged[:, 0]) - distance
        mask = torch.maximum(mask, (edge / 1.5 + 0.5).clamp(0, 1)[:, None])
    return mask


def _smooth(count: int, side: int, cells: int, generator: torch.Generator) -> torch.Tensor:
    """Smooth random fields (B, 1, S, S) of about `cells` bumps a side."""
    coarse = torch.randn(count, 1, cells + 2, cells + 2, generator=generator)
    return functional.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=True)


def _padded(images: torch.Tensor, margin: int) -> torch.Tensor:
    return functional.pad(images, (margin,) * 4, mode="replicate")


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)

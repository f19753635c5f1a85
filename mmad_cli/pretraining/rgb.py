"""One step of the training of the RGB network."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional

from mmad_cli.backbones.builtin.rgb import PATCH, RgbNetwork
from mmad_cli.pretraining.config import RgbConfig
from mmad_cli.pretraining.contrast import contrast_loss, separation
from mmad_cli.pretraining.image_views import ImageViews, image_views
from mmad_cli.pretraining.images import canvas

# the constants that networks for natural images are fed with, so that the built-in one takes their place
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
# places whose counterpart lies farther out have no whole token there
_INSIDE = 0.92


class RgbTask:
    """Views of procedural images and the loss of the network on them; a step depends on its number only."""

    def __init__(self, config: RgbConfig) -> None:
        self.config = config

    def network(self) -> RgbNetwork:
        """A network with random weights."""
        return RgbNetwork().to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def loss(
        self, network: torch.nn.Module, step: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of a step, and how well the tokens tell altered places (area under the ROC curve)."""
        config, device = self.config, next(network.parameters()).device
        views = self._views(step, generator)
        images = normalised(torch.cat([views.first, views.second, views.altered])).to(device)
        halves = network.halves(images.contiguous(memory_format=torch.channels_last))  # type: ignore[operator]
        anchor, where, owner = self._anchors(views, generator)
        broken = (views.cover > config.cover).flatten().nonzero()[:, 0]
        broken = broken[torch.randperm(len(broken), generator=generator)[: config.altered]]
        broken_owner = broken // views.cover[0].numel()
        seen = functional.grid_sample(views.cover[:, None], where, align_corners=False).flatten() > config.cover
        losses, told = [], []
        for half in halves:
            first, second, third = half.chunk(3)
            own = first.flatten(0, 2)[anchor.to(device)]
            positive, twin = (_at(tokens, where.to(device)) for tokens in (second, third))
            altered = third.flatten(0, 2)[broken.to(device)]
            losses.append(
                contrast_loss(own, positive, altered, owner.to(device), broken_owner.to(device), config.temperature)
            )
            told.append((own, positive, twin))
        joined = [torch.cat(parts, dim=1).detach() for parts in zip(*told, strict=True)]
        return torch.stack(losses).mean(), separation(joined[0], joined[1], joined[2], seen.to(device))

    def _views(self, step: int, generator: torch.Generator) -> ImageViews:
        config = self.config
        last = config.pool + step * config.fresh
        pool = torch.stack([_canvas(config.seed, i, config.canvas) for i in range(last - config.pool, last)])
        pool = pool[torch.randperm(len(pool), generator=generator)]
        return image_views(pool, config.crops, config.crop, PATCH, generator)

    def _anchors(
        self, views: ImageViews, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Flat indices (N,) of tokens of the first view, their places (B, 1, n, 2) in the second, and their crops."""
        count, side = views.place.shape[:2]
        chance = torch.rand(count, side * side, generator=generator)
        inside = (views.place.abs() < _INSIDE).all(dim=-1).flatten(1)
        chosen = (chance + inside.float()).topk(self.config.anchors, dim=1).indices
        where = views.place.flatten(1, 2).gather(1, chosen[..., None].expand(-1, -1, 2))
        base = torch.arange(count)[:, None]
        owner = base.expand_as(chosen).flatten()
        return (chosen + base * side * side).flatten(), where[:, None], owner


def normalised(images: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) in [0, 1] as the network takes them."""
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def _at(tokens: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Tokens (B, T, T, C) read between their places (B, 1, n, 2), as (B n, C) of length 1."""
    read = functional.grid_sample(tokens.permute(0, 3, 1, 2), where, padding_mode="border", align_corners=False)
    return functional.normalize(read[:, :, 0].transpose(1, 2).flatten(0, 1), dim=1)


@lru_cache(maxsize=64)
def _canvas(seed: int, number: int, size: int) -> torch.Tensor:
    return torch.from_numpy(canvas(np.random.default_rng([seed, 1, number]), size))

"""Training of MAFR: the networks under one optimiser and the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmad_cli.methods.mafr.config import TERMS, MafrConfig
from mmad_cli.methods.mafr.losses import modality_terms
from mmad_cli.methods.mafr.networks import PUBLISHED_NETWORKS, RestorationNetwork
from mmad_cli.methods.mapping.config import POINTS, RGB
from mmad_cli.methods.mapping.dense import DenseFeatures


class MafrLearner:
    """The networks under one optimiser and the loss that trains them."""

    def __init__(self, channels: Mapping[str, int], config: MafrConfig) -> None:
        self.network = RestorationNetwork(channels[RGB], channels[POINTS], config.dropout)
        self.config = config

    @property
    def groups(self) -> Mapping[str, nn.Module]:
        """One optimiser for encoder and decoders; under their published names, so that these are what is saved."""
        parts = {theirs: self.network.get_submodule(ours) for theirs, ours in PUBLISHED_NETWORKS.items()}
        return {"restoration": nn.ModuleDict(parts)}

    def backward(self, batch: Sequence[DenseFeatures]) -> dict[str, dict[str, float]]:
        """Weighted sum of the six terms, averaged over the images; one image at a time is in memory."""
        sums: dict[str, float] = {}
        for features in batch:
            terms = self.terms(features if self.config.window is None else window(features, self.config.window))
            total = torch.stack(
                [self.config.weights()[name.split("_")[0]] * term for name, term in terms.items()]
            ).sum()
            (total / len(batch)).backward()  # type: ignore[no-untyped-call]
            for name, value in {**terms, "total": total}.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) / len(batch)
        return {"restoration": sums}

    def terms(self, features: DenseFeatures) -> dict[str, Tensor]:
        """The six terms of one image, scalars, named `<term>_<modality>`."""
        given = dict(zip((RGB, POINTS), features.both(), strict=True))
        valid = features.valid if self.config.loss_mask == "valid" else None
        restored = self._restored(given[RGB], given[POINTS], valid)
        by_modality = {
            name: modality_terms(restored[name], given[name], features.side, valid, self.config.smoothness_channels)
            for name in given
        }
        return {f"{term}_{name}": by_modality[name][term] for term in TERMS for name in given}

    def _restored(self, rgb: Tensor, points: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        """Restored features of every pixel; with a mask, of valid ones, the others as given."""
        if valid is None:
            return dict(zip((RGB, POINTS), self._through(rgb, points), strict=True))
        parts = self._through(rgb[valid], points[valid])
        index = torch.nonzero(valid)[:, 0]
        return {
            name: whole.index_copy(0, index, part)
            for name, whole, part in zip((RGB, POINTS), (rgb, points), parts, strict=True)
        }

    def _through(self, rgb: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        tile = self.config.recompute_tile
        if tile is None:
            restored: tuple[Tensor, Tensor] = self.network(rgb, points)
            return restored
        parts = [
            checkpoint(self.network, *rows, use_reentrant=False)
            for rows in zip(torch.split(rgb, tile), torch.split(points, tile), strict=True)
        ]
        of_rgb, of_points = (torch.cat(column) for column in zip(*parts, strict=True))
        return of_rgb, of_points


def window(features: DenseFeatures, size: int) -> DenseFeatures:
    """A random square of `size` pixels with a valid pixel in it; all of the features when they are no larger.

    Drawn from PyTorch's current random stream.
    """
    side = features.side
    if size >= side:
        return features
    inside = torch.nonzero(features.valid)[:, 0]
    pixel = int(inside[int(torch.randint(len(inside), ()))]) if len(inside) else int(torch.randint(side * side, ()))
    top, left = (min(max(centre - size // 2, 0), side - size) for centre in divmod(pixel, side))

    def cut(table: Tensor) -> Tensor:
        image = table.reshape(side, side, -1)[top : top + size, left : left + size]
        return image.reshape(size * size, -1)

    rgb, points = features.both()
    return DenseFeatures(cut(rgb), cut(points), cut(features.valid)[:, 0], size)

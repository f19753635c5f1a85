"""One step of the training of the point network."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mmad_cli.alignment.grouping import farthest_points, group_neighbours
from mmad_cli.backbones.builtin.points import PointNetwork
from mmad_cli.pretraining.config import PointsConfig
from mmad_cli.pretraining.contrast import contrast_loss, separation
from mmad_cli.pretraining.surfaces import CELL, Scan, Surface, altered, read, scan, surface

# a group counts as altered from this change of form (mm)
_ALTERED = 0.08
_NEIGHBOURS = 3
# a place is seen in another scan when a centre lies within this many mean distances of centres
_REACH = 1.3
_ATTEMPTS = 20


@dataclass(frozen=True)
class _Grouped:
    """A scan's groups (G, M, 3), their centres (G, 3), and where those lie on the surface, (G, 2) in mm."""

    groups: NDArray[np.float32]
    centres: NDArray[np.float32]
    where: NDArray[np.float32]


@dataclass(frozen=True)
class _Patch:
    """Two scans of a surface and one of it altered; `change` (G,) at the centres of the third."""

    scans: tuple[_Grouped, _Grouped, _Grouped]
    change: NDArray[np.float32]
    # at the centres of the first scan
    own_change: NDArray[np.float32]


class PointsTask:
    """Scans of procedural surfaces and the loss of the network on them; a step depends on its number only."""

    def __init__(self, config: PointsConfig) -> None:
        self.config = config

    def network(self) -> PointNetwork:
        """A network with random weights."""
        return PointNetwork()

    def loss(
        self, network: torch.nn.Module, step: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of a step, and how well the tokens tell altered places (area under the ROC curve)."""
        config, device = self.config, next(network.parameters()).device
        patches = [self._patch(step, index) for index in range(config.patches)]
        scans = [patch.scans[view] for view in range(3) for patch in patches]
        groups = torch.from_numpy(np.stack([one.groups for one in scans])).to(device)
        centres = torch.from_numpy(np.stack([one.centres for one in scans])).to(device)
        parts = network.parts(groups, centres)  # type: ignore[operator]
        pairs = self._pairs(patches).to(device)
        change = torch.from_numpy(np.concatenate([patch.change for patch in patches]))
        broken = (change > _ALTERED).nonzero()[:, 0]
        broken = broken[torch.randperm(len(broken), generator=generator)[: config.altered]]
        broken_owner = (broken // config.groups).to(device)
        losses, told = [], []
        for part in parts:
            first, second, third = (view.flatten(0, 1) for view in part.chunk(3))
            own, other = first[pairs.anchors], _blended(second, pairs.positives)
            losses.append(
                contrast_loss(own, other, third[broken.to(device)], pairs.owners, broken_owner, config.temperature)
            )
            told.append((own, other, _blended(third, pairs.twins)))
        joined = [torch.cat(level, dim=1).detach() for level in zip(*told, strict=True)]
        return torch.stack(losses).mean(), separation(joined[0], joined[1], joined[2], pairs.altered)

    def _patch(self, step: int, index: int) -> _Patch:
        """The first patch of its own random sequence that has enough points in all scans."""
        for attempt in range(_ATTEMPTS):
            rng = np.random.default_rng([self.config.seed, 2, step, index, attempt])
            found = self._try_patch(rng)
            if found is not None:
                return found
        raise RuntimeError(f"step {step}: no surface with enough points")

    def _try_patch(self, rng: np.random.Generator) -> _Patch | None:
        config = self.config
        sound = surface(rng)
        pitch = float(np.exp(rng.uniform(np.log(0.35), np.log(0.6))))
        window = pitch * float(np.sqrt(config.groups * np.exp(rng.uniform(np.log(14), np.log(45)))))
        broken, change = altered(rng, sound, window)
        tilt = np.clip(0.3 * rng.standard_normal(2), -0.8, 0.8)
        scans = []
        for what in (sound, sound, broken):
            one = scan(rng, what, pitch * np.exp(rng.uniform(-0.06, 0.06)), window, tilt + rng.uniform(-0.08, 0.08, 2))
            if len(one.points) < max(8 * config.groups, 4 * config.group_size):
                return None
            scans.append(_grouped(one, config))
        return _Patch(
            (scans[0], scans[1], scans[2]),
            _change_at(change, sound, scans[2].where),
            _change_at(change, sound, scans[0].where),
        )

    def _pairs(self, patches: list[_Patch]) -> _Pairs:
        """The tokens of the first scans that both other scans saw as well."""
        groups = self.config.groups
        anchors, positives, twins, owners, changed = [], [], [], [], []
        for index, patch in enumerate(patches):
            first, second, third = patch.scans
            in_second, in_third = _nearest(second.where, first.where), _nearest(third.where, first.where)
            kept = np.flatnonzero(in_second.seen & in_third.seen)
            anchors.append(kept + index * groups)
            positives.append(in_second.at(kept, index * groups))
            twins.append(in_third.at(kept, index * groups))
            owners.append(np.full(len(kept), index))
            changed.append(patch.own_change[kept] > _ALTERED)
        return _Pairs(
            torch.from_numpy(np.concatenate(anchors)),
            _Blend.joined(positives),
            _Blend.joined(twins),
            torch.from_numpy(np.concatenate(owners)),
            torch.from_numpy(np.concatenate(changed)),
        )


@dataclass(frozen=True)
class _Blend:
    """Rows that make up a token between centres: indices (n, 3) and weights (n, 3)."""

    indices: torch.Tensor
    weights: torch.Tensor

    def to(self, device: torch.device) -> _Blend:
        """The same on another device."""
        return _Blend(self.indices.to(device), self.weights.to(device))

    @staticmethod
    def joined(parts: list[tuple[NDArray[np.int64], NDArray[np.float32]]]) -> _Blend:
        """Several one after the other."""
        return _Blend(
            torch.from_numpy(np.concatenate([indices for indices, _ in parts])),
            torch.from_numpy(np.concatenate([weights for _, weights in parts])),
        )


@dataclass(frozen=True)
class _Pairs:
    """Anchors int64 (N,) among the tokens of the first scans, their places in the second and in the third ones.

    owners int64 (N,): the patch of each; altered bool (N,): whether the surface is altered there in the third scan.
    """

    anchors: torch.Tensor
    positives: _Blend
    twins: _Blend
    owners: torch.Tensor
    altered: torch.Tensor

    def to(self, device: torch.device) -> _Pairs:
        """The same on another device."""
        return _Pairs(
            self.anchors.to(device),
            self.positives.to(device),
            self.twins.to(device),
            self.owners.to(device),
            self.altered.to(device),
        )


@dataclass(frozen=True)
class _Places:
    """Places of one scan's centres among those of another: nearest three, weights, and whether there are any near."""

    indices: NDArray[np.int64]
    weights: NDArray[np.float32]
    seen: NDArray[np.bool_]

    def at(self, kept: NDArray[np.int64], offset: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Some of them, counted from the first scan of the batch."""
        return self.indices[kept] + offset, self.weights[kept]


def _nearest(centres: NDArray[np.float32], where: NDArray[np.float32]) -> _Places:
    from scipy.spatial import cKDTree

    tree = cKDTree(centres)
    spacing = float(np.median(tree.query(centres, k=2)[0][:, 1]))
    distance, indices = tree.query(where, k=_NEIGHBOURS)
    inverse = 1 / (distance**2 + 1e-3)
    weights = inverse / inverse.sum(axis=1, keepdims=True)
    return _Places(indices.astype(np.int64), weights.astype(np.float32), distance[:, 0] < _REACH * spacing)


def _blended(tokens: torch.Tensor, blend: _Blend) -> torch.Tensor:
    mixed = (tokens[blend.indices] * blend.weights[..., None]).sum(dim=1)
    return torch.nn.functional.normalize(mixed, dim=1)


def _grouped(one: Scan, config: PointsConfig) -> _Grouped:
    chosen = farthest_points(one.points, config.groups, False)
    centres = one.points[chosen]
    members = group_neighbours(one.points, centres, config.group_size)
    return _Grouped(one.points[members] - centres[:, None], centres, one.nodes[chosen] * np.float32(CELL))


def _change_at(change: NDArray[np.float32], sound: Surface, where: NDArray[np.float32]) -> NDArray[np.float32]:
    return read(change, where / np.float32(CELL))

"""Patches of pseudo anomalies that the network is trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmad_cli.methods.experts import GRID, Cells, Expert, PseudoSample
from mmad_cli.types import BoolArray


@dataclass(frozen=True)
class Side:
    """One modality: distinct rows (m, C), the row of each patch (N,), and of each row its prototypes (m, k) and the
    distance to the first (m,). `bank` (M, C) are the prototypes.
    """

    rows: Tensor
    row: Tensor
    neighbours: Tensor
    nearest: Tensor
    bank: Tensor

    def first_distance(self, patches: Tensor) -> Tensor:
        """Distance of patches (b,) to their nearest prototype, (b,)."""
        return self.nearest[self.row[patches]]

    def gather(self, patches: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
        """Features (b, C) of patches and their first `ranks` prototypes (b, ranks, C), float32."""
        rows = self.row[patches]
        return self.rows[rows].float(), self.bank[self.neighbours[rows, :ranks]]


@dataclass(frozen=True)
class Pool:
    """Foreground patches of all pseudo anomalies.

    sides: RGB and points; anomalous bool (N,); group int64 (N,), the training scan of each; drawn (N,), the pseudo
    anomaly of each.
    """

    sides: tuple[Side, Side]
    anomalous: Tensor
    group: Tensor
    drawn: Tensor

    def __len__(self) -> int:
        return len(self.anomalous)


def build_pool(
    experts: Sequence[Expert],
    samples: Sequence[PseudoSample],
    labels: Callable[[PseudoSample], BoolArray],
    foreground: Callable[[Sequence[Cells]], BoolArray],
    *,
    ranks: int,
    dtype: str,
    device: str,
    progress: Callable[[int, int], None],
) -> Pool:
    """Features, prototypes and labels of the foreground patches of pseudo anomalies; background is left out.

    labels: of the 3136 cells of a pseudo anomaly; foreground: of the features of its cells.
    """
    parts: list[_Parts] = [_Parts() for _ in experts]
    anomalous, group, drawn = [], [], []
    for number, sample in enumerate(samples):
        cells = [expert.cells(sample) for expert in experts]
        front = foreground(cells)
        for expert, part, one in zip(experts, parts, cells, strict=True):
            part.add(expert, one, front, ranks, dtype)
        anomalous.append(labels(sample)[front])
        group.append(np.full(int(front.sum()), sample.position))
        drawn.append(np.full(int(front.sum()), number))
        progress(number + 1, len(samples))
    first, second = (
        part.side(torch.from_numpy(expert.bank_.rows_), device) for part, expert in zip(parts, experts, strict=True)
    )
    flags, groups, numbers = (
        torch.from_numpy(np.concatenate(values)).to(device) for values in (anomalous, group, drawn)
    )
    return Pool((first, second), flags, groups, numbers)


class _Parts:
    """One modality while it is gathered."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.row: list[Tensor] = []
        self.neighbours: list[Tensor] = []
        self.nearest: list[Tensor] = []
        self.count = 0

    def add(self, expert: Expert, cells: Cells, front: BoolArray, ranks: int, dtype: str) -> None:
        used, place = cells.under(front)
        found = expert.look_up(cells, ranks, used)
        self.rows.append(torch.from_numpy(found.rows).to(getattr(torch, dtype)))
        self.row.append(torch.from_numpy(place + self.count))
        self.neighbours.append(torch.from_numpy(found.neighbours))
        self.nearest.append(torch.from_numpy(found.distances[:, 0].copy()))
        self.count += len(used)

    def side(self, bank: Tensor, device: str) -> Side:
        parts = (self.rows, self.row, self.neighbours, self.nearest)
        rows, row, neighbours, nearest = (torch.cat(part).to(device) for part in parts)
        return Side(rows, row, neighbours, nearest, bank.to(device))


def cell_labels(sample: PseudoSample, name: str) -> BoolArray:
    """Labels (3136,) of the cells of a pseudo anomaly, from the mask beside its feature `name`."""
    from mmad_cli.pseudo.masks import patch_labels

    return patch_labels(sample.mask(name), GRID)

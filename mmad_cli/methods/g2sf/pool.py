"""Patches of pseudo anomalies that the network is trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmad_cli.methods.experts import Cells, Expert, PseudoSample
from mmad_cli.types import BoolArray, FloatArray, IndexArray


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


@dataclass(frozen=True)
class Found:
    """What one modality found in a pseudo anomaly: distinct rows (m, C), the row of each patch (n,), prototypes (m, k)
    of the rows and the distance to the first (m,).
    """

    rows: FloatArray
    row: IndexArray
    neighbours: IndexArray
    nearest: FloatArray


class PoolBuilder:
    """Gathers the pseudo anomalies one by one. dtype: how features are held."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self._sides: tuple[list[Side], list[Side]] = ([], [])
        self._counts = [0, 0]
        self._labels: list[BoolArray] = []
        self._groups: list[int] = []

    def add(self, found: Sequence[Found], label: BoolArray, group: int) -> None:
        """RGB and points of a pseudo anomaly, labels bool (n,) of its patches, and its training scan."""
        for k, (side, one) in enumerate(zip(self._sides, found, strict=True)):
            side.append(
                Side(
                    rows=torch.from_numpy(one.rows).to(getattr(torch, self.dtype)),
                    row=torch.from_numpy(one.row + self._counts[k]),
                    neighbours=torch.from_numpy(one.neighbours),
                    nearest=torch.from_numpy(one.nearest.copy()),
                    bank=torch.empty(0),
                )
            )
            self._counts[k] += len(one.rows)
        self._labels.append(label)
        self._groups.append(group)

    def build(self, banks: Sequence[FloatArray], device: str) -> Pool:
        """All of them, with the prototypes (M, C) of both modalities."""
        first, second = (
            _joined(parts, torch.from_numpy(bank), device) for parts, bank in zip(self._sides, banks, strict=True)
        )
        sizes = [len(label) for label in self._labels]
        group, drawn = np.repeat(self._groups, sizes), np.repeat(np.arange(len(sizes)), sizes)
        flags, groups, numbers = (
            torch.from_numpy(values).to(device) for values in (np.concatenate(self._labels), group, drawn)
        )
        return Pool((first, second), flags, groups, numbers)


def _joined(parts: Sequence[Side], bank: Tensor, device: str) -> Side:
    return Side(
        rows=torch.cat([part.rows for part in parts]).to(device),
        row=torch.cat([part.row for part in parts]).to(device),
        neighbours=torch.cat([part.neighbours for part in parts]).to(device),
        nearest=torch.cat([part.nearest for part in parts]).to(device),
        bank=bank.to(device),
    )


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
    builder = PoolBuilder(dtype)
    for number, sample in enumerate(samples):
        cells = [expert.cells(sample) for expert in experts]
        front = foreground(cells)
        builder.add(
            [_found(expert, one, front, ranks) for expert, one in zip(experts, cells, strict=True)],
            labels(sample)[front],
            sample.position,
        )
        progress(number + 1, len(samples))
    return builder.build([expert.bank_.rows_ for expert in experts], device)


def _found(expert: Expert, cells: Cells, front: BoolArray, ranks: int) -> Found:
    used, row = cells.under(front)
    found = expert.look_up(cells, ranks, used)
    return Found(found.rows, row, found.neighbours, found.distances[:, 0])

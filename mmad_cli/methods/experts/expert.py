"""One expert: a memory bank of its source's features, and what it says of a scan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from mmad_cli.errors import DataError
from mmad_cli.methods.base import BankSize, FeatureSet, ProgressCallback, SampleFeatures
from mmad_cli.methods.experts.sources import Cells, Source
from mmad_cli.types import BoolArray, FloatArray, IndexArray

if TYPE_CHECKING:
    from mmad_cli.memory import BankConfig, MemoryBank

Foreground = Callable[[SampleFeatures], BoolArray]


@dataclass(frozen=True)
class Lookup:
    """Rows against the bank: `rows` float32 (m, C) on its scale, the k nearest prototypes `neighbours` int64 (m, k) and
    their `distances` float32 (m, k), nearest first.

    A bank of fewer than k rows repeats the last one.
    """

    rows: FloatArray
    neighbours: IndexArray
    distances: FloatArray


def bank_selection(fraction: float, eps: float, dtype: Literal["float16", "float32"]) -> BankConfig:
    """A greedy coreset by a sparse projection; all rows for a fraction of 1."""
    from mmad_cli.memory import BankConfig

    coreset: Literal["greedy", "all"] = "greedy" if fraction < 1 else "all"
    return BankConfig(fraction=fraction, eps=eps, projection="sparse", coreset=coreset, coreset_dtype=dtype)


class Expert:
    """A memory bank on one source. Fitted: `bank_`."""

    bank_: MemoryBank

    def __init__(self, source: Source, selection: BankConfig, device: str = "cpu") -> None:
        self.source, self.selection, self.device = source, selection, device

    def fit(
        self,
        train: FeatureSet,
        *,
        stream: np.random.RandomState,
        foreground: Foreground | None = None,
        progress: ProgressCallback | None = None,
    ) -> None:
        """Select the bank from the rows of good samples, goes through them three times.

        foreground: gives the cells of a sample whose rows take part, bool (3136,); all do without. Raises DataError
        without samples or rows, and for a sample with another number of channels.
        """
        from mmad_cli.memory import MemoryBank, scalar_moments

        if len(train) == 0:
            raise DataError("there are no training samples; a memory bank needs at least one good sample")
        count = channels = 0

        def counted() -> Iterator[FloatArray]:
            nonlocal count, channels
            for block in blocks():
                count, channels = count + len(block), block.shape[1]
                yield block

        blocks = partial(self._blocks, train, foreground)
        mean, std = 0.0, 1.0
        if self.source.standardise:
            mean, std = scalar_moments(counted)
        else:
            for _ in counted():
                pass
        if not count:
            raise DataError(f"no training sample has a foreground for feature {self.source.name!r}")
        bank = MemoryBank(self.selection)
        bank.fit(
            blocks,
            count,
            channels,
            random_state=stream,
            device=self.device,
            progress=progress,
            mean=mean,
            std=std if std > 0 else 1.0,
        )
        self.bank_ = bank

    def look_up(self, cells: Cells, count: int = 1, used: IndexArray | None = None) -> Lookup:
        """The `count` nearest prototypes of each row of a scan, or of the rows `used` (k,)."""
        rows = self.bank_.normalise(cells.rows if used is None else cells.rows[used])
        if not len(rows):
            return Lookup(rows, np.zeros((0, count), dtype=np.int64), np.zeros((0, count), dtype=np.float32))
        found = min(count, len(self.bank_.rows_))
        distances, neighbours = self.bank_.nearest(rows, found)
        if found < count:
            pad = ((0, 0), (0, count - found))
            distances, neighbours = np.pad(distances, pad, mode="edge"), np.pad(neighbours, pad, mode="edge")
        return Lookup(rows, neighbours, distances)

    def cells(self, sample: SampleFeatures) -> Cells:
        """Features of a scan; DataError naming it when it has other channels than the bank."""
        cells = self.source.cells(sample)
        if hasattr(self, "bank_") and cells.rows.shape[1] != self.bank_.rows_.shape[1]:
            raise DataError(
                f"{sample.id}: feature {self.source.name!r} has {cells.rows.shape[1]} channels, the bank "
                f"{self.bank_.rows_.shape[1]}; fit again with the same features"
            )
        return cells

    def score_map(self, sample: SampleFeatures) -> FloatArray:
        """Distance of each cell to the nearest prototype, float32 (3136,), in the unit of the features."""
        cells = self.cells(sample)
        distances: FloatArray = self.look_up(cells).distances[cells.row, 0]
        return distances

    def prototypes(self, neighbours: IndexArray) -> FloatArray:
        """Features (..., C) of prototypes by their numbers (...)."""
        rows: FloatArray = self.bank_.rows_[neighbours]
        return rows

    @property
    def size(self) -> BankSize:
        """Of the bank."""
        rows, dim = self.bank_.rows_.shape
        return BankSize(rows=int(rows), dim=int(dim))

    def save(self, folder: Path) -> None:
        """Write the bank as one file into a folder."""
        self.bank_.save(self.file(folder))

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        from mmad_cli.memory import MemoryBank

        self.bank_ = MemoryBank.load(self.file(folder), self.device)

    def file(self, folder: Path) -> Path:
        """The bank's file in a folder."""
        return folder / f"bank_{self.source.name}.safetensors"

    def _blocks(self, train: FeatureSet, foreground: Foreground | None) -> Iterator[FloatArray]:
        channels = 0
        for sample in train:
            cells = self.source.cells(sample)
            channels = channels or cells.rows.shape[1]
            if cells.rows.shape[1] != channels:
                raise DataError(
                    f"{sample.id}: feature {self.source.name!r} has {cells.rows.shape[1]} channels, others {channels}"
                )
            yield cells.rows if foreground is None else cells.rows[cells.under(foreground(sample))[0]]

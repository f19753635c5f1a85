"""Several experts together: their banks, and what they say of a scan in a form that the store can keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmad_cli.errors import DataError
from mmad_cli.methods.base import BankSize, FeatureSet, LookedAt, ProgressCallback, SampleFeatures
from mmad_cli.methods.experts.expert import Expert
from mmad_cli.methods.experts.pseudo import PseudoSample, pseudo_name
from mmad_cli.methods.experts.sources import CELLS, GRID, Cells, Source
from mmad_cli.types import BoolArray, FloatArray, IndexArray

if TYPE_CHECKING:
    from mmad_cli.memory import BankConfig
    from mmad_cli.pseudo.config import Augmentation

LOOK = "look"
"""Name of the look at a scan; that at its pseudo anomaly i is `look_pseudo<i>`."""

RANKS = 11
"""Prototypes that a look keeps of each row: the nearest and the ten after it, which G2SF trains with."""


@dataclass(frozen=True)
class Look:
    """One expert's look at the foreground of a scan.

    used (m,): the distinct rows of its cells that lie under the foreground; row (n,): for each foreground cell the
    position of its row in `used`; neighbours (m, RANKS) and distances float32 (m, RANKS), nearest first.
    """

    used: IndexArray
    row: IndexArray
    neighbours: IndexArray
    distances: FloatArray


@dataclass(frozen=True)
class Scan:
    """What the experts say of a scan.

    scores float32 (K, 3136), the distances to the nearest prototypes, 0 in the background unless it was asked for;
    front bool (3136,), the foreground; looks: of each expert. label bool (3136,): damaged cells of a pseudo anomaly.
    """

    id: str
    scores: FloatArray
    front: BoolArray
    looks: tuple[Look, ...]
    label: BoolArray | None = None

    def labels(self) -> BoolArray:
        """Labels (3136,) of a pseudo anomaly. Raises ValueError for another scan."""
        if self.label is None:
            raise ValueError(f"scan: {self.id} must be a pseudo anomaly")
        return self.label

    def arrays(self) -> dict[str, NDArray[Any]]:
        """As arrays for the store."""
        out: dict[str, NDArray[Any]] = {"scores": self.scores, "front": self.front}
        if self.label is not None:
            out["label"] = self.label
        for k, look in enumerate(self.looks):
            out[f"used{k}"], out[f"row{k}"] = look.used.astype(np.int32), look.row.astype(np.int32)
            out[f"neighbours{k}"], out[f"distances{k}"] = look.neighbours.astype(np.int32), look.distances
        return out

    @classmethod
    def from_arrays(cls, id: str, arrays: Mapping[str, NDArray[Any]]) -> Scan:
        """What `arrays` made."""
        looks = tuple(
            Look(
                used=arrays[f"used{k}"].astype(np.int64),
                row=arrays[f"row{k}"].astype(np.int64),
                neighbours=arrays[f"neighbours{k}"].astype(np.int64),
                distances=arrays[f"distances{k}"],
            )
            for k in range(len(arrays["scores"]))
        )
        return cls(id, arrays["scores"], arrays["front"], looks, arrays.get("label"))


class Panel:
    """Experts that look at the same scans. Fitted: `experts_`.

    bank_rows `foreground`: only rows with a point under them enter the banks. background: cells without a point are
    scored too. A stage may fit it once for several configurations of a method and keep what it says (`HasExperts`).
    """

    experts_: list[Expert]

    def __init__(
        self,
        sources: Sequence[Source],
        selection: BankConfig,
        augmentations: Sequence[Augmentation] = (),
        *,
        bank_rows: str = "foreground",
        background: bool = False,
        device: str = "cpu",
    ) -> None:
        self.sources, self.selection, self.device = tuple(sources), selection, device
        self.augmentations = tuple(augmentations)
        self.bank_rows, self.background = bank_rows, background

    def settings(self) -> dict[str, Any]:
        """All that changes what the experts say, beside seed and features."""
        return {
            "experts": [source.name for source in self.sources],
            "selection": self.selection.model_dump(mode="json"),
            "bank_rows": self.bank_rows,
            "background": self.background,
            "ranks": RANKS,
        }

    def looks(self) -> dict[str, tuple[str, ...]]:
        """Features that each look reads, by the name of the look; the first is that at the scan itself."""
        names = [source.name for source in self.sources]
        return {
            LOOK: tuple(names),
            **{pseudo_name(LOOK, a.index): tuple(pseudo_name(n, a.index) for n in names) for a in self.augmentations},
        }

    def fit(self, train: FeatureSet, *, seed: int, progress: ProgressCallback | None = None) -> None:
        """Select all banks; their projections are drawn in turn from one stream that `seed` starts.

        Raises DataError without training samples or without a foreground.
        """
        if len(train) == 0:
            raise DataError("there are no training samples; a memory bank needs at least one good sample")
        stream = np.random.RandomState(seed)
        experts = self._experts()
        known: dict[str, BoolArray] = {}

        def front(sample: SampleFeatures) -> BoolArray:
            if sample.id not in known:
                known[sample.id] = foreground(experts, [expert.cells(sample) for expert in experts])
            return known[sample.id]

        for done, expert in enumerate(experts):
            expert.fit(train, stream=stream, foreground=front if self.bank_rows == "foreground" else None)
            if progress is not None:
                progress(done + 1, len(experts))
        self.experts_ = experts

    def look(self, sample: SampleFeatures, name: str = LOOK) -> dict[str, NDArray[Any]]:
        """What the experts say of a scan, or of one of its pseudo anomalies, as arrays."""
        if name == LOOK:
            return self._scan(sample).arrays()
        index = next(a.index for a in self.augmentations if pseudo_name(LOOK, a.index) == name)
        return self._scan(PseudoSample(sample, index, 0)).arrays()

    def scan(self, sample: SampleFeatures) -> Scan:
        """What the experts say of a scan or pseudo anomaly: as the stage has it, else computed."""
        plain, name = sample, LOOK
        if isinstance(sample, PseudoSample):
            plain, name = sample.sample, pseudo_name(LOOK, sample.index)
        if isinstance(plain, LookedAt):
            return Scan.from_arrays(plain.id, plain.look(name))
        return self._scan(sample)

    def rows(self, sample: SampleFeatures, scan: Scan, expert: int) -> FloatArray:
        """Features (m, C) that an expert looked up, on the scale of its bank."""
        one = self.experts_[expert]
        rows: FloatArray = one.bank_.normalise(one.cells(sample).rows[scan.looks[expert].used])
        return rows

    def banks(self) -> list[FloatArray]:
        """Prototypes (M, C) of each expert."""
        return [expert.bank_.rows_ for expert in self.experts_]

    @property
    def sizes(self) -> dict[str, BankSize]:
        """Of the banks. Raises RuntimeError before `fit` or `load`."""
        if not hasattr(self, "experts_"):
            raise RuntimeError("the experts are not fitted; call fit or load first")
        return {expert.source.name: expert.size for expert in self.experts_}

    def save(self, folder: Path) -> None:
        """Write a file per bank."""
        for expert in self.experts_:
            expert.save(folder)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        experts = self._experts()
        for expert in experts:
            expert.load(folder)
        self.experts_ = experts

    def saved_in(self, folder: Path) -> bool:
        """Whether a folder has the banks."""
        return all(expert.file(folder).is_file() for expert in self._experts())

    def _experts(self) -> list[Expert]:
        return [Expert(source, self.selection, self.device) for source in self.sources]

    def _scan(self, sample: SampleFeatures) -> Scan:
        cells = [expert.cells(sample) for expert in self.experts_]
        front = foreground(self.experts_, cells)
        scores = np.zeros((len(cells), CELLS), dtype=np.float32)
        looks = []
        for k, (expert, one) in enumerate(zip(self.experts_, cells, strict=True)):
            used, row = one.under(front)
            found = expert.look_up(one, RANKS, used)
            looks.append(Look(used, row, found.neighbours, found.distances))
            scores[k, front] = found.distances[row, 0]
            if self.background and not front.all():
                behind, place = one.under(~front)
                scores[k, ~front] = expert.look_up(one, 1, behind).distances[place, 0]
        label = cell_labels(sample, self.sources[0].name) if isinstance(sample, PseudoSample) else None
        return Scan(sample.id, scores, front, tuple(looks), label)


def foreground(experts: Sequence[Expert], cells: Sequence[Cells]) -> BoolArray:
    """Cells bool (3136,) with a point under them, as any expert on points has it; all without such an expert."""
    filled = [one.filled for expert, one in zip(experts, cells, strict=True) if expert.source.of_points]
    if not filled:
        return np.ones(CELLS, dtype=bool)
    return np.asarray(np.logical_or.reduce(filled))


def cell_labels(sample: PseudoSample, name: str) -> BoolArray:
    """Labels (3136,) of the cells of a pseudo anomaly, from the mask beside its feature `name`."""
    from mmad_cli.pseudo.masks import patch_labels

    return patch_labels(sample.mask(name), GRID)

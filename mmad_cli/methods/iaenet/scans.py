"""What the experts say of a scan: scores on 56 x 56 cells, and what they come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mmad_cli.errors import DataError
from mmad_cli.methods.base import ProgressCallback, SampleFeatures
from mmad_cli.methods.experts import CELLS, GRID, Cells, Expert, Lookup, Normaliser, PseudoSample
from mmad_cli.types import BoolArray, FloatArray, IndexArray


@dataclass(frozen=True)
class Look:
    """One expert's look at the foreground: distinct rows and their nearest prototype, and the row under each cell."""

    found: Lookup
    place: IndexArray

    @property
    def distances(self) -> FloatArray:
        """Of the foreground cells, (n,)."""
        distances: FloatArray = self.found.distances[self.place, 0]
        return distances


@dataclass(frozen=True)
class Scan:
    """scores float32 (K, 3136), the distances to the nearest prototypes; front bool (3136,), the foreground.

    Scores of background cells are 0, unless they were asked for. looks: of each expert; empty where only scores are
    kept.
    """

    id: str
    scores: FloatArray
    front: BoolArray
    looks: tuple[Look, ...] = ()


@dataclass(frozen=True)
class PseudoScan:
    """A pseudo anomaly: label bool (3136,) of its cells, and the number of the training sample that it is made from."""

    scan: Scan
    label: BoolArray
    group: int


def foreground(experts: Sequence[Expert], cells: Sequence[Cells]) -> BoolArray:
    """Cells bool (3136,) with a point under them, as any expert on points has it; all without such an expert."""
    filled = [one.filled for expert, one in zip(experts, cells, strict=True) if expert.source.of_points]
    if not filled:
        return np.ones(CELLS, dtype=bool)
    return np.asarray(np.logical_or.reduce(filled))


def look(experts: Sequence[Expert], sample: SampleFeatures, *, background: bool = False, features: bool = True) -> Scan:
    """Look a scan up in all banks. background: scores of background cells too; features: keep the looks."""
    cells = [expert.cells(sample) for expert in experts]
    front = foreground(experts, cells)
    scored = np.ones(CELLS, dtype=bool) if background else front
    scores = np.zeros((len(experts), CELLS), dtype=np.float32)
    looks = []
    for k, (expert, one) in enumerate(zip(experts, cells, strict=True)):
        used, place = one.under(scored)
        if len(used):
            scores[k, scored] = (at := Look(expert.look_up(one, 1, used), place)).distances
            looks.append(Look(at.found, at.place[front[scored]]))
    return Scan(sample.id, scores, front, tuple(looks) if features else ())


def look_at_pseudo(
    experts: Sequence[Expert],
    samples: Sequence[PseudoSample],
    *,
    features: bool,
    progress: ProgressCallback | None = None,
) -> Iterator[PseudoScan]:
    """Pseudo anomalies with their labels, those without foreground left out."""
    from mmad_cli.methods.g2sf.pool import cell_labels

    for done, sample in enumerate(samples, start=1):
        scan = look(experts, sample, features=features)
        if scan.front.any():
            yield PseudoScan(scan, cell_labels(sample, experts[0].source.name), sample.position)
        if progress is not None:
            progress(done, len(samples))


@dataclass(frozen=True)
class Calibration:
    """Scores of the experts on good patches that are in no bank: (n, K) of each scan."""

    scores: tuple[FloatArray, ...]

    @classmethod
    def of(cls, scans: Sequence[Scan] | Sequence[PseudoScan]) -> Calibration:
        """From good scans, or from the undamaged patches of pseudo anomalies. Raises DataError without a patch."""
        parts = []
        for one in scans:
            scan, good = (one, one.front) if isinstance(one, Scan) else (one.scan, one.scan.front & ~one.label)
            if good.any():
                parts.append(np.ascontiguousarray(scan.scores[:, good].T))
        if not parts:
            raise DataError(
                "there is no validation sample with a foreground to compare the scores of the experts on; add some "
                "to validation/good, or take undamaged patches of pseudo anomalies with --set normaliser_on=pseudo"
            )
        return cls(tuple(parts))

    @property
    def patches(self) -> FloatArray:
        """Of all scans, (N, K)."""
        return np.concatenate(self.scores)

    @property
    def largest(self) -> FloatArray:
        """Of each scan, (n, K)."""
        return np.stack([one.max(axis=0) for one in self.scores])


def normalised(scores: FloatArray, normalisers: Sequence[Normaliser]) -> FloatArray:
    """Scores (K, P) of the experts on one scale, not below 0; cells that no expert scored stay 0."""
    scaled = np.stack([normaliser(one) for normaliser, one in zip(normalisers, scores, strict=True)])
    return np.asarray(np.where(scores.any(axis=0), np.maximum(scaled, 0), 0), dtype=np.float32)


__all__ = ["CELLS", "GRID", "Calibration", "Look", "PseudoScan", "Scan", "foreground", "look", "look_at_pseudo"]

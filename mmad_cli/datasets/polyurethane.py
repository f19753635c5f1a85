"""The polyurethane cutting set (3D only), as CMDR-IAD prepares it (arXiv 2603.03939, released code).

    <root>/<category>/<scan>.ply

Laser scans of cutting edges of large polyurethane parts, one PLY file per scan, without images. Consecutive runs of
9216 points are the samples; the rest of a scan is dropped. Nobody labelled them: an Isolation Forest marks points of
the whole scan, a chunk is anomalous if at least a share of 0.0025 of its points is marked, and the marked points are
the ground truth, also those in normal chunks. A tenth of the normal chunks, drawn with a fixed seed, and all anomalous
ones are the test split.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmad_cli.datasets.base import Examination, Finding, Listing, Modality, ScanLabels, raise_errors
from mmad_cli.datasets.scan import Unusable
from mmad_cli.errors import DataError, UsageError
from mmad_cli.types import GOOD, FloatArray, Sample, SampleRef, Split

NAME = "polyurethane"
ANOMALOUS = "anomalous"
PATTERN = "*.[pP][lL][yY]"

LAYOUT = "<root>/<category>/<scan>.ply (polyurethane cutting set)"

Level = Literal["low", "high"]
# The share of points that is marked
LEVELS: dict[Level, float] = {"low": 1e-4, "high": 1.5e-4}

# What marks them
Marker = Literal["isolation_forest", "lof"]
MARKERS: tuple[Marker, ...] = ("isolation_forest", "lof")


@dataclass(frozen=True)
class PolyurethaneDataset:
    """Folders of PLY scans; `only` restricts it to one of them.

    level: how many points are marked as anomalous; marker: by an Isolation Forest or by local outlier factors;
    chunk_points: points per sample, a square number. The published numbers are for `low`, the forest and 9216; the
    released code also knows `high`, the factors and 4096.
    """

    root: Path
    only: str | None = None
    level: Level = "low"
    chunk_points: int = 9216
    marker: Marker = "isolation_forest"
    name: str = field(default=NAME, init=False)
    layout: str = field(default=NAME, init=False)
    modalities: tuple[Modality, ...] = field(default=("3d",), init=False)
    own_background: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise UsageError(f"level {self.level!r}: should be {' or '.join(LEVELS)}")
        if self.marker not in MARKERS:
            raise UsageError(f"marker {self.marker!r}: should be {' or '.join(MARKERS)}")
        if self.chunk_points < 1 or math.isqrt(self.chunk_points) ** 2 != self.chunk_points:
            raise UsageError(f"chunk_points {self.chunk_points}: should be a square number such as 9216")

    def departures(self) -> list[str]:
        """Another level, marker or size of chunks than the published ones."""
        default = PolyurethaneDataset(self.root)
        return [
            f"{name}: {getattr(self, name)} instead of the published {getattr(default, name)}"
            for name in ("level", "chunk_points", "marker")
            if getattr(self, name) != getattr(default, name)
        ]

    def categories(self) -> list[str]:
        """Folders that hold PLY files, sorted; or the only one."""
        if self.only is not None:
            return [self.only]
        return sorted(folder.name for folder in _folders(self.root) if _scans(folder))

    def samples(self, category: str) -> list[SampleRef]:
        """Train and test samples, each by defect, then stem. DataError names scans that cannot be read.

        Computes the labels of all scans; the stages keep them in the store.
        """
        listing = self.list_samples(category)
        raise_errors(listing.findings)
        return list(listing.refs)

    def list_samples(self, category: str) -> Listing:
        """As `samples`, but collects what is wrong. Raises DataError where the category does not exist."""
        labels: dict[Path, ScanLabels] = {}
        findings: list[Finding] = []
        for path in self.scan_files(category):
            try:
                labels[path] = _labels_in_state(path, _state(path), LEVELS[self.level], self.marker)
            except Unusable as problem:
                findings.append(Finding("error", category, str(path), problem.message, problem.advice))
        listing = self.list_labelled(category, labels)
        return Listing(listing.refs, (*findings, *listing.findings))

    def scan_files(self, category: str) -> list[Path]:
        """PLY files of a category by name. Raises DataError where the category does not exist."""
        folder = self.root / category
        if category not in self.categories() or not folder.is_dir():
            raise DataError(f"{folder}: there is no such category; known: {', '.join(self.categories()) or 'none'}")
        return _scans(folder)

    def labelling(self) -> dict[str, Any]:
        """What decides which points are marked."""
        from mmad_cli.preprocessing.chunks import NEIGHBOURS, SEED, TREES

        if self.marker == "lof":
            return {"algorithm": "lof", "neighbours": NEIGHBOURS, "contamination": LEVELS[self.level]}
        return {"algorithm": "isolation forest", "trees": TREES, "seed": SEED, "contamination": LEVELS[self.level]}

    def label_scan(self, path: Path) -> ScanLabels:
        """Mark the points of one scan. Raises DataError naming the file."""
        try:
            return _labels_in_state(path, _state(path), LEVELS[self.level], self.marker)
        except Unusable as problem:
            raise DataError(f"{problem.path}: {problem.message}; {problem.advice}") from problem

    def list_labelled(self, category: str, labels: Mapping[Path, ScanLabels]) -> Listing:
        """The chunks of the scans that `labels` has, split into train and test."""
        from mmad_cli.preprocessing.chunks import ANOMALOUS_SHARE, drawn_positions

        size = self.chunk_points
        findings: list[Finding] = []
        chunks: list[tuple[Path, int, list[int]]] = []
        for path in self.scan_files(category):
            if path not in labels:
                continue
            if labels[path].points < size:
                message = f"has {labels[path].points} points and is left out: a sample has {size}"
                findings.append(Finding("warning", category, str(path), message))
            marked = labels[path].marked
            for start in range(0, labels[path].points - size + 1, size):
                first, last = np.searchsorted(marked, [start, start + size])
                chunks.append((path, start, [int(index) - start for index in marked[first:last]]))
        normal = [i for i, (_, _, marked) in enumerate(chunks) if len(marked) / size < ANOMALOUS_SHARE]
        tested = {normal[position] for position in drawn_positions(len(normal))}
        refs = []
        for index, (path, start, inside) in enumerate(chunks):
            good = len(inside) / size < ANOMALOUS_SHARE
            split: Split = "train" if good and index not in tested else "test"
            part = {"start": start, "points": size, "marked": inside}
            stem = f"{path.stem}-{start // size:04d}"
            refs.append(SampleRef(category, split, GOOD if good else ANOMALOUS, stem, {"xyz": path}, part))
        refs.sort(key=lambda ref: (ref.split == "test", ref.defect, ref.stem))
        if refs:
            what = "an Isolation Forest" if self.marker == "isolation_forest" else "local outlier factors"
            message = f"good and anomalous were told apart by {what}, not by people"
            advice = "metrics say how well a method agrees with that"
            findings.append(Finding("warning", category, str(self.root / category), message, advice))
        return Listing(tuple(refs), tuple(findings))

    def read(self, ref: SampleRef) -> Sample:
        """Cut one chunk out of its scan. Raises DataError naming the file."""
        examination = self.examine(ref)
        raise_errors(examination.findings)
        if examination.sample is None:
            raise DataError(f"{ref.category}/{ref.id}: cannot be read")
        return examination.sample

    def examine(self, ref: SampleRef) -> Examination:
        """As `read`, but tells what is wrong instead of raising. The image is black: there is none."""
        from mmad_cli.preprocessing.chunks import normalised_grid

        path = ref.files["xyz"]
        start, size = ref.part["start"], ref.part["points"]
        try:
            points = _points_in_state(path, _state(path))[start : start + size]
            if len(points) < size:
                raise Unusable(path, f"has no points {start} to {start + size - 1} any more", "run the command again")
        except Unusable as problem:
            return Examination(None, (Finding("error", ref.category, str(path), problem.message, problem.advice),))
        xyz = normalised_grid(points)
        marked = np.zeros(size, dtype=bool)
        marked[ref.part["marked"]] = True
        grid = xyz.shape[:2]
        return Examination(
            Sample(
                category=ref.category,
                split=ref.split,
                defect=ref.defect,
                stem=ref.stem,
                rgb=np.zeros((*grid, 3), dtype=np.uint8),
                xyz=xyz,
                mask=marked.reshape(grid),
                background=np.zeros(grid, dtype=bool),
            )
        )


def detect(folder: Path) -> PolyurethaneDataset | None:
    """The dataset in `folder`, which is a root or one folder of scans; None where there are no PLY files."""
    if _scans(folder):
        return PolyurethaneDataset(folder.parent, folder.name)
    if any(_scans(child) for child in _folders(folder)):
        return PolyurethaneDataset(folder)
    return None


def _folders(folder: Path) -> list[Path]:
    return [child for child in sorted(folder.iterdir()) if child.is_dir() and not child.name.startswith(".")]


def _scans(folder: Path) -> list[Path]:
    # glob, since folders that may not be listed hold no scans for us
    return sorted(path for path in folder.glob(PATTERN) if not path.name.startswith("."))


def _state(path: Path) -> tuple[int, ...]:
    try:
        state = path.stat()
    except OSError as error:
        raise Unusable(path, f"cannot be read ({error.strerror})", "check the file and its permissions") from error
    return (state.st_size, state.st_mtime_ns, state.st_ctime_ns)


# the chunks of a scan are read one after the other, and a text file of a million points takes a second to read
@lru_cache(maxsize=2)
def _points_in_state(path: Path, state: tuple[int, ...]) -> FloatArray:
    from mmad_cli.datasets.ply import read_points

    points = read_points(path)
    points.setflags(write=False)
    return points


@lru_cache(maxsize=1024)
def _labels_in_state(path: Path, state: tuple[int, ...], contamination: float, marker: Marker) -> ScanLabels:
    from mmad_cli.preprocessing import chunks

    points = _points_in_state(path, state)
    mark = chunks.outlying_points if marker == "lof" else chunks.isolated_points
    marked = mark(points, contamination) if len(points) else np.zeros(0, dtype=np.int64)
    return ScanLabels(len(points), marked)

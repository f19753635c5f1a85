"""Run folders on disk: finding them, loading them, and the per-sample scores beside the summary."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from mmad_cli.errors import DataError
from mmad_cli.files import atomic_write
from mmad_cli.results.schema import SUMMARY, RunResult

SCORES = "scores.csv"


class SampleScore(NamedTuple):
    """One test sample: id (`test/<defect>/<stem>`), defect, label (0 good, 1 defective), image score."""

    id: str
    defect: str
    label: int
    image_score: float


def find_runs(root: Path) -> list[Path]:
    """Run folders at or below `root`, sorted by path; empty when there are none or no such folder."""
    return sorted(file.parent for file in root.rglob(SUMMARY) if file.is_file())


def load_runs(paths: Iterable[Path | str]) -> list[RunResult]:
    """Read runs from their folders or summary files, each file once.

    Raises DataError naming the first file that is missing or invalid.
    """
    files = {(Path(path) / SUMMARY if Path(path).is_dir() else Path(path)).resolve(): path for path in paths}
    return [RunResult.from_disk(path) for path in files.values()]


def write_scores(path: Path, scores: Sequence[SampleScore]) -> None:
    """Write `scores.csv` atomically. Scores are written so that reading gives the same float64.

    Raises ValueError for a score that is not finite.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(SampleScore._fields)
    for row in scores:
        score = float(row.image_score)
        if not math.isfinite(score):
            raise ValueError(f"scores: image_score of {row.id!r} should be finite, got {score}")
        writer.writerow([row.id, row.defect, int(row.label), repr(score)])
    atomic_write(path, text.getvalue().encode("utf-8", errors="surrogateescape"))


def read_scores(path: Path) -> list[SampleScore]:
    """Read `scores.csv`; DataError naming the file and line when it is missing or malformed."""
    try:
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as stream:
            header, *rows = list(csv.reader(stream)) or [[]]
    except (OSError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if tuple(header) != SampleScore._fields:
        raise DataError(f"{path}: header should be {','.join(SampleScore._fields)!r}, got {','.join(header)!r}")
    return [_parse_score(path, number, row) for number, row in enumerate(rows, start=2)]


def _parse_score(path: Path, line: int, row: list[str]) -> SampleScore:
    try:
        name, defect, label, score = row
        return SampleScore(name, defect, int(label), float(score))
    except ValueError as error:
        raise DataError(f"{path}: line {line}: {error}") from error

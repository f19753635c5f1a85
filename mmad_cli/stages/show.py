"""One sample of a run as a picture."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mmad_cli.errors import DataError, UsageError, unknown_name
from mmad_cli.results.reference import match_category
from mmad_cli.results.runs import SCORES, SampleScore, read_scores
from mmad_cli.results.schema import RunResult
from mmad_cli.stages.pictures import RunPictures
from mmad_cli.stages.session import Session
from mmad_cli.store.store import safe_name

if TYPE_CHECKING:
    from mmad_cli.reports.html import Scene
    from mmad_cli.reports.picture import MapTile


class Shown(NamedTuple):
    """What there is to show of a sample; `missing` says what there is not and how to get it."""

    category: str
    scene: Scene | None
    heat: MapTile | None
    texts: list[str]
    missing: list[str]


def newest_run_with(folders: Iterable[Path], sample: str) -> Path | None:
    """The run that was made last of those that have a test sample; without such a run, the last of all.

    Folders that cannot be read do not count.
    """
    found: list[tuple[bool, datetime, Path]] = []
    for folder in folders:
        try:
            run = RunResult.from_disk(folder)
            has = any(_has(folder, name, sample) for name, one in run.categories.items() if one.status == "ok")
        except DataError:
            continue
        found.append((has, run.created, folder))
    return max(found)[2] if found else None


def _has(folder: Path, category: str, sample: str) -> bool:
    return any(row.id == sample for row in read_scores(folder / safe_name(category) / SCORES))


def show_sample(
    session: Session, folder: Path, sample: str, *, category: str | None = None, data: Path | None = None
) -> Shown:
    """Scan, map and score of a test sample, from the run or the store, and from the dataset.

    Raises UsageError, with the near names, for a category or sample that the run does not have and where several
    categories have it; DataError when there is neither a map nor a scan.
    """
    from mmad_cli.reports.picture import MapTile

    folder = folder.parent if folder.is_file() else folder
    run = RunResult.from_disk(folder)
    name, scores = _find(run, folder, sample, category)
    pictures = RunPictures(session, run, folder, data)
    scene, heat = pictures.scene(name, sample), pictures.anomaly_map(name, sample)
    missing = (
        [note.replace("report --format html", "show") for note in pictures.notes([name])]
        if not (scene and heat)
        else []
    )
    if scene is None and heat is None:
        raise DataError(f"{folder}: nothing to show of {name} {sample}. {' '.join(missing)}")
    tile = None
    if heat is not None:
        found = [pictures.anomaly_map(name, other.id) for other in scores]
        maps = [each.values for each in found if each is not None]
        # The colours mean the same in all pictures of a category
        tile = MapTile(heat.values, float(min(m.min() for m in maps)), float(max(m.max() for m in maps)))
    shown = next(score for score in scores if score.id == sample)
    return Shown(name, scene, tile, _texts(run, name, shown, scores), missing)


def _find(run: RunResult, folder: Path, sample: str, category: str | None) -> tuple[str, list[SampleScore]]:
    names = [name for name, result in run.categories.items() if result.status == "ok"]
    if category is not None:
        match = match_category(category, run.categories)
        if match is None:
            raise unknown_name("category", category, run.categories, "--category")
        if match not in names:
            raise DataError(f"{folder}: {match} failed: {run.categories[match].error}")
        names = [match]
    if not names:
        raise DataError(f"{folder}: no category of the run has a result")
    scores = {name: read_scores(folder / safe_name(name) / SCORES) for name in names}
    having = [name for name, rows in scores.items() if any(row.id == sample for row in rows)]
    if not having:
        known = {row.id for rows in scores.values() for row in rows}
        raise unknown_name("sample", sample, known, "SAMPLE")
    if len(having) > 1:
        raise UsageError(f"SAMPLE {sample}: {', '.join(having)} have one; choose with --category")
    return having[0], scores[having[0]]


def _texts(run: RunResult, category: str, shown: SampleScore, scores: list[SampleScore]) -> list[str]:
    method = f"{run.method.shown} {run.method.variant} ({run.method.recipe}) on {run.dataset.name}, seed {run.seed}"
    return [
        f"{category}  {shown.id}  image score {shown.image_score:.4g}",
        _place(shown, scores),
        f"{method}, run {run.run_id}",
    ]


def _place(shown: SampleScore, scores: list[SampleScore]) -> str:
    """Where the score lies among those of the category: what makes it a hit, a miss or a false alarm."""
    good = [row.image_score for row in scores if row.label == 0 and row.id != shown.id]
    bad = [row.image_score for row in scores if row.label == 1 and row.id != shown.id]
    parts = []
    if good:
        below = sum(score < shown.image_score for score in good)
        parts.append(f"above {below} of {len(good)} {'other ' if shown.label == 0 else ''}good test images")
    if bad:
        below = sum(score < shown.image_score for score in bad)
        parts.append(f"above {below} of {len(bad)} {'other ' if shown.label == 1 else ''}defective ones")
    return ", ".join(parts)

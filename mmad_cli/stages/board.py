"""Runs for a leaderboard: each with its modality, its scores and, where its maps were saved, its pixel counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmad_cli.errors import UNFORESEEN, DataError, MmadError
from mmad_cli.results.leaderboard import BoardRun
from mmad_cli.results.runs import SCORES, SampleScore, read_scores
from mmad_cli.results.schema import RunResult
from mmad_cli.stages.evaluate import MAPS
from mmad_cli.stages.pictures import RunPictures
from mmad_cli.stages.session import Session
from mmad_cli.store.store import safe_name

if TYPE_CHECKING:
    from mmad_cli.metrics.bootstrap import PixelCounts


def board_runs(
    session: Session,
    folders: Sequence[Path],
    *,
    categories: Sequence[str] | None = None,
    data: Path | None = None,
    pixels: bool = True,
) -> list[BoardRun]:
    """The runs in these folders, each once. Raises DataError naming a folder without a run.

    Pixel counts are made of the maps that a run folder holds and of the scans, for which the dataset must be found:
    the one named `data`, or the one that the run was made from. Only those of `categories`, where these are given.
    """
    paths = [folder.parent if folder.is_file() else folder for folder in folders]
    distinct = {path.resolve(): path for path in paths}
    return [_board_run(session, folder, categories, data, pixels) for folder in distinct.values()]


def _board_run(
    session: Session, folder: Path, categories: Sequence[str] | None, data: Path | None, pixels: bool
) -> BoardRun:
    run = RunResult.from_disk(folder)
    chosen = [name for name, result in run.categories.items() if result.status == "ok"]
    scores = {name: found for name in chosen if (found := _scores(session, folder / safe_name(name) / SCORES))}
    counts: dict[str, PixelCounts] = {}
    scaled: dict[str, PixelCounts] = {}
    if pixels and not run.full_resolution:
        pictures = RunPictures(session, run, folder, data)
        for name, samples in scores.items():
            if (folder / safe_name(name) / MAPS).is_file() and (not categories or name in categories):
                counted = _count(session, pictures, name, samples)
                if counted is not None:
                    counts[name] = counted[0]
                    if counted[1] is not None:
                        scaled[name] = counted[1]
    return BoardRun(run, _modality(run), scores, counts, scaled)


def _scores(session: Session, file: Path) -> list[SampleScore]:
    """Scores of a category; none, with a notice, where they cannot be read: the numbers are in the summary."""
    try:
        return read_scores(file)
    except DataError as error:
        session.reporter.notice(f"no intervals: {error}")
        return []


def _count(
    session: Session, pictures: RunPictures, category: str, samples: Sequence[SampleScore]
) -> tuple[PixelCounts, PixelCounts | None] | None:
    """Counts of the maps, and of the maps as AUPRO reads them where the method scales them for it."""
    from mmad_cli.metrics.bootstrap import count_pixels

    if not pictures.any_scenes:
        return None
    masks, maps, scales = [], [], []
    with session.reporter.task(f"{category}: reading maps", len(samples)) as advance:
        for done, sample in enumerate(samples, start=1):
            scene, scored = pictures.scene(category, sample.id), pictures.anomaly_map(category, sample.id)
            if scene is None or scored is None:
                return None
            masks.append(scene.mask)
            maps.append(scored.values)
            scales.append(scored.aupro_scale)
            advance(done, len(samples))
    try:
        counts = count_pixels(masks, maps)
        if all(scale == 1.0 for scale in scales):
            return counts, None
        return counts, count_pixels(masks, [one * scale for one, scale in zip(maps, scales, strict=True)])
    except ValueError:
        # no defect pixel in any mask: the metrics are undefined too
        return None


def _modality(run: RunResult) -> str:
    """What a method looks at; empty for a method that this installation does not have."""
    from mmad_cli.methods import get_method

    try:
        return get_method(run.method.name).modalities.get(run.method.variant, "")
    except (MmadError, *UNFORESEEN):
        return ""

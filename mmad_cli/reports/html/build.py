"""The page: static parts as HTML, everything that a script draws as data, all in one file.

A content security policy that names the digests of the page's own script and style keeps out everything else: nothing
is loaded from anywhere, and text that came from a file name could not run even if it got into the markup.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np

from mmad_cli._version import __version__
from mmad_cli.reports.document import run_label
from mmad_cli.reports.html.curves import best_threshold, image_curves, pixel_curves
from mmad_cli.reports.html.encode import Detail, detail_for, encode_map, scene_record
from mmad_cli.reports.html.markup import clean_text, data_block, escape, listing, text_element
from mmad_cli.reports.html.model import PictureSource, RunInput, ScoredMap
from mmad_cli.reports.html.tables import (
    costs_html,
    fitting_references,
    provenance_html,
    reference_data,
    summary_html,
)
from mmad_cli.results.compare import Comparison
from mmad_cli.results.metric_names import METRICS
from mmad_cli.results.runs import SampleScore
from mmad_cli.results.schema import RunResult
from mmad_cli.types import BoolArray

SCRIPTS = ("base.js", "tables.js", "charts.js", "cloud.js", "gallery.js", "main.js")
STYLE = "report.css"
PAGE = "report.html"

# The curve of the report and the recorded area agree better than this when both are of the same maps
_SAME_AREA = 2e-3

Progress = Callable[[int, int], None]


def render_html(
    runs: Sequence[RunInput],
    metrics: Sequence[str] | None = None,
    comparisons: Sequence[Comparison] = (),
    *,
    progress: Progress | None = None,
) -> str:
    """Text of the page. Without pictures it still has tables, image curves and scores, and says what is missing.

    `progress` is called with (done, total) samples. Raises UsageError for an unknown metric.
    """
    results = [one.run for one in runs]
    labels = _labels(results)
    references = [fitting_references(run, comparisons) for run in results]
    pictures = _Pictures(detail_for(_count_scenes(runs)), _Counter(progress, _count_samples(runs)))
    categories = list(dict.fromkeys(name for run in results for name in run.categories))
    data = {
        "metrics": {key: [metric.label, metric.higher_is_better] for key, metric in METRICS.items()},
        "categories": [clean_text(name) for name in categories],
        "runs": [
            {
                "id": clean_text(run.run_id),
                "label": clean_text(label),
                "dataset": clean_text(run.dataset.name),
                "data": run.dataset.digest,
                "references": _cleaned([reference_data(run, table) for table in tables]),
            }
            for run, label, tables in zip(results, labels, references, strict=True)
        ],
        "results": [
            _category_data(index, one, name, pictures) for index, one in enumerate(runs) for name in one.run.categories
        ],
    }
    title = labels[0] + f" on {results[0].dataset.name}" if len(runs) == 1 else f"{len(runs)} runs"
    return _page(
        title=title,
        summary=summary_html(results, metrics, comparisons, references),
        notes=listing(dict.fromkeys(note for one in runs for note in one.notes), "warnings"),
        costs=costs_html(results, labels),
        provenance=provenance_html(results, labels),
        blocks=[data_block("data", data), *pictures.blocks],
    )


def _labels(runs: Sequence[RunResult]) -> list[str]:
    """Method, variant and recipe; with the seed, or the run's id, where runs on one dataset would share a name."""
    plain = [run_label(run) for run in runs]
    ways = (
        plain,
        [f"{label}, seed {run.seed}" for label, run in zip(plain, runs, strict=True)],
        [f"{label} {run.run_id}" for label, run in zip(plain, runs, strict=True)],
    )
    datasets = [run.dataset.digest for run in runs]

    def is_alone(labels: Sequence[str], index: int) -> bool:
        others = list(zip(labels, datasets, strict=True))
        return others.count(others[index]) == 1

    return [next((way[i] for way in ways if is_alone(way, i)), ways[-1][i]) for i in range(len(runs))]


def _count_scenes(runs: Sequence[RunInput]) -> int:
    return len(
        {
            (one.pictures.scene_key, category, score.id)
            for one in runs
            if one.pictures is not None
            for category, scores in one.scores.items()
            for score in scores
        }
    )


def _count_samples(runs: Sequence[RunInput]) -> int:
    return sum(len(scores) for one in runs if one.pictures is not None for scores in one.scores.values())


@dataclass
class _Counter:
    """Counts samples for a progress bar."""

    progress: Progress | None
    total: int
    done: int = 0

    def step(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


@dataclass
class _Pictures:
    """Encoded scenes and maps, each a block of its own that a browser reads when it is first looked at."""

    detail: Detail
    counter: _Counter
    blocks: list[str] = field(default_factory=list)
    _scenes: dict[tuple[str, str, str], tuple[int, BoolArray] | None] = field(default_factory=dict)
    _maps: int = 0

    def scene(self, source: PictureSource, category: str, sample: str) -> tuple[int, BoolArray] | None:
        """Number of the scene's block, and its mask."""
        key = (source.scene_key, category, sample)
        if key not in self._scenes:
            scene = source.scene(category, sample)
            if scene is None:
                self._scenes[key] = None
            else:
                number = len(self._scenes)
                self.blocks.append(data_block(f"scene-{number}", scene_record(scene, self.detail)))
                self._scenes[key] = number, scene.mask
        return self._scenes[key]

    def add_map(self, found: ScoredMap, low: float, high: float) -> int:
        """Number of the map's block."""
        self.blocks.append(data_block(f"map-{self._maps}", encode_map(found.values, low, high)))
        self._maps += 1
        return self._maps - 1


def _category_data(index: int, one: RunInput, category: str, pictures: _Pictures) -> dict[str, Any]:
    result, scores = one.run.categories[category], one.scores.get(category, ())
    labels, values = [score.label for score in scores], [score.image_score for score in scores]
    data: dict[str, Any] = {
        "run": index,
        "category": clean_text(category),
        "error": None if result.error is None else clean_text(result.error),
        "metrics": result.metrics,
        "threshold": best_threshold(labels, values) if scores else None,
        "image": image_curves(labels, values) if scores else {"reason": "no scores of single images"},
        "training": _cleaned(result.training),
        "samples": [_sample_data(score) for score in scores],
    }
    if one.pictures is not None and scores:
        data.update(_picture_data(one.pictures, category, scores, data["samples"], pictures))
        _note_other_area(data, one.run, category)
    return data


def _sample_data(score: SampleScore) -> dict[str, Any]:
    return {
        "id": clean_text(score.id),
        "defect": clean_text(score.defect),
        "label": score.label,
        "score": score.image_score,
    }


def _picture_data(
    source: PictureSource,
    category: str,
    scores: Sequence[SampleScore],
    samples: Sequence[dict[str, Any]],
    pictures: _Pictures,
) -> dict[str, Any]:
    """Adds the numbers of the pictures to the samples; gives the pixel curves and the range of the maps."""
    masks: list[BoolArray] = []
    maps: list[ScoredMap] = []
    with_map: list[dict[str, Any]] = []
    for score, sample in zip(scores, samples, strict=True):
        scene = pictures.scene(source, category, score.id)
        found = source.anomaly_map(category, score.id)
        if scene is not None:
            sample["scene"] = scene[0]
        if found is not None:
            maps.append(found)
            with_map.append(sample)
            if scene is not None and scene[1].shape == found.values.shape:
                masks.append(scene[1])
        pictures.counter.step()
    if not maps:
        return {}
    low, ordinary, high = _map_range(maps, [sample["label"] for sample in with_map])
    for sample, found in zip(with_map, maps, strict=True):
        sample["map"] = pictures.add_map(found, low, high)
    first_coloured = int(np.clip(round(255 * (ordinary - low) / (high - low)), 0, 254)) if high > low else 0
    data: dict[str, Any] = {"range": [low, high], "window": [first_coloured, 255]}
    if len(masks) == len(maps) == len(scores):
        data["pixel"] = _pixel_data(masks, maps)
    return data


def _map_range(maps: Sequence[ScoredMap], labels: Sequence[int]) -> tuple[float, float, float]:
    """Lowest and highest value that is told apart, and the one up to which a good sample is ordinary.

    A few extreme pixels do not count: they would take all the levels. What 95 % of the pixels of good samples stay
    below needs no colour.
    """
    low, high = np.percentile(np.concatenate([found.values.ravel() for found in maps]), [0.5, 99.95])
    good = [found.values.ravel() for found, label in zip(maps, labels, strict=True) if label == 0]
    ordinary = np.percentile(np.concatenate(good or [found.values.ravel() for found in maps]), 95)
    return float(low), float(ordinary), float(high)


def _pixel_data(masks: Sequence[BoolArray], maps: Sequence[ScoredMap]) -> dict[str, Any]:
    values = [found.values for found in maps]
    if all(found.aupro_scale == 1.0 for found in maps):
        return pixel_curves(masks, values)
    return pixel_curves(masks, values, [found.values * np.float32(found.aupro_scale) for found in maps])


def _note_other_area(data: dict[str, Any], run: RunResult, category: str) -> None:
    """Say so where the drawn curve is not of the maps that the recorded number is of."""
    drawn = (data.get("pixel") or {}).get("aupro_30")
    recorded = run.categories[category].metrics.get("aupro_30")
    if drawn is None or recorded is None or abs(drawn - recorded) <= _SAME_AREA:
        return
    why = (
        "the run computed its metrics at scan size, the curve is at 224 x 224"
        if run.full_resolution
        else "the method scales its maps for AUPRO, and only the unscaled maps were kept"
    )
    data["pixel"]["note"] = f"The area below this curve is {drawn:.3f}, the recorded AUPRO@30% {recorded:.3f}: {why}."


def _cleaned(value: Any) -> Any:
    """The value with texts that UTF-8 can hold, keys included."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, Mapping):
        return {_cleaned(key): _cleaned(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(item) for item in value]
    return value


def _page(
    *,
    title: str,
    summary: str,
    notes: str,
    costs: str,
    provenance: str,
    blocks: Sequence[str],
    now: datetime | None = None,
) -> str:
    style = _asset(STYLE)
    script = "\n".join(["(() => {", '"use strict";', *map(_asset, SCRIPTS), "})();"])
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; "
        f"script-src {_digest(script)}; style-src {_digest(style)}"
    )
    made = (now or datetime.now(UTC)).strftime("%Y-%m-%d %H:%M UTC")
    return Template(_asset(PAGE)).substitute(
        title=escape(title),
        policy=escape(policy),
        style=style,
        script=script,
        subtitle=text_element("p", f"mmad {__version__}, written {made}", class_="subtitle"),
        summary=summary,
        notes=notes,
        costs=costs,
        provenance=provenance,
        blocks="\n".join(blocks),
    )


def _asset(name: str) -> str:
    return files("mmad_cli.reports.html").joinpath("assets", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

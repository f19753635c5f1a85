"""What can be shown of a run's test samples: scans, ground truth and anomaly maps, looked up and never predicted.

Maps come from the run folder (`--save-maps`) or from the store. Scans come from the store, and are cleaned again from
the dataset where the store has lost them; the dataset is the one named, or the one that the run was made from when it
is still where it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmad_cli.errors import UNFORESEEN, DataError, MmadError, UsageError, unforeseen
from mmad_cli.reports.html import RunInput, Scene, ScoredMap
from mmad_cli.results.runs import SCORES, SampleScore, read_scores
from mmad_cli.results.schema import RunResult
from mmad_cli.stages.clean import CleanJob, load_clean
from mmad_cli.stages.evaluate import AUPRO_SCALES, MAPS
from mmad_cli.stages.plan import CategorySamples, Selection, clean_jobs, plan_category, select_samples
from mmad_cli.stages.session import Session
from mmad_cli.store import Artefact, CorruptArtefactError, RawIndex
from mmad_cli.store.keys import canonical_json, digest_bytes
from mmad_cli.store.store import safe_name
from mmad_cli.types import ByteArray, FloatArray, Sample

if TYPE_CHECKING:
    from mmad_cli.datasets.base import Dataset
    from mmad_cli.methods.base import View
    from mmad_cli.preprocessing.config import PreprocessConfig
    from mmad_cli.results.compare import Comparison

DATA_VARIABLE = "MMAD_DATA"
# maps by sample id, None without a file, and what AUPRO multiplies them by
SavedMaps = tuple[Mapping[str, FloatArray] | None, Mapping[str, float]]
# The options of `mmad evaluate` that name a folder which is no dataset
_FOLDER_OPTIONS = ("--out", "--store")
# of a run folder, in which the command that made it may have been given
_FOLDERS_ABOVE = 4


def html_report(
    session: Session,
    folders: Sequence[Path],
    *,
    data: Path | None = None,
    metrics: Sequence[str] | None = None,
    comparisons: Sequence[Comparison] = (),
) -> str:
    """The HTML report of run folders, with pictures as far as they can be had. Raises DataError for a broken run."""
    from mmad_cli.reports.html import render_html

    runs = [run_input(session, folder, data=data) for folder in _distinct(folders)]
    total = sum(len(scores) for run in runs if run.pictures for scores in run.scores.values())
    with session.reporter.task("pictures", total) as advance:
        return render_html(runs, metrics, comparisons, progress=advance)


def _distinct(folders: Sequence[Path]) -> list[Path]:
    # a run may be named by its summary file
    paths = [folder if folder.is_dir() else folder.parent for folder in folders]
    return list({path.resolve(): path for path in paths}.values())


def run_input(session: Session, folder: Path, *, data: Path | None = None) -> RunInput:
    """A run with its scores and pictures; `notes` say what could not be had, why, and how to get it."""
    run = RunResult.from_disk(folder)
    scores: dict[str, list[SampleScore]] = {}
    notes: list[str] = []
    for category, result in run.categories.items():
        if result.status != "ok":
            continue
        try:
            scores[category] = read_scores(folder / safe_name(category) / SCORES)
        except DataError as error:
            notes.append(f"no curves for {category}: {error}")
    pictures = RunPictures(session, run, folder, data)
    notes += pictures.notes(list(scores))
    shown = pictures.any_scenes or any(map(pictures.has_maps, scores))
    return RunInput(run, scores, pictures if shown else None, notes)


@dataclass
class RunPictures:
    """Scans and maps of one run; gives them one at a time (`mmad_cli.reports.html.PictureSource`)."""

    session: Session
    run: RunResult
    folder: Path
    data: Path | None = None
    _maps: dict[str, SavedMaps] = field(default_factory=dict, repr=False)

    @property
    def scene_key(self) -> str:
        """Runs on one dataset with one preprocessing and one view show the same scans."""
        return canonical_json([self.run.dataset.digest, self.run.preprocessing.key, self._view])

    @property
    def any_scenes(self) -> bool:
        """Whether the dataset has been found."""
        return self._found is not None

    def has_maps(self, category: str) -> bool:
        """Whether the run or the store has the maps of all test samples of a category."""
        if self._maps_file(category).is_file():
            return True
        artefacts = self._predictions.get(category, {}).values()
        return bool(artefacts) and all(self.session.store.has_tensors(artefact) for artefact in artefacts)

    def scene(self, category: str, sample: str) -> Scene | None:
        """The cleaned scan in the region that the map covers."""
        job = self._clean.get(category, {}).get(sample)
        if job is None:
            return None
        try:
            return scene_in_view(load_clean(job, self.session.reporter.notice), self._view)
        except MmadError as error:
            self.session.reporter.notice(f"{category} {sample}: no pictures: {error}")
        except UNFORESEEN as error:
            # one scan that cannot be shown must not cost the report
            self.session.reporter.notice(f"{category} {sample}: no pictures: {unforeseen(error)}")
        return None

    def anomaly_map(self, category: str, sample: str) -> ScoredMap | None:
        """The map that the store still has, which knows its scale for AUPRO; else the one that the run saved."""
        artefact = self._predictions.get(category, {}).get(sample)
        if artefact is not None:
            try:
                tensors, _ = self.session.store.read_tensors(artefact)
            except (FileNotFoundError, CorruptArtefactError):
                pass
            else:
                scale = tensors.get("aupro_scale")
                return ScoredMap(tensors["anomaly_map"], 1.0 if scale is None else float(np.ravel(scale)[0]))
        kept, scales = self._saved(category)
        if kept is None or sample not in kept:
            return None
        return ScoredMap(np.asarray(kept[sample], dtype=np.float32), scales.get(sample, 1.0))

    def notes(self, categories: Sequence[str]) -> list[str]:
        """What is not shown and how to get it."""
        found = []
        if not self.any_scenes:
            found.append(
                f"No pictures of the samples: {self._why_no_scenes}. Name the dataset: `mmad report --format html "
                "--data DATA`."
            )
        without = [name for name in categories if not self.has_maps(name)]
        if without:
            found.append(
                f"No anomaly maps of {', '.join(without)}: the run did not save them and the store does not have them. "
                "Repeat the run with `mmad evaluate ... --save-maps`."
            )
        return found

    # -- maps ----------------------------------------------------------------------------------------------------

    def _maps_file(self, category: str) -> Path:
        return self.folder / safe_name(category) / MAPS

    def _saved(self, category: str) -> SavedMaps:
        if category not in self._maps:
            # one category at a time: all of a dataset's maps are not needed at once
            self._maps = {category: self._read_maps(self._maps_file(category))}
        return self._maps[category]

    def _read_maps(self, file: Path) -> SavedMaps:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(file), framework="np") as opened:
                maps = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                scales = json.loads((opened.metadata() or {}).get(AUPRO_SCALES, "{}"))
        except FileNotFoundError:
            return None, {}
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            self.session.reporter.notice(f"{file}: cannot be read: {error}")
            return None, {}
        return maps, scales

    @cached_property
    def _predictions(self) -> dict[str, dict[str, Artefact]]:
        """Places of stored predictions; empty where the run cannot be planned again as it was."""
        if self._found is None:
            return {}
        try:
            return dict(_planned_predictions(self.session, self.run, *self._found))
        except (MmadError, *UNFORESEEN):
            # a method, weights or configuration that this installation does not have: the maps of the store are lost
            return {}

    # -- scans ---------------------------------------------------------------------------------------------------

    @cached_property
    def _found(self) -> tuple[Dataset, dict[str, CategorySamples]] | None:
        return self._search[0]

    @property
    def _why_no_scenes(self) -> str:
        return self._search[1]

    @cached_property
    def _search(self) -> tuple[tuple[Dataset, dict[str, CategorySamples]] | None, str]:
        why = "the dataset that the run was made from is not where it was"
        for place in [self.data] if self.data is not None else _likely_places(self.session, self.run, self.folder):
            try:
                return _open_same(self.session, self.run, place), ""
            except MmadError as error:
                if self.data is not None:
                    why = str(error)
        return None, why

    @cached_property
    def _clean(self) -> dict[str, dict[str, CleanJob]]:
        if self._found is None:
            return {}
        dataset, samples = self._found
        config = _preprocessing(self.run)
        return {name: clean_jobs(self.session, dataset, chosen, config) for name, chosen in samples.items()}

    @cached_property
    def _view(self) -> View:
        from mmad_cli.methods import build, get_method

        try:
            definition = get_method(self.run.method.name)
            return build(definition, definition.config.model_validate(self.run.method.config)).view
        except (MmadError, *UNFORESEEN):
            return "resize"


def scene_in_view(clean: Sample, view: View) -> Scene:
    """A clean sample as the report shows it: the whole scan, or the part that PatchCore's centre crop looks at."""
    from mmad_cli.stages.masks import mask_in_view

    mask = mask_in_view(clean, view)
    if view != "crop":
        return Scene(clean.rgb, clean.xyz, mask)
    return Scene(*_cropped(clean), mask)


def _cropped(clean: Sample, resize: int = 256, crop: int = 224) -> tuple[ByteArray, FloatArray]:
    """The crop of image and cloud at the size of the scan: no pixel is made smaller before the report does that."""

    def window(height: int, width: int) -> tuple[slice, slice]:
        side = max(1, round(min(height, width) * crop / resize))
        top, left = (height - side) // 2, (width - side) // 2
        return slice(top, top + side), slice(left, left + side)

    return clean.rgb[window(*clean.rgb.shape[:2])], clean.xyz[window(*clean.xyz.shape[:2])]


def _likely_places(session: Session, run: RunResult, folder: Path) -> Iterator[Path]:
    """Where the dataset of a run may be: named on its command line, in the environment, made by ourselves.

    A relative path is looked for from here, and from the folders above the run, one of which the command most likely
    ran in.
    """
    arguments = list(run.argv)
    bases = (Path(), *list(folder.resolve().parents)[:_FOLDERS_ABOVE])
    for before, text in zip(["", *arguments], arguments, strict=False):
        if text.startswith("-") or before in _FOLDER_OPTIONS:
            continue
        yield from (place for place in dict.fromkeys(base / text for base in bases) if place.exists())
    if os.environ.get(DATA_VARIABLE):
        yield Path(os.environ[DATA_VARIABLE])
    if run.dataset.name == "synthetic":
        yield from sorted((session.store.root / "datasets").glob("synthetic-*"))


def _open_same(session: Session, run: RunResult, place: Path) -> tuple[Dataset, dict[str, CategorySamples]]:
    """The dataset in a folder. Raises DataError unless it is, to the byte, what the run was made from."""
    from mmad_cli.datasets import open_dataset
    from mmad_cli.datasets.base import TakesIncomplete

    dataset = open_dataset(place)
    if any(result.sample_notes for result in run.categories.values()) and isinstance(dataset, TakesIncomplete):
        dataset = dataset.with_incomplete()
    known = dataset.categories()
    absent = [name for name in run.dataset.categories if name not in known]
    if absent:
        raise DataError(f"{place}: has no category {', '.join(absent)}; the run was made from another dataset")
    selection = Selection((), run.shots, run.limit, run.seed, run.shot_choice)
    index = RawIndex(session.store.root, dataset.root)
    samples = {
        name: select_samples(session, dataset, name, selection, index=index) for name in sorted(run.dataset.categories)
    }
    digest = digest_bytes(canonical_json({name: chosen.digest for name, chosen in samples.items()}).encode())
    if digest != run.dataset.digest:
        raise DataError(f"{place}: its files are not those that the run was made from")
    return dataset, samples


def _preprocessing(run: RunResult) -> PreprocessConfig:
    from mmad_cli.stages.request import preprocess_config

    parameters = {name: value for name, value in run.preprocessing.parameters.items() if name != "protocol"}
    return preprocess_config(run.preprocessing.protocol, parameters)


def _planned_predictions(
    session: Session, run: RunResult, dataset: Dataset, samples: dict[str, CategorySamples]
) -> Iterator[tuple[str, dict[str, Artefact]]]:
    """Places of the predictions per category. Raises UsageError where the method is not the one that ran."""
    from mmad_cli.methods import build_config, get_method
    from mmad_cli.stages.request import EvaluateRequest, prepare
    from mmad_cli.stages.shared import plan_shared

    defaults = build_config(get_method(run.method.name), run.method.variant, run.method.recipe, {})
    usual = defaults.model_dump(mode="json")
    selection = Selection((), run.shots, run.limit, run.seed, run.shot_choice)
    request = EvaluateRequest(
        data=dataset.root,
        method=run.method.name,
        variant=run.method.variant,
        recipe=run.method.recipe,
        settings={name: value for name, value in run.method.config.items() if usual.get(name, ...) != value},
        protocol=run.preprocessing.protocol,
        preprocessing={k: v for k, v in run.preprocessing.parameters.items() if k != "protocol"},
        selection=selection,
        full_resolution=run.full_resolution,
    )
    prepared = prepare(session, request)
    if prepared.run.config_hash != run.method.config_hash:
        raise UsageError(f"{run.run_id}: this version computes {run.method.name} in another way than the run did")
    shared = plan_shared(session, dataset, samples, selection, prepared.preprocessing, prepared.run)
    for category, chosen in samples.items():
        plan = plan_category(
            session,
            dataset,
            chosen,
            prepared.preprocessing,
            prepared.run,
            shared=None if shared is None else shared.artefact,
            full_resolution=run.full_resolution,
        )
        yield category, dict(plan.predictions)

"""Writes a synthetic dataset in the layout of MVTec 3D-AD [Bergmann et al. 2022]."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmad_cli.datasets.synthetic.parts import CATEGORIES
from mmad_cli.errors import DataError, UsageError, unknown_name
from mmad_cli.processes import become_worker
from mmad_cli.types import GOOD, Split

if TYPE_CHECKING:
    from mmad_cli.types import BoolArray, ByteArray, FloatArray

Progress = Callable[[int, int], None]

SYNTH_VERSION = 1
MANIFEST = "synthetic.json"
SMALLEST_SIZE, LARGEST_SIZE = 64, 1600
HIGHEST_CLASS_ID = 255

_DEFAULT_CATEGORIES = ("biscuit", "bracket", "flange", "hose", "nugget", "pouch")


@dataclass(frozen=True)
class SynthReport:
    """What was written: the folder, the categories, how many samples in all and how many of each category."""

    root: Path
    categories: tuple[str, ...]
    samples: int
    per_category: dict[str, int]


@dataclass(frozen=True)
class _Task:
    """One sample to render, and the split folder it goes to."""

    folder: Path
    category: str
    split: Split
    defect: str
    index: int
    size: int
    seed: int
    class_id: int


def default_spec() -> dict[str, Any]:
    """Arguments of `generate` for the default dataset: six categories, small counts."""
    return {
        "categories": list(_DEFAULT_CATEGORIES),
        "train": 12,
        "validation": 4,
        "test_good": 6,
        "test_defect": 2,
        "size": 256,
        "seed": 0,
    }


def class_ids(category: str) -> dict[str, int]:
    """Value of the ground-truth pixels of each defect: 255 for the first in alphabetical order, then 254, ..."""
    return {defect: HIGHEST_CLASS_ID - rank for rank, defect in enumerate(sorted(CATEGORIES[category].defects))}


def generate(
    out: Path,
    *,
    categories: Sequence[str] | None = None,
    train: int = 12,
    validation: int = 4,
    test_good: int = 6,
    test_defect: int = 2,
    size: int = 256,
    seed: int = 0,
    workers: int = 1,
    progress: Progress | None = None,
) -> SynthReport:
    """Write a synthetic dataset to `out`, all of it or nothing.

    categories: names in `CATEGORIES` (None: all). train, validation, test_good: good samples per category;
    test_defect: samples per kind of defect. size: side of the images in pixels (64 to 1600). The bytes of a sample
    depend on its category, split, defect, index, size and the seed only, not on `workers` or on what else is
    written. progress: called with (samples done, samples in all).

    Raises UsageError for arguments out of range, for a folder that is not empty and for one inside a dataset;
    DataError if the files cannot be written.
    """
    counts = {"train": train, "validation": validation, "test_good": test_good, "test_defect": test_defect}
    names = _check_arguments(categories, counts, size, seed, workers)
    target = out.expanduser().resolve()
    _check_target(target, out)
    with _whole_or_nothing(target, out) as folder:
        tasks = [task for name in names for task in _tasks(folder, name, counts, size, seed)]
        for parent in dict.fromkeys(path.parent for task in tasks for path in _paths(task).values()):
            parent.mkdir(parents=True, exist_ok=True)
        for name in names:
            _write_calibration(folder / name, size)
        _write_json(folder / MANIFEST, _manifest(names, counts, size, seed))
        _run(tasks, workers, progress)
    per_category = {name: sum(task.category == name for task in tasks) for name in names}
    return SynthReport(root=target, categories=names, samples=len(tasks), per_category=per_category)


def _check_arguments(
    categories: Sequence[str] | None, counts: dict[str, int], size: int, seed: int, workers: int
) -> tuple[str, ...]:
    names = tuple(sorted(set(categories))) if categories is not None else tuple(CATEGORIES)
    for name in names:
        if name not in CATEGORIES:
            raise unknown_name("category", name, CATEGORIES, "--category")
    if not names:
        raise UsageError(f"--category: at least one category is needed; known: {', '.join(CATEGORIES)}")
    for argument, count in counts.items():
        if not 0 <= count <= 1000:
            raise UsageError(
                f"--{argument.replace('_', '-')}: must be 0 to 1000 (file names have 3 digits), got {count}"
            )
    if counts["train"] == 0:
        raise UsageError("--train: must be at least 1; without good training samples nothing can be fitted")
    if not SMALLEST_SIZE <= size <= LARGEST_SIZE:
        raise UsageError(f"--size: must be {SMALLEST_SIZE} to {LARGEST_SIZE} pixels, got {size}")
    if seed < 0:
        raise UsageError(f"--seed: must be 0 or more, got {seed}")
    if workers < 1:
        raise UsageError(f"--workers: must be 1 or more, got {workers}")
    return names


def _check_target(target: Path, given: Path) -> None:
    """Refuse what already holds something, and what lies inside a dataset."""
    if target.exists() and not target.is_dir():
        raise UsageError(f"OUT: {given} is a file; name a folder that does not exist yet or is empty")
    if target.is_dir() and any(target.iterdir()):
        raise UsageError(f"OUT: {given} is not empty; name a new folder, or empty this one first")
    for ancestor in target.parents:
        if (ancestor / "train" / GOOD).is_dir():
            raise UsageError(f"OUT: {given} lies inside the dataset category {ancestor}; name a folder outside of it")
    parent = target.parent
    if (parent / MANIFEST).is_file() or (
        parent.is_dir() and any((child / "train" / GOOD / "xyz").is_dir() for child in parent.iterdir())
    ):
        raise UsageError(f"OUT: {given} lies inside the dataset {parent}; name a folder outside of it")


@contextmanager
def _whole_or_nothing(target: Path, given: Path) -> Iterator[Path]:
    """A new folder beside the target that takes its place at the end, or is removed if anything goes wrong."""
    partial = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        partial.mkdir(parents=True)
        yield partial
        if target.exists():
            target.rmdir()
        partial.replace(target)
    except OSError as error:
        raise DataError(
            f"OUT: cannot write {given}: {error}; check space and permissions of {target.parent}"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _tasks(folder: Path, category: str, counts: dict[str, int], size: int, seed: int) -> Iterator[_Task]:
    ids = class_ids(category)
    groups: list[tuple[Split, str, int]] = [
        ("train", GOOD, counts["train"]),
        ("validation", GOOD, counts["validation"]),
        *(("test", defect, counts["test_defect"]) for defect in ids),
        ("test", GOOD, counts["test_good"]),
    ]
    for split, defect, count in groups:
        for index in range(count):
            yield _Task(folder, category, split, defect, index, size, seed, ids.get(defect, 0))


def _paths(task: _Task) -> dict[str, Path]:
    """Files of one sample by role; train and validation have no ground truth."""
    folder = task.folder / task.category / task.split / task.defect
    paths = {"rgb": folder / "rgb" / f"{task.index:03d}.png", "xyz": folder / "xyz" / f"{task.index:03d}.tiff"}
    if task.split == "test":
        paths["gt"] = folder / "gt" / f"{task.index:03d}.png"
    return paths


def _run(tasks: Sequence[_Task], workers: int, progress: Progress | None) -> None:
    """Write all samples, in this process or in a pool."""
    report = progress or (lambda done, total: None)
    report(0, len(tasks))
    if workers == 1 or len(tasks) < 2:
        for done, task in enumerate(tasks, 1):
            write_sample(task)
            report(done, len(tasks))
        return
    # spawn: threads of the caller must not be forked
    pool = ProcessPoolExecutor(min(workers, len(tasks)), mp_context=get_context("spawn"), initializer=become_worker)
    try:
        futures = [pool.submit(write_sample, task) for task in tasks]
        for done, future in enumerate(as_completed(futures), 1):
            future.result()
            report(done, len(tasks))
    except BrokenProcessPool as error:
        raise DataError("a worker process ended unexpectedly (out of memory?); try again with --workers 1") from error
    finally:
        pool.shutdown(cancel_futures=True)


def write_sample(task: _Task) -> None:
    """Render one sample and write its files (runs in a worker process)."""
    from mmad_cli.datasets.synthetic.render import render

    rgb, xyz, mask = render(task.category, task.split, task.defect, task.index, task.size, task.seed)
    paths = _paths(task)
    _write_png(paths["rgb"], rgb)
    _write_cloud(paths["xyz"], xyz)
    if "gt" in paths:
        _write_mask(paths["gt"], mask, task.class_id)


def _write_png(path: Path, image: ByteArray) -> None:
    from PIL import Image

    Image.fromarray(image).save(path, format="PNG")


def _write_mask(path: Path, mask: BoolArray, class_id: int) -> None:
    _write_png(path, mask.astype("uint8") * class_id)


def _write_cloud(path: Path, xyz: FloatArray) -> None:
    import tifffile

    # one row per strip, as in the published files; a fixed software tag keeps the bytes the same
    tifffile.imwrite(path, xyz, photometric="rgb", rowsperstrip=1, metadata=None, software="mmad")


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")


def _write_calibration(folder: Path, size: int) -> None:
    """Camera parameters in the form that MVTec 3D-AD gives them: pixel pitch as published, pinhole."""
    from mmad_cli.datasets.synthetic.scanner import CENTRE_X, CENTRE_Y, FOCAL_PER_PIXEL

    pitch = 3.75e-06
    parameters = {
        "camera_type": "area_scan_division",
        "cx": round(CENTRE_X * size - 0.5, 6),
        "cy": round(CENTRE_Y * size - 0.5, 6),
        "focus": round(FOCAL_PER_PIXEL * size * pitch, 9),
        "image_height": size,
        "image_width": size,
        "kappa": 0.0,
        "sx": pitch,
        "sy": pitch,
    }
    (folder / "calibration").mkdir(parents=True, exist_ok=True)
    _write_json(folder / "calibration" / "camera_parameters.json", parameters)


def _manifest(names: Sequence[str], counts: dict[str, int], size: int, seed: int) -> dict[str, Any]:
    return {
        "schema": "mmad.synthetic/1",
        "version": SYNTH_VERSION,
        "seed": seed,
        "size": size,
        "counts": counts,
        "categories": {
            name: {"description": CATEGORIES[name].description, "class_ids": class_ids(name)} for name in names
        },
    }

"""A dataset folder to samples. `open_dataset` finds the layout; every reader offers `base.Dataset`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmad_cli.datasets.description import FILE_NAME, read_description
from mmad_cli.errors import DataError

if TYPE_CHECKING:
    from mmad_cli.datasets.base import Dataset

DATASETS: dict[str, str] = {
    "mvtec3d": "MVTec 3D-AD: <category>/<split>/<defect>/{rgb,xyz,gt}",
    "eyecandies": "Eyecandies as distributed: <Category>/<train|val|test_public>/data/<number>_<item>",
    "polyurethane": "polyurethane cutting set, 3D only: <category>/<scan>.ply, labelled by an Isolation Forest",
    "synthetic": "generated scans with exact masks, in the layout of MVTec 3D-AD (mmad synth)",
    "folder": "own data: in the layout of MVTec 3D-AD with any names, or in your own described by a dataset.toml",
}
"""Datasets and layouts that are read, with a description."""


def published_train_counts(name: str) -> dict[str, int]:
    """Training samples per category of the published dataset `name`; empty for data that is not published."""
    from mmad_cli.datasets import eyecandies, mvtec3d

    counts = {"mvtec3d": mvtec3d.TRAIN_COUNTS, "eyecandies": eyecandies.TRAIN_COUNTS}
    return dict(counts.get(name, {}))


def describe_datasets() -> list[dict[str, Any]]:
    """Name, description and categories of every dataset that is known."""
    from mmad_cli.datasets.synthetic import CATEGORIES

    categories = {name: sorted(published_train_counts(name)) for name in ("mvtec3d", "eyecandies")}
    categories["synthetic"] = sorted(CATEGORIES)
    return [
        {"name": name, "description": text, "categories": categories.get(name, [])} for name, text in DATASETS.items()
    ]


def open_dataset(root: Path) -> Dataset:
    """The dataset in the folder `root`, whatever its layout; one category's folder works too.

    A `dataset.toml` in the folder, or given as `root`, tells the layout and its settings. Raises DataError where `root`
    is no folder, cannot be read, is empty or has no known layout.
    """
    root = Path(root).expanduser().absolute()
    if not root.exists():
        raise DataError(f"{root}: no such folder; check the path, or make a dataset with `mmad synth {root.name}`")
    if root.is_file() and root.suffix == ".toml":
        return read_description(root)
    if not root.is_dir():
        raise DataError(f"{root}: is a file, a dataset is a folder or a {FILE_NAME}")
    if (root / FILE_NAME).is_file():
        return read_description(root / FILE_NAME)
    try:
        if not any(root.iterdir()):
            raise DataError(f"{root}: the folder is empty; {_looked_for()}")
        for detect in _detectors():
            dataset = detect(root)
            if dataset is not None:
                return dataset
        hint = _hint(root)
    except OSError as error:
        raise DataError(f"{error.filename or root}: cannot be read ({error.strerror}); check permissions") from error
    raise DataError(f"{root}: no dataset found here; {_looked_for()}{hint}")


def _detectors() -> list[Callable[[Path], Dataset | None]]:
    """One function per layout, asked in this order."""
    from mmad_cli.datasets import eyecandies, mvtec3d, polyurethane

    return [mvtec3d.detect, eyecandies.detect, polyurethane.detect]


def _looked_for() -> str:
    from mmad_cli.datasets import eyecandies, mvtec3d, polyurethane

    return f"looked for {'; '.join(module.LAYOUT for module in (mvtec3d, eyecandies, polyurethane))}"


def _hint(root: Path) -> str:
    """What may be meant instead: a dataset one level up or down, or one without point clouds."""
    children = [child for child in sorted(root.iterdir()) if child.is_dir() and not child.name.startswith(".")]
    for near in (*children, root.parent, root.parent.parent, root.parent.parent.parent):
        if any(detect(near) is not None for detect in _detectors()):
            return f". There is one in {near}"
    candidates = (root, *children)
    if any(list((folder / "train" / "good").glob("*.png"))[:1] for folder in candidates):
        return ". It looks like MVTec AD (2D): images without point clouds; this tool needs both"
    return ""

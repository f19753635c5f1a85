"""`dataset.toml`: which layout a folder has, its settings, or the places of files in a layout of one's own.

    layout = "eyecandies"
    root = "Eyecandies"      # beside this file; without it the folder of this file
    light = 0

With `layout = "files"` patterns tell where the files of a split are (see `mmad_cli.datasets.files`):

    layout = "files"
    good = "ok"
    [train]
    rgb = "{category}/training/{stem}_colour.png"
    xyz = "{category}/training/{stem}_points.tiff"
    [test]
    rgb = "{category}/test/{defect}/{stem}_colour.png"
    xyz = "{category}/test/{defect}/{stem}_points.tiff"
    gt = "{category}/test/{defect}/{stem}_mask.png"
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmad_cli.errors import DataError, UsageError, unknown_name

if TYPE_CHECKING:
    from mmad_cli.datasets.base import Dataset

FILE_NAME = "dataset.toml"

# Settings of each layout, with their types
_SETTINGS: dict[str, dict[str, type]] = {
    "mvtec3d": {},
    "eyecandies": {"light": int},
    "polyurethane": {"level": str, "chunk_points": int, "marker": str},
    "files": {"good": str, "category": str, "train": dict, "validation": dict, "test": dict},
}
_KINDS: dict[type, str] = {int: "a whole number", str: "a text in quotes", dict: "a table"}


def read_description(file: Path) -> Dataset:
    """The dataset that a description tells of.

    Raises DataError naming the file when it is no TOML or its folder has not the layout, UsageError for a key that does
    not exist (with the near ones) and for a value of another type.
    """
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"{file}: cannot be read as TOML ({error})") from error
    layout = values.pop("layout", None)
    if not isinstance(layout, str):
        raise UsageError(f'{file}: has no layout; add layout = "NAME", one of {", ".join(_SETTINGS)}')
    if layout not in _SETTINGS:
        raise unknown_name("layout", layout, _SETTINGS, str(file))
    place = values.pop("root", ".")
    if not isinstance(place, str):
        raise UsageError(f"{file}: root should be a text in quotes, got {place!r}")
    _check_settings(file, layout, values)
    root = (file.parent / Path(place).expanduser()).resolve()
    if not root.is_dir():
        raise DataError(f"{file}: root {place!r} is {root}, which is no folder")
    try:
        dataset = _open(layout, root, values)
    except (UsageError, ValueError) as error:
        raise UsageError(f"{file}: {error}") from error
    if dataset is None:
        raise DataError(f"{root}: has not the layout {layout} that {file} tells of")
    return dataset


def _check_settings(file: Path, layout: str, values: Mapping[str, Any]) -> None:
    known = _SETTINGS[layout]
    for key, value in values.items():
        if key not in known:
            raise unknown_name(f"setting of the layout {layout}", key, (*known, "layout", "root"), str(file))
        # a bool is an int in Python, not in TOML
        if not isinstance(value, known[key]) or isinstance(value, bool):
            raise UsageError(f"{file}: {key} should be {_KINDS[known[key]]}, got {value!r}")


def _open(layout: str, root: Path, values: Mapping[str, Any]) -> Dataset | None:
    from dataclasses import replace

    from mmad_cli.datasets import eyecandies, files, mvtec3d, polyurethane

    if layout == "files":
        return files.FilesDataset.from_description(root, values)
    detectors: dict[str, Callable[[Path], Any]] = {
        "mvtec3d": mvtec3d.detect,
        "eyecandies": eyecandies.detect,
        "polyurethane": polyurethane.detect,
    }
    dataset = detectors[layout](root)
    if dataset is None:
        return None
    described: Dataset = replace(dataset, **values)
    return described

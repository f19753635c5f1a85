"""`mmad.toml`: the tolerances of a project, kept beside its references.

[tolerance]
default = 0.005
i_auroc = 0.02
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from mmad_cli.errors import DataError, UsageError, unknown_name
from mmad_cli.results.compare import Tolerances
from mmad_cli.results.metric_names import METRICS

FILE_NAME = "mmad.toml"

_TABLES = ("tolerance",)
_DEFAULT = "default"


def find_settings(start: Path) -> Path | None:
    """The `mmad.toml` in `start` or the nearest folder above it."""
    start = start.absolute()
    return next((file for folder in (start, *start.parents) if (file := folder / FILE_NAME).is_file()), None)


def read_tolerances(file: Path) -> Tolerances:
    """The tolerances of a settings file; the usual ones where it has none.

    Raises DataError naming the file when it is missing or no TOML, UsageError for a key that does not exist (with the
    near ones) and for a value that is no number between 0 and 1.
    """
    values = _read(file).get("tolerance", {})
    if not isinstance(values, dict):
        raise UsageError(f"{file}: tolerance should be a table, as in [tolerance] and then i_auroc = 0.01")
    for key in values:
        if key != _DEFAULT and key not in METRICS:
            raise unknown_name("key", key, [_DEFAULT, *METRICS], f"{file}: [tolerance]")
    numbers = {key: _number(value, f"{file}: tolerance.{key}") for key, value in values.items()}
    default = numbers.pop(_DEFAULT, Tolerances().default)
    return Tolerances(default, numbers)


def _read(file: Path) -> dict[str, Any]:
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # broken TOML and broken UTF-8
        raise DataError(f"{file}: not valid TOML: {error}") from error
    for key in data:
        if key not in _TABLES:
            raise unknown_name("key", key, _TABLES, str(file))
    return data


def _number(value: Any, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise UsageError(f"{place}: should be a number between 0 and 1, got {value!r}")
    return float(value)

"""The result of one run, `mmad.run/1`: what `summary.json` of a run folder holds.

Names and meanings are fixed; keys may be added. Readers keep keys they do not know, so a file of a later
version with added keys survives reading and writing. The JSON Schema is written by
`python -m mmad_cli.results.schema docs/run.schema.json`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    model_validator,
)

from mmad_cli.errors import DataError
from mmad_cli.files import atomic_write

SCHEMA = "mmad.run/1"
SUMMARY = "summary.json"

Recipe = Literal["official", "corrected", "fast"]
MetricValues = dict[str, FiniteFloat | None]


class _Model(BaseModel):
    # Unknown keys are kept: an older mmad must not lose what a newer one has added.
    model_config = ConfigDict(extra="allow", populate_by_name=True, protected_namespaces=())


class MethodInfo(_Model):
    """Which method ran, with every switch that it ran with."""

    name: str
    label: str = Field(
        default="",
        exclude_if=lambda label: not label,
        description="The name with what must be said beside it; empty where nothing must.",
    )
    variant: str
    recipe: str = Field(description="'official' (published code, quirks included), 'corrected', or 'custom'.")
    config: dict[str, Any] = Field(default_factory=dict)
    config_hash: str
    method_version: str

    @property
    def shown(self) -> str:
        """The name as reports print it."""
        return self.label or self.name


class CategoryCounts(_Model):
    """Number of samples of one category in the dataset."""

    train: int = Field(ge=0)
    validation: int = Field(default=0, ge=0)
    test_good: int = Field(ge=0)
    test_anomalous: int = Field(ge=0)


class DatasetInfo(_Model):
    """Which dataset was evaluated: its name, the digest of its content and its categories."""

    name: str
    digest: str
    categories: dict[str, CategoryCounts] = Field(default_factory=dict)


class Preprocessing(_Model):
    """How raw scans became clean scans."""

    protocol: str = Field(description="'m3dm', 'cfm' or 'none'.")
    parameters: dict[str, Any] = Field(default_factory=dict)
    key: str


class WeightsInfo(_Model):
    """One set of pretrained weights that took part."""

    name: str
    sha256: str | None = Field(default=None, description="Null for weights that come from no file.")
    source: str
    stand_in: bool = Field(default=False, description="True for weights other than the method's own.")


class Environment(_Model):
    """Versions and device; null for what is not installed or was not used."""

    mmad: str
    git: str | None = None
    python: str
    platform: str
    device: str
    device_reason: str | None = None
    torch: str | None = None
    timm: str | None = None
    faiss: str | None = None
    open3d: str | None = None
    numpy: str | None = None
    scikit_learn: str | None = Field(default=None, alias="scikit-learn")


class BankInfo(_Model):
    """Size of one memory bank after coreset selection."""

    rows: int = Field(ge=0)
    dim: int = Field(ge=0)


class CategoryResult(_Model):
    """What one category gave. `metrics` holds null, with a reason, where a metric is not defined."""

    status: Literal["ok", "failed"]
    error: str | None = None
    metrics: MetricValues = Field(default_factory=dict)
    metrics_null_reasons: dict[str, str] = Field(default_factory=dict)
    n_train: int = Field(default=0, ge=0)
    n_test: int = Field(default=0, ge=0)
    bank: dict[str, BankInfo] = Field(default_factory=dict)
    seconds: dict[str, FiniteFloat] = Field(default_factory=dict)
    peak_rss_bytes: int | None = None
    peak_rss_bytes_by_stage: dict[str, int] = Field(
        default_factory=dict, description="largest resident set of the main process while a stage ran"
    )
    peak_vram_bytes: int | None = None
    training: dict[str, list[FiniteFloat]] = Field(
        default_factory=dict, description="mean loss per epoch, by name; empty for methods without training"
    )
    sample_notes: dict[str, str] = Field(
        default_factory=dict, description="what was done otherwise for single samples, by id"
    )

    @model_validator(mode="after")
    def _explain(self) -> CategoryResult:
        """A failure has an error and a null metric has a reason, even where the writer gave none."""
        if self.status == "failed" and not self.error:
            self.error = "failed; no error was recorded"
        for metric, value in self.metrics.items():
            if value is None:
                self.metrics_null_reasons.setdefault(metric, "not defined; no reason was recorded")
        return self


@dataclass(frozen=True)
class Mean:
    """Unweighted mean over categories.

    `values` maps a metric to its mean over the ok categories that define it (null when none does), `counts`
    to how many those are, `notes` says where that is not all of the categories.
    """

    values: dict[str, float | None] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def compute_mean(categories: Mapping[str, CategoryResult]) -> Mean:
    """Mean of every metric over the ok categories, each counting once whatever its number of samples.

    Categories that failed or do not define the metric are left out, and named in the notes.
    """
    ok = {name: result for name, result in categories.items() if result.status == "ok"}
    failed = [name for name in categories if name not in ok]
    mean = Mean()
    for metric in dict.fromkeys(metric for result in ok.values() for metric in result.metrics):
        defined = {n: v for n, r in ok.items() if (v := r.metrics.get(metric)) is not None}
        mean.values[metric] = sum(defined.values()) / len(defined) if defined else None
        mean.counts[metric] = len(defined)
        undefined = [name for name in ok if name not in defined]
        if undefined or failed:
            mean.notes[metric] = _mean_note(len(defined), len(categories), undefined, failed)
    return mean


def _mean_note(count: int, total: int, undefined: list[str], failed: list[str]) -> str:
    parts = [f"not defined for {', '.join(undefined)}"] if undefined else []
    parts += [f"failed: {', '.join(failed)}"] if failed else []
    return f"mean over {count} of {total} categories; {'; '.join(parts)}"


class RunResult(_Model):
    """One evaluation: method x variant x recipe x dataset x seed."""

    model_config = ConfigDict(extra="allow", populate_by_name=True, protected_namespaces=(), title=SCHEMA)

    schema_: Literal["mmad.run/1"] = Field(default="mmad.run/1", alias="schema")
    run_id: str
    created: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))
    argv: list[str] = Field(default_factory=list)
    method: MethodInfo
    dataset: DatasetInfo
    preprocessing: Preprocessing
    weights: list[WeightsInfo] = Field(default_factory=list)
    environment: Environment
    seed: int = 0
    shots: int | None = None
    shot_choice: str = Field(default="random", description="Which training samples: 'random' or 'first', by name.")
    limit: int | None = None
    full_resolution: bool = Field(default=False, description="Metrics at scan size instead of 224 x 224.")
    comparable: bool = Field(default=True, description="False as soon as `not_comparable` gives a reason.")
    not_comparable: list[str] = Field(default_factory=list)
    categories: dict[str, CategoryResult] = Field(default_factory=dict)
    mean: MetricValues = Field(default_factory=dict, description="Unweighted over the ok categories.")
    mean_counts: dict[str, int] = Field(default_factory=dict, description="Categories in each mean.")
    mean_notes: dict[str, str] = Field(default_factory=dict, description="Where a mean leaves some out.")

    @model_validator(mode="after")
    def _settle_comparable(self) -> RunResult:
        if self.not_comparable:
            self.comparable = False
        return self

    @property
    def failed_categories(self) -> list[str]:
        """Names of the categories that failed."""
        return [name for name, result in self.categories.items() if result.status == "failed"]

    @property
    def missing_categories(self) -> list[str]:
        """Categories of the dataset without a result: the run was interrupted, or they were not asked for."""
        return [name for name in self.dataset.categories if name not in self.categories]

    def mark_not_comparable(self, reason: str) -> None:
        """Add a reason why the numbers are not comparable with published ones."""
        if reason not in self.not_comparable:
            self.not_comparable.append(reason)
        self.comparable = False

    def set_category(self, name: str, result: CategoryResult) -> None:
        """Add or replace the result of one category and bring the mean up to date."""
        self.categories[name] = result
        self.update_mean()

    def update_mean(self) -> None:
        """Recompute `mean`, `mean_counts` and `mean_notes` from the categories."""
        mean = compute_mean(self.categories)
        self.mean, self.mean_counts, self.mean_notes = mean.values, mean.counts, mean.notes

    def to_json(self) -> str:
        """The text of `summary.json`."""
        data = self.model_dump(mode="json", by_alias=True)
        return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def to_disk(self, folder: Path | str) -> Path:
        """Write `summary.json` into the run folder, atomically, with the mean up to date; gives its path."""
        self.update_mean()
        path = Path(folder) / SUMMARY
        # An error message may hold a file name that is no valid UTF-8; \udcXX is valid JSON.
        atomic_write(path, self.to_json().encode("utf-8", errors="backslashreplace"))
        return path

    @classmethod
    def from_disk(cls, path: Path | str) -> RunResult:
        """Read a run from its folder or from its `summary.json`.

        Raises DataError, naming the file, when it is missing, is no JSON, has another schema version or lacks
        keys.
        """
        path = Path(path)
        file = path / SUMMARY if path.is_dir() else path
        return cls.from_data(_read_json(file), file)

    @classmethod
    def from_data(cls, data: object, file: Path) -> RunResult:
        """Check data that was read from `file`; DataError as for `from_disk`."""
        version = data.get("schema") if isinstance(data, dict) else None
        if version != SCHEMA:
            found = f"schema {version!r}" if version else "no 'schema' key"
            raise DataError(f"{file}: no run result that this version reads ({found}, expected {SCHEMA!r})")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise DataError(f"{file}: invalid run result: {_first_errors(error)}") from error


def _read_json(file: Path) -> object:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{file}: no such run result; give a run folder or its {SUMMARY}") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # broken JSON and broken UTF-8
        raise DataError(f"{file}: not valid JSON: {error}") from error


def _first_errors(error: ValidationError, count: int = 3) -> str:
    details = error.errors(include_url=False, include_input=False)
    texts = [f"{'.'.join(str(part) for part in d['loc']) or 'run'}: {d['msg']}" for d in details[:count]]
    more = len(details) - count
    return "; ".join(texts) + (f"; and {more} more" if more > 0 else "")


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of `summary.json`, as it is written."""
    schema = RunResult.model_json_schema(by_alias=True, mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA, **schema}


def json_schema_text() -> str:
    """The text of the published schema file."""
    return json.dumps(json_schema(), indent=2) + "\n"


def main(arguments: list[str]) -> None:
    """Write the JSON Schema to the one file named in `arguments`."""
    if len(arguments) != 1:
        raise SystemExit("usage: python -m mmad_cli.results.schema FILE")
    atomic_write(Path(arguments[0]), json_schema_text().encode())


if __name__ == "__main__":
    main(sys.argv[1:])

"""Published numbers by name, and everything else that a run can be compared with.

The numbers are package data, one JSON file per method under `references/data`. A file holds its sources and a
list of references; a reference is one published row: one method and setting, on one dataset, from one source.
Its name is `<source>:<setting>`, where the setting may have further parts, as in `btf-readme:fpfh:raw`. The
leading part, or parts, of a name stand for the row among those that fits the run.

Published metric names are stored under the key of the rule that produced them: the code of BTF and M3DM uses
the 100-threshold rule, CFM, MAFR and CMDR-IAD the 99-threshold rule. Where a source does not say, the value
stands under the exact area and the reference notes it.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmad_cli.errors import DataError, UsageError, unknown_name
from mmad_cli.results.metric_names import METRICS, label
from mmad_cli.results.schema import RunResult

OPTION = "--against"

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
MetricTable = dict[str, dict[str, float]]

# The mean over all categories of these datasets is what papers print; a mean over some of them is something
# else.
DATASET_CATEGORIES = {
    "mvtec3d": (
        "bagel", "cable_gland", "carrot", "cookie", "dowel", "foam", "peach", "potato", "rope", "tire",
    ),
    "eyecandies": (
        "CandyCane", "ChocolateCookie", "ChocolatePraline", "Confetto", "GummyBear", "HazelnutTruffle",
        "LicoriceSandwich", "Lollipop", "Marshmallow", "PeppermintCandy",
    ),
}  # fmt: skip


class _Model(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Source(_Model):
    """Where numbers were printed and how they were read."""

    title: str
    repo: str | None = None
    arxiv: str | None = None
    doi: str | None = None
    year: int | None = None
    table: str | None = None
    seen: str | None = None

    def text(self) -> str:
        """One line for a report."""
        places = [
            f"arXiv {self.arxiv}" if self.arxiv else "",
            f"doi {self.doi}" if self.doi else "",
            f"github {self.repo}" if self.repo else "",
            str(self.year or ""),
        ]
        details = [", ".join(filter(None, places)), self.table or "", self.seen or ""]
        return "; ".join(filter(None, [self.title, *details]))


class PublishedMetric(_Model):
    """One metric of one row: the printed mean and, where printed, the categories."""

    mean: Fraction | None = None
    categories: dict[str, Fraction] = Field(default_factory=dict)
    table: str | None = None


class Reference(_Model):
    """One published row. `method`, `variants`, `protocol`, `shots` and `dataset` say which runs it is for.

    No `variants` means the method's main setting, no `protocol` that the source does not tell.
    """

    name: str
    published_as: str
    source: str
    dataset: str
    modality: str
    method: str
    variants: tuple[str, ...] = ()
    protocol: str | None = None
    data: str | None = None
    shots: int | None = None
    notes: tuple[str, ...] = ()
    metrics: dict[str, PublishedMetric]
    source_text: str = ""

    @property
    def group(self) -> str:
        """The leading part of the name: the source."""
        return self.name.partition(":")[0]

    def table(self) -> ReferenceTable:
        """The numbers as the comparison takes them."""
        categories = dict.fromkeys(name for metric in self.metrics.values() for name in metric.categories)
        return ReferenceTable(
            name=self.name,
            source=self.source_text,
            rows={
                name: {k: m.categories[name] for k, m in self.metrics.items() if name in m.categories}
                for name in categories
            },
            mean={key: metric.mean for key, metric in self.metrics.items() if metric.mean is not None},
            notes=(*self.notes, *_mean_mismatches(self.metrics)),
            published=True,
            dataset=self.dataset,
            protocol=self.protocol,
            shots=self.shots,
        )


class _ReferenceFile(_Model):
    sources: dict[str, Source]
    references: list[Reference]


@dataclass(frozen=True)
class ReferenceTable:
    """Expected numbers: `rows` {category: {metric: value}}, `mean` {metric: value}, fractions.

    `published` tells print from a run of this tool or a file; `dataset`, `protocol` and `shots` are what the
    numbers hold for, where known.
    """

    name: str
    source: str
    rows: MetricTable = field(default_factory=dict)
    mean: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    published: bool = False
    dataset: str | None = None
    protocol: str | None = None
    shots: int | None = None

    @property
    def metrics(self) -> list[str]:
        """Keys of all metrics that have a value."""
        return list(dict.fromkeys([*self.mean, *(key for row in self.rows.values() for key in row)]))

    def categories_of_mean(self, metric: str) -> list[str] | None:
        """Categories that the mean of a metric is over; None when the reference does not tell."""
        named = [name for name, row in self.rows.items() if metric in row]
        return named or list(DATASET_CATEGORIES.get(self.dataset or "", ())) or None


def fold(name: str) -> str:
    """A name without case, hyphens, underscores and spaces: `Cable Gland` and `cable_gland` agree."""
    return re.sub(r"[-_\s]+", "", name).casefold()


def _mean_mismatches(metrics: Mapping[str, PublishedMetric]) -> list[str]:
    """Printed means that the printed categories do not give, beyond the rounding of both."""
    notes = []
    for key, metric in metrics.items():
        values = list(metric.categories.values())
        if metric.mean is None or len(values) < 2:
            continue
        average = sum(values) / len(values)
        if abs(average - metric.mean) > 0.00051:
            notes.append(f"{label(key)}: the printed mean is {metric.mean:.4f}, its categories give {average:.4f}.")
    return notes


def list_references() -> list[Reference]:
    """All published rows that the package holds, in the order of their files."""
    return list(_references().values())


def reference_groups() -> dict[str, list[str]]:
    """Group name (the source) -> names of its references."""
    groups: dict[str, list[str]] = {}
    for reference in list_references():
        groups.setdefault(reference.group, []).append(reference.name)
    return groups


@lru_cache(maxsize=1)
def _references() -> dict[str, Reference]:
    folder = files("mmad_cli.results").joinpath("references", "data")
    found: dict[str, Reference] = {}
    for file in sorted(folder.iterdir(), key=lambda item: item.name):
        if file.name.endswith(".json"):
            for reference in _read_references(file.read_text(encoding="utf-8"), file.name):
                if reference.name in found:
                    raise DataError(f"{file.name}: reference {reference.name!r} exists already")
                found[reference.name] = reference
    return found


def _read_references(text: str, file: str) -> list[Reference]:
    try:
        content = _ReferenceFile.model_validate_json(text)
    except ValidationError as error:
        raise DataError(f"{file}: not a file of published numbers: {error}") from error
    references = []
    for reference in content.references:
        if reference.source not in content.sources:
            raise DataError(f"{file}: {reference.name}: source {reference.source!r} is not among the sources")
        text = f"{reference.published_as}: {content.sources[reference.source].text()}"
        references.append(reference.model_copy(update={"source_text": text}))
    return references


def resolve_reference(name: str, run: RunResult, runs_root: Path = Path("runs")) -> ReferenceTable:
    """What `run` is to be compared with.

    `name` is, tried in this order: the name of a reference; its leading part or parts (`m3dm-paper`,
    `btf-readme:fpfh`), which stand for the row that fits the run's method and variant, and then dataset,
    protocol and shots; a run folder, a `summary.json` or a JSON file `{"categories": {name: {metric: value}},
    "mean": {...}}`; the id of a run under `runs_root`.

    Raises UsageError for an unknown name (with the near ones) and where no row or several rows fit the run,
    DataError for a file that cannot be used.
    """
    known = _references()
    if name in known:
        return known[name].table()
    candidates = [r for r in known.values() if r.name.startswith(f"{name}:")]
    if candidates:
        return _select(name, candidates, run).table()
    for path in (Path(name), runs_root / name):
        if path.exists():
            return _from_path(path)
    if "/" in name or name.endswith(".json"):
        raise DataError(f"{OPTION} {name}: no such file or folder")
    raise _unknown_reference(name, known)


def _unknown_reference(name: str, known: Mapping[str, Reference], option: str = OPTION) -> UsageError:
    groups = reference_groups()
    near = difflib.get_close_matches(name, [*known, *groups], n=1, cutoff=0.5)
    # Without a near name the groups are listed alone: all names would fill a screen.
    what = "reference, run or file" if option == OPTION else "reference"
    return unknown_name(what, name, [*known, *groups] if near else groups, option)


def is_about(name: str, run: RunResult) -> bool:
    """Whether published rows are of the method, variant and dataset of a run; true for all but published rows."""
    rows = [r for r in list_references() if r.name == name or r.name.startswith(f"{name}:")]
    return not rows or any(
        fold(row.method) == fold(run.method.name)
        and (not row.variants or fold(run.method.variant) in map(fold, row.variants))
        and _same_dataset(row.dataset, run.dataset.name)
        for row in rows
    )


def _select(name: str, candidates: list[Reference], run: RunResult) -> Reference:
    """The one candidate that fits the run: method and variant must, the rest decides between several."""
    variant, method = fold(run.method.variant), fold(run.method.name)
    same_method = [c for c in candidates if fold(c.method) == method]
    fitting = [c for c in same_method if not c.variants or variant in map(fold, c.variants)]
    # A row of the very variant goes before a row of the method's main setting.
    fitting = _prefer(fitting, lambda c: bool(c.variants))
    fitting = _prefer(fitting, lambda c: _same_dataset(c.dataset, run.dataset.name))
    fitting = _prefer(fitting, lambda c: c.shots == run.shots)
    fitting = _prefer(fitting, lambda c: c.protocol == run.preprocessing.protocol)
    if len(fitting) == 1:
        return fitting[0]
    what = f"method {run.method.name}, variant {run.method.variant}, protocol {run.preprocessing.protocol}"
    names = ", ".join(c.name for c in fitting or same_method or candidates)
    problem = "several rows fit" if fitting else "no row is for"
    raise UsageError(f"{OPTION} {name}: {problem} {what}; name one of: {names}")


def find_references(name: str, option: str) -> list[Reference]:
    """The published rows that a name, its leading part or parts, or `all` stands for.

    Raises UsageError naming the option, with the near names.
    """
    found = [r for r in list_references() if name in ("all", r.name) or r.name.startswith(f"{name}:")]
    if not found:
        raise _unknown_reference(name, _references(), option)
    return found


def _prefer(candidates: list[Reference], fits: Callable[[Reference], bool]) -> list[Reference]:
    return [c for c in candidates if fits(c)] or candidates


def _same_dataset(expected: str, name: str) -> bool:
    return fold(expected) in fold(name)


def mismatches(run: RunResult, table: ReferenceTable) -> list[str]:
    """Where a run and its reference differ in more than the result: for the head of a comparison."""
    remarks = [f"the run is not comparable: {reason}" for reason in run.not_comparable]
    dataset, protocol = run.dataset.name, run.preprocessing.protocol
    if table.dataset and not _same_dataset(table.dataset, dataset):
        remarks.append(f"the reference is for dataset {table.dataset}, the run is on {dataset}")
    if table.protocol and table.protocol != protocol:
        remarks.append(f"the reference is for preprocessing protocol {table.protocol}, the run used {protocol}")
    if table.dataset and table.shots != run.shots:
        remarks.append(f"the reference is for {_shots(table.shots)}, the run used {_shots(run.shots)}")
    return remarks


def _shots(shots: int | None) -> str:
    return "all training samples" if shots is None else f"{shots} training samples"


_NUMBERS_KEYS = ("categories", "mean", "made_from")


def _from_path(path: Path) -> ReferenceTable:
    return _from_run(RunResult.from_disk(path), path) if path.is_dir() else read_reference_file(path)


def read_reference_file(path: Path) -> ReferenceTable:
    """A reference from a `summary.json` or a plain file of numbers. Raises DataError or UsageError naming the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{OPTION} {path}: cannot be read as JSON: {error}") from error
    if isinstance(data, dict) and "schema" in data:
        return _from_run(RunResult.from_data(data, path), path)
    return _from_numbers(data, path)


def _from_run(run: RunResult, path: Path) -> ReferenceTable:
    ok = {name: result for name, result in run.categories.items() if result.status == "ok"}
    failed = run.failed_categories
    notes = [f"failed in the reference run and not compared: {', '.join(failed)}"] if failed else []
    notes += [f"the reference run is not comparable with published numbers: {r}" for r in run.not_comparable]
    return ReferenceTable(
        name=run.run_id,
        source=f"run {path}",
        rows={name: _defined(result.metrics) for name, result in ok.items()},
        mean=_defined(run.mean),
        notes=tuple(notes),
        dataset=run.dataset.name,
        protocol=run.preprocessing.protocol,
        shots=run.shots,
    )


def _defined(values: Mapping[str, float | None]) -> dict[str, float]:
    return {key: value for key, value in values.items() if value is not None}


def _from_numbers(data: Any, path: Path) -> ReferenceTable:
    """A plain file of numbers; unknown keys are errors, else a typing error would switch the check off."""
    if not isinstance(data, dict) or not {"categories", "mean"} & data.keys():
        raise DataError(f'{path}: expected {{"categories": {{name: {{metric: value}}}}, "mean": {{metric: value}}}}')
    for key in data:
        if key not in _NUMBERS_KEYS:
            raise unknown_name("key", key, _NUMBERS_KEYS, str(path))
    categories = data.get("categories") or {}
    if not isinstance(categories, dict):
        raise DataError(f"{path}: 'categories' should map names to metrics, got {type(categories).__name__}")
    rows = {str(name): _numbers(row, f"{path}: {name}") for name, row in categories.items()}
    mean = _numbers(data.get("mean") or {}, f"{path}: mean")
    if not mean and not any(rows.values()):
        raise DataError(f"{path}: holds no numbers")
    made_from = data.get("made_from") or {}
    if not isinstance(made_from, dict):
        raise DataError(f"{path}: 'made_from' should be a table, got {type(made_from).__name__}")
    run = f", made from run {made_from['run_id']}" if "run_id" in made_from else ""
    return ReferenceTable(
        name=path.name,
        source=f"file {path}{run}",
        rows=rows,
        mean=mean,
        dataset=made_from.get("dataset"),
        protocol=made_from.get("protocol"),
        shots=made_from.get("shots"),
    )


def _numbers(row: Any, place: str) -> dict[str, float]:
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected {{metric: value}}, got {row!r}")
    values = {}
    for key, value in row.items():
        if key not in METRICS:
            raise unknown_name("metric", key, METRICS, place)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise DataError(f"{place}: {key} should be a number between 0 and 1, got {value!r}")
        values[key] = float(value)
    return values


def match_category(name: str, known: Iterable[str]) -> str | None:
    """The known category that `name` means: the same spelling, else the only one that agrees folded."""
    known = list(known)
    if name in known:
        return name
    folded = [other for other in known if fold(other) == fold(name)]
    return folded[0] if len(folded) == 1 else None

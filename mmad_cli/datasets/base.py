"""What every dataset reader offers: samples found on disk, what is wrong with them, and one scan read and checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from mmad_cli.errors import DataError, UsageError
from mmad_cli.types import IndexArray, Sample, SampleRef

_NAMED_AT_MOST = 8

Modality = Literal["rgb", "3d"]


@dataclass(frozen=True)
class Finding:
    """Something to know about a dataset: an `error` makes a sample or category unusable, a `warning` does not.

    `file` is an absolute path (of a file or a folder) or empty where the finding concerns a whole category.
    """

    level: Literal["error", "warning"]
    category: str
    file: str
    message: str
    advice: str = ""

    def __str__(self) -> str:
        place = self.file or self.category
        return f"{place}: {self.message}" + (f"; {self.advice}" if self.advice else "")

    def as_dict(self) -> dict[str, str]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Listing:
    """The samples of a category that are complete on disk, and what was found beside them."""

    refs: tuple[SampleRef, ...]
    findings: tuple[Finding, ...] = ()

    @property
    def errors(self) -> list[Finding]:
        """Findings that make the category unusable as it is."""
        return [finding for finding in self.findings if finding.level == "error"]


@dataclass(frozen=True)
class Examination:
    """One scan read from disk; `sample` is None where an error was found."""

    sample: Sample | None
    findings: tuple[Finding, ...] = ()

    @property
    def errors(self) -> list[Finding]:
        """Findings that make the scan unusable."""
        return [finding for finding in self.findings if finding.level == "error"]


class Dataset(Protocol):
    """A dataset folder of one layout. Read-only, and small enough to be sent to another process."""

    @property
    def name(self) -> str:
        """The name of the dataset in `mmad_cli.datasets.DATASETS`; run results carry it."""

    @property
    def layout(self) -> str:
        """The name of the layout on disk; several datasets may share one."""

    @property
    def root(self) -> Path:
        """The folder that holds the categories."""

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """What its scans hold. Without `rgb` the image of every sample is black and must not be used."""

    @property
    def own_background(self) -> bool:
        """Whether its samples come with a `background`: protocols remove that instead of searching for a table."""

    def departures(self) -> list[str]:
        """In what its settings depart from how the published numbers were made."""

    def categories(self) -> list[str]:
        """Categories, sorted."""

    def samples(self, category: str) -> list[SampleRef]:
        """Train, validation and test samples, each sorted by defect, then stem. DataError names what does not pair."""

    def read(self, ref: SampleRef) -> Sample:
        """Read and check one scan. Raises DataError naming the file."""

    def list_samples(self, category: str) -> Listing:
        """As `samples`, but collects what is wrong instead of raising."""

    def examine(self, ref: SampleRef) -> Examination:
        """As `read`, but reads every file of the scan and collects what is wrong instead of raising."""


@dataclass(frozen=True)
class ScanLabels:
    """What was computed of one scan file: its number of points, and the sorted indices of the marked ones."""

    points: int
    marked: IndexArray


@runtime_checkable
class PseudoLabelled(Protocol):
    """What a dataset offers on top of `Dataset` when an algorithm marks the anomalies, not a person.

    Labels of a scan file take long, and which samples there are depends on all of them; the stages keep them in the
    store. `Dataset.samples` gives the same samples, and computes the labels whenever it is called in a new process.
    """

    def scan_files(self, category: str) -> list[Path]:
        """The scan files of a category, in the order that counts."""

    def labelling(self) -> dict[str, Any]:
        """Everything but the file that decides the labels, as plain values: it enters the key of the store."""

    def label_scan(self, path: Path) -> ScanLabels:
        """Compute the labels of one scan file. Raises DataError naming the file."""

    def list_labelled(self, category: str, labels: Mapping[Path, ScanLabels]) -> Listing:
        """The samples of a category, given the labels of its scan files."""


@runtime_checkable
class TakesIncomplete(Protocol):
    """What a dataset offers on top of `Dataset` when it can list test samples whose image or cloud is missing."""

    def with_incomplete(self) -> Dataset:
        """The same dataset, such samples included; `SampleRef.missing` tells what each lacks."""


def modality(read: str) -> Modality:
    """The modality that a feature's input (`rgb`, `depth`, `xyz`, ...) belongs to."""
    return "rgb" if read == "rgb" else "3d"


def require_modalities(dataset: Dataset, inputs: Iterable[str], what: str) -> None:
    """UsageError where `what` (a method, a backbone) needs an image and the dataset has none.

    inputs: what the features read, `rgb`, `depth` or `xyz`.
    """
    if "rgb" in inputs and "rgb" not in dataset.modalities:
        raise UsageError(
            f"{what} needs the modality rgb, and the dataset {dataset.name} in {dataset.root} has only "
            f"{', '.join(dataset.modalities)}; choose a variant that works on 3D alone, see `mmad list variants`"
        )


def raw_files(ref: SampleRef) -> list[tuple[str, Path]]:
    """(role, path) of every raw file of a scan, sorted by role: the order for digests."""
    return sorted(ref.files.items())


def raise_errors(findings: Sequence[Finding]) -> None:
    """DataError that lists the errors among `findings`, if there are any."""
    errors = [str(finding) for finding in findings if finding.level == "error"]
    if not errors:
        return
    shown = errors[:_NAMED_AT_MOST]
    if len(errors) > len(shown):
        shown.append(f"and {len(errors) - len(shown)} more; `mmad check` lists all")
    raise DataError("\n".join(shown))

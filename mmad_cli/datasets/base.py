"""What every dataset reader offers: samples found on disk, what is wrong with them, and one scan read and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

from mmad_cli.errors import DataError
from mmad_cli.types import Sample, SampleRef

_NAMED_AT_MOST = 8


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

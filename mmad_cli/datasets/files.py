"""Own scans in a layout of one's own: a pattern per split and kind of file tells where they are.

Patterns are paths below the root with the placeholders {category}, {defect} and {stem}, each standing for one folder
name or a part of a name. What the files hold is the same as in the layout of MVTec 3D-AD.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from mmad_cli.datasets.base import Examination, Finding, Listing, Modality, raise_errors
from mmad_cli.datasets.scan import examine_scan
from mmad_cli.errors import DataError, UsageError, unknown_name
from mmad_cli.types import GOOD, SPLITS, Sample, SampleRef, Split

ROLES = ("rgb", "xyz", "gt")
PLACEHOLDERS = ("category", "defect", "stem")

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")

Place = tuple[str, str, str]
"""Category, defect and stem."""


@dataclass(frozen=True)
class FilesDataset:
    """A folder in which `patterns`, by split and role, tell where the files are.

    good: what stands in the place of {defect} for good samples; a pattern without {defect} is for good samples only.
    category: the name of the only category where patterns have no {category}.
    """

    root: Path
    patterns: Mapping[Split, Mapping[str, str]]
    good: str = GOOD
    category: str = ""
    name: str = field(default="folder", init=False)
    layout: str = field(default="files", init=False)
    modalities: tuple[Modality, ...] = field(default=("rgb", "3d"), init=False)
    own_background: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if "train" not in self.patterns or "test" not in self.patterns:
            raise UsageError("files: patterns for train and test are needed, as in [train] and then rgb = ...")
        for split, patterns in self.patterns.items():
            _check_patterns(split, patterns)

    @classmethod
    def from_description(cls, root: Path, values: Mapping[str, Any]) -> FilesDataset:
        """The dataset from the values of a `dataset.toml`. Raises UsageError for patterns that cannot be used."""
        patterns = {split: dict(values[split]) for split in SPLITS if split in values}
        return cls(root, patterns, values.get("good", GOOD), values.get("category", root.name))

    def departures(self) -> list[str]:
        """Nothing is published on it."""
        return []

    def categories(self) -> list[str]:
        """Categories of which there is an image or a cloud, sorted."""
        found = {
            place[0]
            for patterns in self.patterns.values()
            for role in ("rgb", "xyz")
            for place, _ in self._find(patterns[role])
        }
        return sorted(found)

    def samples(self, category: str) -> list[SampleRef]:
        """Train, validation and test samples, each by defect, then stem. DataError names what does not pair."""
        listing = self.list_samples(category)
        raise_errors(listing.findings)
        return list(listing.refs)

    def list_samples(self, category: str) -> Listing:
        """Complete samples and everything that does not fit. Raises DataError where the category does not exist."""
        refs: list[SampleRef] = []
        findings: list[Finding] = []
        for split in SPLITS:
            patterns = self.patterns.get(split)
            if patterns is not None:
                found = list(self._list_split(category, split, patterns, findings))
                refs.extend(sorted(found, key=lambda ref: (ref.defect, ref.stem)))
        if not refs and not findings:
            known = ", ".join(self.categories()) or "none"
            raise DataError(f"{self.root}: there is no category {category}; known: {known}")
        return Listing(tuple(refs), tuple(findings))

    def read(self, ref: SampleRef) -> Sample:
        """Read one scan; the ground truth of a good sample is not read. Raises DataError naming the file."""
        examination = examine_scan(ref, read_unused=False)
        raise_errors(examination.findings)
        if examination.sample is None:
            raise DataError(f"{ref.category}/{ref.id}: cannot be read")
        return examination.sample

    def examine(self, ref: SampleRef) -> Examination:
        """Read every file of one scan and collect what is wrong."""
        return examine_scan(ref, read_unused=True)

    def _list_split(
        self, category: str, split: Split, patterns: Mapping[str, str], findings: list[Finding]
    ) -> Iterator[SampleRef]:
        places = {place: None for role in ("xyz", "rgb") for place, _ in self._find(patterns[role], category)}
        for place in places:
            defect, stem = place[1:]
            paths = {role: self.root / _fill(pattern, place, self.good) for role, pattern in patterns.items()}
            files = {role: path for role, path in paths.items() if path.is_file()}
            if split != "test" and defect != GOOD:
                message = f"is ignored: of {split} only good samples are used"
                advice = "move defective samples to test"
                findings.append(Finding("warning", category, str(next(iter(files.values()))), message, advice))
                continue
            needed = ("rgb", "xyz") if defect == GOOD else ROLES
            missing = [str(paths[role].relative_to(self.root)) for role in needed if role not in files]
            if missing:
                there = [str(path.relative_to(self.root)) for path in files.values()]
                message = f"{', '.join(missing)} is missing, {', '.join(there)} is there"
                advice = "files are paired by the patterns of dataset.toml; add what is missing or remove the rest"
                findings.append(Finding("error", category, str(self.root), message, advice))
                continue
            yield SampleRef(category, split, defect, stem, files)

    def _find(self, pattern: str, category: str | None = None) -> Iterator[tuple[Place, Path]]:
        """Files that fit a pattern, of one category or all."""
        expression = _expression(pattern)
        for path in sorted(self.root.glob(_PLACEHOLDER.sub("*", _escape(pattern)))):
            match = expression.fullmatch(path.relative_to(self.root).as_posix())
            if match is None or path.is_dir() or path.name.startswith("."):
                continue
            named = match.groupdict()
            place = (named.get("category", self.category), named.get("defect", self.good), named["stem"])
            if category is None or place[0] == category:
                yield (place[0], GOOD if place[1] == self.good else place[1], place[2]), path


def _fill(pattern: str, place: Place, good: str) -> str:
    values = dict(zip(PLACEHOLDERS, place, strict=True))
    values["defect"] = good if place[1] == GOOD else place[1]
    return _PLACEHOLDER.sub(lambda match: values[match[1]], pattern)


def _expression(pattern: str) -> re.Pattern[str]:
    """What a path must look like; a placeholder that is repeated stands for the same text again."""
    text, known = "", set()
    for index, part in enumerate(_PLACEHOLDER.split(pattern)):
        if index % 2 == 0:
            text += re.escape(part)
        else:
            text += f"(?P={part})" if part in known else f"(?P<{part}>[^/]+)"
            known.add(part)
    return re.compile(text)


def _escape(pattern: str) -> str:
    """The pattern with what glob takes for a wildcard taken literally."""
    return re.sub(r"([*?[])", r"[\1]", pattern)


def _check_patterns(split: str, patterns: Mapping[str, Any]) -> None:
    for role, pattern in patterns.items():
        if role not in ROLES:
            raise unknown_name("kind of file", role, ROLES, f"[{split}]")
        if not isinstance(pattern, str) or Path(pattern).is_absolute() or ".." in Path(pattern).parts:
            raise UsageError(f"[{split}] {role} = {pattern!r}: should be a path below the root, such as a/{{stem}}.png")
        for name in _PLACEHOLDER.findall(pattern):
            if name not in PLACEHOLDERS:
                raise unknown_name("placeholder", name, PLACEHOLDERS, f"[{split}] {role}")
        if "{stem}" not in pattern:
            raise UsageError(f"[{split}] {role} = {pattern!r}: should contain {{stem}}, what tells samples apart")
    missing = [role for role in ("rgb", "xyz") if role not in patterns]
    if missing:
        raise UsageError(f"[{split}]: has no pattern for {' and '.join(missing)}")
    needed = {name for role in ("rgb", "xyz") for name in _PLACEHOLDER.findall(cast("str", patterns[role]))}
    for role in patterns:
        lost = needed - set(_PLACEHOLDER.findall(patterns[role])) if role != "gt" else set()
        if lost:
            raise UsageError(f"[{split}] {role}: lacks {', '.join(f'{{{name}}}' for name in sorted(lost))}")
    if split == "test" and "{defect}" in patterns["xyz"] and "gt" not in patterns:
        raise UsageError("[test]: has no pattern for gt; defective samples need a mask")

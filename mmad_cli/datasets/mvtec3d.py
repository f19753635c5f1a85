"""MVTec 3D-AD on disk (Bergmann et al., VISAPP 2022), and every dataset in its layout.

    <root>/<category>/<split>/<defect>/{rgb/*.png, xyz/*.tiff, gt/*.png}

Splits are train, validation (may be absent) and test. Training and validation use `good` only, as all published codes
do. Ground truth of good samples is listed but not used. Hidden files, and other files beside the folders, are ignored.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mmad_cli.datasets.base import Examination, Finding, Listing, Modality, modality, raise_errors
from mmad_cli.datasets.scan import examine_scan
from mmad_cli.errors import DataError
from mmad_cli.types import GOOD, SPLITS, Sample, SampleRef, Split

SYNTHETIC_MARKER = "synthetic.json"

# Training samples per category of the published dataset
TRAIN_COUNTS = {
    "bagel": 244,
    "cable_gland": 223,
    "carrot": 286,
    "cookie": 210,
    "dowel": 288,
    "foam": 236,
    "peach": 361,
    "potato": 300,
    "rope": 298,
    "tire": 210,
}

ENDINGS = {"rgb": (".png",), "xyz": (".tiff", ".tif"), "gt": (".png",)}

LAYOUT = "<root>/<category>/<split>/<defect>/{rgb/*.png, xyz/*.tiff, gt/*.png}, split train, validation or test"


@dataclass(frozen=True)
class Mvtec3dDataset:
    """A folder in the layout of MVTec 3D-AD; `only` restricts it to one category.

    incomplete: test samples without image or without cloud are listed, with a warning, instead of being errors.
    """

    root: Path
    only: str | None = None
    incomplete: bool = False

    @property
    def name(self) -> str:
        """`synthetic` for a generated dataset, `mvtec3d` with categories of that name, `folder` for own data."""
        if (self.root / SYNTHETIC_MARKER).is_file():
            return "synthetic"
        return "mvtec3d" if TRAIN_COUNTS.keys() & set(self.categories()) else "folder"

    @property
    def layout(self) -> str:
        """`mvtec3d`, whatever the content."""
        return "mvtec3d"

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """Image and cloud."""
        return ("rgb", "3d")

    @property
    def own_background(self) -> bool:
        """The table has to be found."""
        return False

    def departures(self) -> list[str]:
        """Nothing can be set."""
        return []

    def with_incomplete(self) -> Mvtec3dDataset:
        """The same folder; test samples need not have both image and cloud."""
        return replace(self, incomplete=True)

    def categories(self) -> list[str]:
        """Folders with at least one split folder, sorted; or the only one."""
        if self.only is not None:
            return [self.only]
        return sorted(folder.name for folder in _folders(self.root) if _is_category(folder))

    def samples(self, category: str) -> list[SampleRef]:
        """Train, validation and test samples, each by defect, then stem. DataError names what does not pair."""
        listing = self.list_samples(category)
        raise_errors(listing.findings)
        return list(listing.refs)

    def list_samples(self, category: str) -> Listing:
        """Complete samples and everything that does not fit. Raises DataError where the category does not exist."""
        folder = self.root / category
        if category not in self.categories() or not folder.is_dir():
            raise DataError(f"{folder}: there is no such category; known: {', '.join(self.categories()) or 'none'}")
        refs: list[SampleRef] = []
        findings: list[Finding] = []
        for split in SPLITS:
            for defect in _defects(folder, category, split, findings):
                incomplete = self.incomplete and split == "test"
                refs.extend(_list_defect(folder / split / defect, category, split, defect, findings, incomplete))
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


def detect(folder: Path) -> Mvtec3dDataset | None:
    """The dataset in `folder`, which is a root or one category; None where the layout is another."""
    if _has_scans(folder):
        return Mvtec3dDataset(folder.parent, folder.name)
    if any(_has_scans(child) for child in _folders(folder)):
        return Mvtec3dDataset(folder)
    return None


def _folders(folder: Path) -> list[Path]:
    return [child for child in sorted(folder.iterdir()) if child.is_dir() and not child.name.startswith(".")]


def _is_category(folder: Path) -> bool:
    return any((folder / split).is_dir() for split in SPLITS)


def _has_scans(folder: Path) -> bool:
    """Whether some `<split>/<defect>` holds an xyz folder: what no 2D dataset has."""
    splits = (folder / split for split in SPLITS if (folder / split).is_dir())
    return any((defect / "xyz").is_dir() for split in splits for defect in _folders(split))


def _defects(folder: Path, category: str, split: Split, findings: list[Finding]) -> Iterator[str]:
    """Defect folders of a split that hold scans and are used."""
    if not (folder / split).is_dir():
        return
    for path in _folders(folder / split):
        if not (path / "rgb").is_dir() and not (path / "xyz").is_dir():
            findings.append(Finding("warning", category, str(path), "holds neither rgb/ nor xyz/ and is ignored"))
        elif split != "test" and path.name != GOOD:
            message = f"is ignored: of {split} only {GOOD}/ is used"
            findings.append(Finding("warning", category, str(path), message, "move defective samples to test/"))
        else:
            yield path.name


def _list_defect(
    folder: Path, category: str, split: Split, defect: str, findings: list[Finding], incomplete: bool
) -> Iterator[SampleRef]:
    """Samples whose files are complete, or lack one modality where that is allowed, in the order of their stems."""
    files = {role: _by_stem(folder / role, category, ENDINGS[role], findings) for role in ENDINGS}
    needed = ["rgb", "xyz"] if defect == GOOD else ["rgb", "xyz", "gt"]
    stems = sorted(set().union(*files.values()))
    for stem in stems:
        missing = [role for role in needed if stem not in files[role]]
        allowed = incomplete and missing in (["rgb"], ["xyz"])
        if missing:
            finding = _unpaired(folder, category, stem, files, missing)
            findings.append(replace(finding, level="warning") if allowed else finding)
        if not missing or allowed:
            found = {role: by[stem] for role, by in files.items() if stem in by}
            yield SampleRef(category, split, defect, stem, found, missing=tuple(modality(role) for role in missing))


def _by_stem(folder: Path, category: str, endings: tuple[str, ...], findings: list[Finding]) -> dict[str, Path]:
    if not folder.is_dir():
        return {}
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        message = f"cannot be listed ({error.strerror})"
        findings.append(Finding("error", category, str(folder), message, "check the permissions of the folder"))
        return {}
    named: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        if path.suffix.lower() in endings and not path.is_dir():
            named[path.stem].append(path)
        elif path.suffix.lower() not in (".txt", ".md", ".json", ".db", ".ini"):
            message = f"is ignored: only {' and '.join('*' + ending for ending in endings)} files belong here"
            findings.append(Finding("warning", category, str(path), message))
    for stem, same in named.items():
        if len(same) > 1:
            names = ", ".join(path.name for path in same)
            message = f"{len(same)} files for one sample {stem!r}: {names}"
            findings.append(Finding("error", category, str(folder), message, "keep one of them"))
    return {stem: same[0] for stem, same in named.items()}


def _unpaired(folder: Path, category: str, stem: str, files: dict[str, dict[str, Path]], missing: list[str]) -> Finding:
    there = ", ".join(f"{role}/{by[stem].name}" for role, by in files.items() if stem in by)
    wanted = ", ".join(f"{role}/{stem}{ENDINGS[role][0]}" for role in missing)
    return Finding(
        "error",
        category,
        str(folder),
        f"{wanted} is missing, {there} is there",
        "files are paired by their name; add what is missing or remove the rest",
    )

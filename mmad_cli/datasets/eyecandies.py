"""Eyecandies on disk (Bonfiglioli et al., ACCV 2022, arXiv 2210.04570), read as it is distributed.

    <root>/<Category>/<train|val|test_public|test_private>/data/<number>_<item>

Items of a sample: `image_0.png` to `image_5.png` (six lightings), `depth.png` (grey, 16 bit), `info_depth.yaml` (the
depths of codes 0 and 65535), `pose.txt` (4 x 4), `mask.png`; and `normals.png`, `metadata.yaml`, `obj_params.yaml` and
a mask per kind of defect, which are not used.

As the published codes do: `test_public` is the test split, since `test_private` has no ground truth; a test sample is
`bad` if its mask has a pixel that is not 0; cloud and background are those of `mmad_cli.preprocessing.conveyor`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmad_cli.datasets.base import Examination, Finding, Listing, Modality, raise_errors
from mmad_cli.datasets.scan import (
    COPY_AGAIN,
    UNREADABLE,
    Unusable,
    check_size,
    no_permission,
    one_line,
    read_depth,
    read_gt,
    read_rgb,
)
from mmad_cli.errors import DataError, UsageError
from mmad_cli.types import GOOD, Sample, SampleRef, Split

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mmad_cli.preprocessing.conveyor import BeltScan

CATEGORIES = (
    "CandyCane",
    "ChocolateCookie",
    "ChocolatePraline",
    "Confetto",
    "GummyBear",
    "HazelnutTruffle",
    "LicoriceSandwich",
    "Lollipop",
    "Marshmallow",
    "PeppermintCandy",
)
# Training samples per category of the published dataset
TRAIN_COUNTS = dict.fromkeys(CATEGORIES, 1000)

# Folder of every split that is used
SPLIT_FOLDERS: dict[Split, str] = {"train": "train", "validation": "val", "test": "test_public"}

BAD = "bad"

# The lighting that all published results use, of 0 to 5
PUBLISHED_LIGHT = 4
LIGHTS = 6

LAYOUT = (
    "<root>/<Category>/<train|val|test_public>/data/<number>_{image_0.png ... image_5.png, depth.png, info_depth.yaml, "
    "pose.txt, mask.png} (Eyecandies)"
)

# Items by role; the image is added by its number
_ITEMS = {
    "depth": ("depth.png",),
    "info": ("info_depth.yaml", "info_depth.yml"),
    "pose": ("pose.txt",),
    "gt": ("mask.png",),
}
_FILE = re.compile(r"(\d+)_(\w+\.(?:png|ya?ml|txt))")
_IMAGE = re.compile(r"image_(\d)\.png")
_NUMBER = r"\b{name}['\"]?\s*:\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?![\w.])"
_MOST_REMEMBERED = 4096


@dataclass(frozen=True)
class EyecandiesDataset:
    """A folder in the layout of Eyecandies.

    only: restricts it to one category. light: which of the images 0 to 5 is read as `rgb`: 0 all spotlights, 1 to 4 the
    one at the bottom, right, top, left, 5 global lighting.
    """

    root: Path
    only: str | None = None
    light: int = PUBLISHED_LIGHT

    def __post_init__(self) -> None:
        if self.light not in range(LIGHTS):
            raise UsageError(f"light {self.light}: Eyecandies has the images 0 to {LIGHTS - 1}")

    @property
    def name(self) -> str:
        """`eyecandies` with categories of that name, `folder` for own data in its layout."""
        return "eyecandies" if TRAIN_COUNTS.keys() & set(self.categories()) else "folder"

    @property
    def layout(self) -> str:
        """`eyecandies`, whatever the content."""
        return "eyecandies"

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """Image and cloud."""
        return ("rgb", "3d")

    @property
    def own_background(self) -> bool:
        """What does not lie on the belt is known from the geometry of the scene."""
        return True

    def departures(self) -> list[str]:
        """Another image than the published one."""
        if self.light == PUBLISHED_LIGHT:
            return []
        return [f"light: image {self.light} instead of the published image {PUBLISHED_LIGHT}"]

    def categories(self) -> list[str]:
        """Folders with the data of at least one split, sorted; or the only one."""
        if self.only is not None:
            return [self.only]
        return sorted(folder.name for folder in _folders(self.root) if _is_category(folder))

    def samples(self, category: str) -> list[SampleRef]:
        """Train, validation and test samples, each by defect, then stem. DataError names what is missing."""
        listing = self.list_samples(category)
        raise_errors(listing.findings)
        return list(listing.refs)

    def list_samples(self, category: str) -> Listing:
        """Complete samples and everything that does not fit. Raises DataError where the category does not exist.

        The masks of test samples are read, since nothing else tells good from bad.
        """
        folder = self.root / category
        if category not in self.categories() or not folder.is_dir():
            raise DataError(f"{folder}: there is no such category; known: {', '.join(self.categories()) or 'none'}")
        refs: list[SampleRef] = []
        findings: list[Finding] = []
        for split, name in SPLIT_FOLDERS.items():
            found = list(self._list_split(folder / name / "data", category, split, findings))
            refs.extend(sorted(found, key=lambda ref: (ref.defect, ref.stem)))
        return Listing(tuple(refs), tuple(findings))

    def read(self, ref: SampleRef) -> Sample:
        """Read one scan; the mask of a good sample is not read again. Raises DataError naming the file."""
        examination = _examine(ref, read_unused=False)
        raise_errors(examination.findings)
        if examination.sample is None:
            raise DataError(f"{ref.category}/{ref.id}: cannot be read")
        return examination.sample

    def examine(self, ref: SampleRef) -> Examination:
        """Read every file of one scan that is used, and collect what is wrong."""
        return _examine(ref, read_unused=True)

    def _list_split(self, folder: Path, category: str, split: Split, findings: list[Finding]) -> Iterator[SampleRef]:
        for stem, items in _by_stem(folder, category, findings).items():
            image = f"image_{self.light}.png"
            files = {role: items[name] for role, names in _ITEMS.items() for name in names if name in items}
            if image in items:
                files["rgb"] = items[image]
            wanted = {"rgb": image, **{role: names[0] for role, names in _ITEMS.items() if role != "gt"}}
            if split == "test":
                wanted["gt"] = _ITEMS["gt"][0]
            missing = [name for role, name in wanted.items() if role not in files]
            if missing:
                findings.append(_incomplete(folder, category, stem, sorted(items), missing, self.light))
                continue
            defect = GOOD
            if split == "test":
                try:
                    defect = BAD if _is_marked(files["gt"]) else GOOD
                except Unusable as problem:
                    findings.append(_finding(category, problem))
                    continue
            yield SampleRef(category, split, defect, stem, files)


def detect(folder: Path) -> EyecandiesDataset | None:
    """The dataset in `folder`, which is a root or one category; None where the layout is another."""
    if _is_category(folder):
        return EyecandiesDataset(folder.parent, folder.name)
    if any(_is_category(child) for child in _folders(folder)):
        return EyecandiesDataset(folder)
    return None


def _folders(folder: Path) -> list[Path]:
    return [child for child in sorted(folder.iterdir()) if child.is_dir() and not child.name.startswith(".")]


def _is_category(folder: Path) -> bool:
    """Whether the data folder of some split holds a file that is named as an item of a sample."""
    places = (folder / name / "data" for name in SPLIT_FOLDERS.values())
    return any(_FILE.fullmatch(path.name) for place in places if place.is_dir() for path in place.iterdir())


def _by_stem(folder: Path, category: str, findings: list[Finding]) -> dict[str, dict[str, Path]]:
    """Files by number, then item, numbers ascending."""
    if not folder.is_dir():
        return {}
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        message = f"cannot be listed ({error.strerror})"
        findings.append(Finding("error", category, str(folder), message, "check the permissions of the folder"))
        return {}
    named: dict[str, dict[str, Path]] = defaultdict(dict)
    for path in paths:
        match = _FILE.fullmatch(path.name)
        if match and not path.is_dir():
            named[match[1]][match[2]] = path
    return dict(sorted(named.items()))


def _incomplete(folder: Path, category: str, stem: str, items: list[str], missing: list[str], light: int) -> Finding:
    wanted = ", ".join(f"{stem}_{name}" for name in missing)
    message = f"{wanted} is missing, {', '.join(f'{stem}_{name}' for name in items)} is there"
    advice = "unpack the category again, or remove the rest of the sample"
    lights = [match[1] for name in items if (match := _IMAGE.fullmatch(name))]
    if missing == [f"image_{light}.png"] and lights:
        advice += f"; the image is chosen by the setting light, and this sample has {', '.join(lights)}"
    return Finding("error", category, str(folder), message, advice)


def _finding(category: str, problem: Unusable) -> Finding:
    return Finding("error", category, str(problem.path), problem.message, problem.advice)


def _is_marked(path: Path) -> bool:
    """Whether a mask has a pixel that is not 0; remembered as long as the file stays the same. Raises Unusable."""
    try:
        state = path.stat()
    except OSError as error:
        raise Unusable(path, f"cannot be read ({error.strerror})", COPY_AGAIN) from error
    return _marked_in_state(path, (state.st_size, state.st_mtime_ns, state.st_ctime_ns))


@lru_cache(maxsize=_MOST_REMEMBERED)
def _marked_in_state(path: Path, state: tuple[int, ...]) -> bool:
    return bool(read_gt(path).any())


def _examine(ref: SampleRef, read_unused: bool) -> Examination:
    findings: list[Finding] = []
    found: dict[str, Any] = {}
    readers = {"depth": read_depth, "info": read_depth_bounds, "pose": read_pose, "rgb": read_rgb, "gt": read_gt}
    for role, read in readers.items():
        if role not in ref.files or (role == "gt" and ref.defect == GOOD and not read_unused):
            continue
        path = ref.files[role]
        try:
            found[role] = read(path)
            if role in ("rgb", "gt"):
                check_size(path, found[role], found.get("depth"), role)
        except Unusable as problem:
            findings.append(_finding(ref.category, problem))
    if findings:
        return Examination(None, tuple(findings))
    try:
        scan = _belt_scan(ref, found)
    except Unusable as problem:
        return Examination(None, (_finding(ref.category, problem),))
    marked = found.get("gt")
    if ref.defect == GOOD and marked is not None and marked.any():
        message = f"marks {int(marked.sum())} pixels of a good sample as defective; they are ignored"
        findings.append(Finding("warning", ref.category, str(ref.files["gt"]), message))
    mask = np.zeros(scan.background.shape, dtype=bool)
    if ref.label and marked is not None:
        mask = marked
    if scan.background.all():
        message = "every pixel is background by the published rule; no point is left"
        advice = "check that depth, info_depth and pose belong together, or use --protocol none"
        findings.append(Finding("warning", ref.category, str(ref.files["depth"]), message, advice))
    info = {"background_value": [float(value) for value in scan.background_value]}
    sample = Sample(
        ref.category, ref.split, ref.defect, ref.stem, found["rgb"], scan.xyz, mask, info, background=scan.background
    )
    return Examination(sample, tuple(findings))


def _belt_scan(ref: SampleRef, found: dict[str, Any]) -> BeltScan:
    """The cloud of a scan. Raises Unusable where the files do not give one."""
    from mmad_cli.preprocessing.conveyor import belt_scan, depth_in_metres, world_points

    try:
        depth = depth_in_metres(found["depth"], *found["info"])
        scan = belt_scan(world_points(depth, found["pose"]), *depth.shape)
    except ValueError as error:
        raise Unusable(ref.files["pose"], f"gives no point cloud ({error})", COPY_AGAIN) from error
    if not np.isfinite(scan.xyz).all():
        raise Unusable(ref.files["pose"], "gives points that are not finite", COPY_AGAIN)
    return scan


def read_depth_bounds(path: Path) -> tuple[float, float]:
    """Depths in metres of the codes 0 and 65535: `min` and `max` of `normalization`. Raises Unusable."""
    text = _text(path)
    bounds = [re.search(_NUMBER.format(name=name), text) for name in ("min", "max")]
    if bounds[0] is None or bounds[1] is None:
        missing = " and ".join(name for name, bound in zip(("min", "max"), bounds, strict=True) if bound is None)
        raise Unusable(path, f"has no number for {missing}", "expected are normalization: min and max, in metres")
    low, high = float(bounds[0][1]), float(bounds[1][1])
    if not 0 < low <= high:
        raise Unusable(path, f"has the depths min {low:g} and max {high:g}", "expected is 0 < min <= max, in metres")
    return low, high


def read_pose(path: Path) -> NDArray[np.float64]:
    """Camera pose float64 (4, 4), numbers separated by white space, a row per line. Raises Unusable."""
    lines = [line.split() for line in _text(path).splitlines() if line.strip()]
    advice = "expected are 4 lines of 4 numbers separated by spaces"
    if [len(line) for line in lines] != [4] * 4:
        raise Unusable(path, f"has {len(lines)} lines of {sorted({len(line) for line in lines})} words", advice)
    try:
        pose = np.array([[float(word) for word in line] for line in lines])
    except ValueError as error:
        raise Unusable(path, f"holds something else than numbers ({one_line(error)})", advice) from error
    if not np.isfinite(pose).all() or abs(np.linalg.det(pose)) < np.finfo(np.float64).tiny:
        raise Unusable(path, "is no camera pose: the matrix has no inverse", COPY_AGAIN)
    return pose


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except PermissionError as error:
        raise no_permission(path, error) from error
    except UNREADABLE as error:
        raise Unusable(path, f"cannot be read as text ({one_line(error)})", COPY_AGAIN) from error

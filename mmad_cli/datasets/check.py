"""Whether a dataset folder can be used: every file is read, and everything that is found is reported at once."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmad_cli.datasets import open_dataset
from mmad_cli.datasets.base import Dataset, Finding, raw_files
from mmad_cli.errors import unknown_name
from mmad_cli.types import GOOD, SPLITS, BoolArray, Sample, SampleRef

Progress = Callable[[int, int], None]
Counts = dict[str, dict[str, dict[str, int]]]

FEW_TRAINING_SAMPLES = 10
LOW_VALID_SHARE = 0.05
HIGH_SHARE_WITHOUT_POINT = 0.5
# no scanner of this kind stands 10 m away, and in millimetres every one stands further
LARGEST_DEPTH_METRES = 10.0
BORDER_PIXELS = 10
BORDER_POINTS = 50

_HASH_BYTES = 16
# files whose content is that of one scan: cloud, image, depth image
_CONTENT_ROLES = ("xyz", "rgb", "depth")


@dataclass(frozen=True)
class CheckReport:
    """What was found in a dataset folder.

    counts: complete samples by category, split and defect. findings: in the order of categories.
    """

    root: Path
    layout: str
    counts: Counts
    findings: tuple[Finding, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether every sample and every category can be used as it is."""
        return not any(finding.level == "error" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "root": str(self.root),
            "layout": self.layout,
            "usable": self.usable,
            "counts": self.counts,
            "findings": [finding.as_dict() for finding in self.findings],
        }


@dataclass(frozen=True)
class _ScanFacts:
    """What is remembered of one scan; `kinds` are conditions that are reported once per category."""

    ref: SampleRef
    findings: tuple[Finding, ...] = ()
    kinds: tuple[str, ...] = ()
    digests: dict[str, str] = field(default_factory=dict)


_ONCE_PER_CATEGORY = {
    "millimetres": (
        f"the median distance from the camera is above {LARGEST_DEPTH_METRES:g} in {{count}} scan(s), first in this "
        "one: coordinates look like millimetres",
        "divide them by 1000: metres are expected, and all radii of the methods are in metres",
    ),
    "few points": (
        f"less than {LOW_VALID_SHARE:.0%} of the pixels have a 3D point in {{count}} scan(s), first in this one",
        "check the scanner, or leave these scans out",
    ),
    "empty border": (
        f"the border of {{count}} scan(s), first of this one, has fewer than {BORDER_POINTS} 3D points: no table will "
        "be removed",
        "expected where scans were cleaned before; otherwise give the tool the raw scans",
    ),
}


def check_dataset(
    root: Path,
    categories: Sequence[str] | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> CheckReport:
    """Read every file of a dataset and report everything that is wrong or suspicious.

    categories: which to look at (None: all). workers: threads. progress: called with (scans done, scans in all).

    Raises DataError where `root` is no dataset folder, UsageError for a category that does not exist, ValueError for
    fewer than one worker.
    """
    if workers < 1:
        raise ValueError(f"workers: should be at least 1, got {workers}")
    dataset = open_dataset(root)
    known = dataset.categories()
    for name in categories or ():
        if name not in known:
            raise unknown_name("category", name, known, "--category")
    chosen = [name for name in known if not categories or name in categories]
    listings = {name: dataset.list_samples(name) for name in chosen}
    total = sum(len(listing.refs) for listing in listings.values())
    findings: list[Finding] = []
    done = 0
    with ThreadPoolExecutor(workers) as pool:
        for name, listing in listings.items():
            findings.extend(listing.findings)
            findings.extend(_about_counts(dataset, name, listing.refs))
            facts = []
            for scan in pool.map(lambda ref: _examine(dataset, ref), listing.refs):
                facts.append(scan)
                done += 1
                if progress is not None:
                    progress(done, total)
            findings.extend(finding for scan in facts for finding in scan.findings)
            findings.extend(_once_per_category(name, facts))
            findings.extend(_leaks(name, facts))
    counts = {name: _count(listing.refs) for name, listing in listings.items()}
    return CheckReport(dataset.root, dataset.layout, counts, tuple(findings))


def _count(refs: Sequence[SampleRef]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for ref in refs:
        of_split = counts.setdefault(ref.split, {})
        of_split[ref.defect] = of_split.get(ref.defect, 0) + 1
    return counts


def _about_counts(dataset: Dataset, category: str, refs: Sequence[SampleRef]) -> Iterator[Finding]:
    """What is wrong with the numbers of samples."""

    def finding(level: Literal["error", "warning"], message: str, advice: str) -> Finding:
        # what to add is told in the terms of the layout of MVTec 3D-AD
        advice = advice if dataset.layout == "mvtec3d" else f"add scans in the layout {dataset.layout}"
        return Finding(level, category, str(dataset.root / category), message, advice)

    train = sum(ref.split == "train" for ref in refs)
    test_good = sum(ref.split == "test" and ref.defect == GOOD for ref in refs)
    test_defective = sum(ref.split == "test" and ref.defect != GOOD for ref in refs)
    if not train:
        yield finding("error", "there is no training sample in train/good", "add train/good/rgb and train/good/xyz")
    elif train < FEW_TRAINING_SAMPLES:
        yield finding("warning", f"there are only {train} training samples", "methods are published with 200 and more")
    if not test_good + test_defective:
        yield finding("error", "there is no test sample in test", "add test/good and test/<defect>")
    elif not test_defective:
        advice = "add test/<defect> with rgb, xyz and gt; metrics will be null"
        yield finding("warning", "there is no defective test sample", advice)
    elif not test_good:
        yield finding("warning", "there is no good test sample", "add test/good; image metrics will be null")


def _examine(dataset: Dataset, ref: SampleRef) -> _ScanFacts:
    examination = dataset.examine(ref)
    digests = _digests(ref)
    if examination.sample is None:
        return _ScanFacts(ref, examination.findings, (), digests)
    sample = examination.sample
    findings = (*examination.findings, *_about_mask(ref, sample))
    return _ScanFacts(ref, findings, tuple(_about_cloud(sample)), digests)


def _digests(ref: SampleRef) -> dict[str, str]:
    """Content digest of cloud and image; files that cannot be read are reported elsewhere.

    Not of small files that are alike in many scans, nor of files that hold several samples.
    """
    digests = {}
    for role, path in raw_files(ref):
        if role not in _CONTENT_ROLES or ref.part:
            continue
        try:
            digests[role] = hashlib.blake2b(path.read_bytes(), digest_size=_HASH_BYTES).hexdigest()
        except OSError:
            continue
    return digests


def _about_mask(ref: SampleRef, sample: Sample) -> Iterator[Finding]:
    """What is suspicious about the ground truth of a defective sample."""
    from mmad_cli.preprocessing.resize import NETWORK_SIZE, resize_mask, valid_pixels

    if ref.defect == GOOD or "gt" not in ref.files:
        return
    path = str(ref.files["gt"])
    marked = int(sample.mask.sum())
    if marked == 0:
        advice = "mark the defect, or move the sample to test/good; it counts as defective without a region"
        yield Finding("warning", ref.category, path, f"marks no pixel, but the sample lies in {ref.defect}/", advice)
        return
    if not resize_mask(sample.mask, NETWORK_SIZE).any():
        message = f"marks {marked} pixels, but none is left at {NETWORK_SIZE} x {NETWORK_SIZE}: the mask vanishes"
        yield Finding("warning", ref.category, path, message, "mark the whole defect; evaluate with --full-resolution")
    without = float((sample.mask & ~valid_pixels(sample.xyz)).sum()) / marked
    if without > HIGH_SHARE_WITHOUT_POINT:
        message = f"{without:.0%} of the {marked} marked pixels have no 3D point"
        yield Finding("warning", ref.category, path, message, "methods that use 3D only can hardly find this defect")


def _about_cloud(sample: Sample) -> Iterator[str]:
    """Keys of `_ONCE_PER_CATEGORY` that hold for a scan."""
    from mmad_cli.preprocessing.resize import valid_pixels

    valid = valid_pixels(sample.xyz)
    if np.median(np.abs(sample.xyz[..., 2][valid])) > LARGEST_DEPTH_METRES:
        yield "millimetres"
    if valid.mean() < LOW_VALID_SHARE:
        yield "few points"
    if sample.background is None and valid[_border(valid.shape)].sum() < BORDER_POINTS:
        yield "empty border"


def _border(shape: tuple[int, ...]) -> BoolArray:
    border = np.ones(shape, dtype=bool)
    border[BORDER_PIXELS:-BORDER_PIXELS, BORDER_PIXELS:-BORDER_PIXELS] = False
    return border


def _once_per_category(category: str, facts: Sequence[_ScanFacts]) -> Iterator[Finding]:
    for kind, (message, advice) in _ONCE_PER_CATEGORY.items():
        concerned = [scan.ref for scan in facts if kind in scan.kinds]
        if concerned:
            files = concerned[0].files
            path = str(files["xyz"] if "xyz" in files else files["depth"])
            yield Finding("warning", category, path, message.format(count=len(concerned)), advice)


def _leaks(category: str, facts: Sequence[_ScanFacts]) -> Iterator[Finding]:
    """Files with the same content in two splits: what is tested must not have been learned."""
    owners: dict[tuple[str, str], list[SampleRef]] = defaultdict(list)
    for scan in facts:
        for role, digest in scan.digests.items():
            owners[role, digest].append(scan.ref)
    for (role, _), refs in owners.items():
        if len({ref.split for ref in refs}) < 2:
            continue
        later = max(refs, key=lambda ref: (SPLITS.index(ref.split), ref.id))
        others = ", ".join(ref.id for ref in refs if ref.id != later.id)
        yield Finding(
            "warning",
            category,
            str(later.files[role]),
            f"has the same content as the {role} of {others}",
            "a scan that was trained on must not be tested on; remove one of them",
        )

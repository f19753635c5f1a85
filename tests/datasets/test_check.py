import json
import shutil

import numpy as np
import pytest
import tifffile
from PIL import Image

from mmad_cli.datasets.check import check_dataset
from mmad_cli.errors import DataError, UsageError

SIZE = (64, 64)


def write_cloud(path, seed=0, scale=1.0, valid=0.7):
    rng = np.random.default_rng(seed)
    xyz = rng.uniform(0.1, 0.6, (*SIZE, 3)).astype(np.float32) * np.float32(scale)
    xyz[rng.random(SIZE) > valid] = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, xyz, photometric="rgb", metadata=None)


def write_image(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def write_mask(path, marked=slice(20, 30)):
    mask = np.zeros(SIZE, np.uint8)
    mask[marked, marked] = 255
    write_image(path, mask)


def write_scan(folder, stem, seed, defective=False, **options):
    write_cloud(folder / "xyz" / f"{stem}.tiff", seed, **options)
    rgb = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    write_image(folder / "rgb" / f"{stem}.png", rgb)
    if defective:
        write_mask(folder / "gt" / f"{stem}.png")


@pytest.fixture
def root(tmp_path):
    """One category without anything to complain about."""
    data = tmp_path / "data"
    for index in range(12):
        write_scan(data / "nut" / "train" / "good", f"{index:03d}", index)
    for index in range(2):
        write_scan(data / "nut" / "test" / "good", f"{index:03d}", 20 + index)
        write_scan(data / "nut" / "test" / "dent", f"{index:03d}", 30 + index, defective=True)
    return data


def only(report):
    assert len(report.findings) == 1, [str(finding) for finding in report.findings]
    return report.findings[0]


def test_a_good_dataset(root):
    report = check_dataset(root)
    assert report.findings == ()
    assert report.usable
    assert report.layout == "mvtec3d"
    assert report.root == root
    assert report.counts == {"nut": {"train": {"good": 12}, "test": {"dent": 2, "good": 2}}}


def test_report_as_json(root):
    (root / "nut" / "test" / "dent" / "gt" / "000.png").unlink()
    report = json.loads(json.dumps(check_dataset(root).as_dict()))
    assert set(report) == {"root", "layout", "usable", "counts", "findings"}
    assert report["usable"] is False
    assert set(report["findings"][0]) == {"level", "category", "file", "message", "advice"}


def test_nothing_stops_at_the_first_problem(root):
    folder = root / "nut" / "test" / "dent"
    (folder / "gt" / "000.png").unlink()
    (folder / "xyz" / "001.tiff").write_bytes(b"II*\0")
    (folder / "rgb" / "001.png").write_bytes(b"x")
    write_image(root / "nut" / "test" / "good" / "rgb" / "000.png", np.zeros((10, 10), np.uint8))
    xyz = np.full((*SIZE, 3), np.nan, np.float32)
    tifffile.imwrite(root / "nut" / "train" / "good" / "xyz" / "003.tiff", xyz, photometric="rgb", metadata=None)
    report = check_dataset(root)
    errors = {finding.file: finding.message for finding in report.findings if finding.level == "error"}
    assert set(errors) == {
        str(folder),
        str(folder / "xyz" / "001.tiff"),
        str(folder / "rgb" / "001.png"),
        str(root / "nut" / "test" / "good" / "rgb" / "000.png"),
        str(root / "nut" / "train" / "good" / "xyz" / "003.tiff"),
    }
    assert not report.usable
    assert all(finding.advice for finding in report.findings)


def test_workers_and_progress(root):
    (root / "nut" / "test" / "dent" / "gt" / "000.png").unlink()
    calls = []
    one = check_dataset(root, workers=1, progress=lambda done, total: calls.append((done, total)))
    assert check_dataset(root, workers=4) == one
    assert calls == [(done, 15) for done in range(1, 16)]
    with pytest.raises(ValueError, match="workers: should be at least 1"):
        check_dataset(root, workers=0)


def test_chosen_categories(root):
    shutil.copytree(root / "nut", root / "bolt")
    assert list(check_dataset(root).counts) == ["bolt", "nut"]
    assert list(check_dataset(root, ["bolt"]).counts) == ["bolt"]
    with pytest.raises(UsageError, match="did you mean 'bolt'"):
        check_dataset(root, ["bolts"])


def test_no_dataset(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        check_dataset(tmp_path / "absent")


@pytest.mark.parametrize(("split", "words"), [("train", "no training sample"), ("test", "no test sample")])
def test_missing_split(root, split, words):
    shutil.rmtree(root / "nut" / split)
    finding = only(check_dataset(root))
    assert finding.level == "error"
    assert words in finding.message


@pytest.mark.parametrize(
    ("remove", "words"),
    [("test/dent", "no defective test sample"), ("test/good", "no good test sample")],
)
def test_one_sided_test_split(root, remove, words):
    shutil.rmtree(root / "nut" / remove)
    report = check_dataset(root)
    assert report.usable
    assert words in only(report).message
    assert "null" in only(report).advice


def test_few_training_samples(root):
    for path in (root / "nut" / "train" / "good").glob("*/00[5-9].*"):
        path.unlink()
    report = check_dataset(root)
    assert report.usable
    assert "only 7 training samples" in only(report).message


def test_empty_ground_truth(root):
    write_mask(root / "nut" / "test" / "dent" / "gt" / "000.png", slice(0, 0))
    report = check_dataset(root)
    assert report.usable
    assert "marks no pixel, but the sample lies in dent/" in only(report).message


def test_mask_that_vanishes_when_resized(root):
    size = (448, 448)
    folder = root / "nut" / "test" / "dent"
    xyz = np.random.default_rng(0).uniform(0.1, 0.6, (*size, 3)).astype(np.float32)
    tifffile.imwrite(folder / "xyz" / "000.tiff", xyz, photometric="rgb", metadata=None)
    write_image(folder / "rgb" / "000.png", np.zeros(size, np.uint8))
    mask = np.zeros(size, np.uint8)
    mask[::2] = 255  # every second row, never the one that is looked at
    write_image(folder / "gt" / "000.png", mask)
    report = check_dataset(root)
    assert report.usable
    assert "none is left at 224 x 224: the mask vanishes" in only(report).message


def test_defect_without_points(root):
    folder = root / "nut" / "test" / "dent"
    with tifffile.TiffFile(folder / "xyz" / "000.tiff") as file:
        xyz = file.asarray()
    xyz[20:30, 20:28] = 0
    tifffile.imwrite(folder / "xyz" / "000.tiff", xyz, photometric="rgb", metadata=None)
    report = check_dataset(root)
    assert report.usable
    assert "% of the 100 marked pixels have no 3D point" in only(report).message


def test_marked_good_sample(root):
    write_mask(root / "nut" / "test" / "good" / "gt" / "000.png")
    report = check_dataset(root)
    assert report.usable
    assert "marks 100 pixels of a good sample" in only(report).message


def test_damaged_ground_truth_of_a_good_sample(root):
    path = root / "nut" / "test" / "good" / "gt" / "000.png"
    path.parent.mkdir()
    path.write_bytes(b"x")
    assert only(check_dataset(root)).file == str(path)


def test_millimetres_are_reported_once(root):
    for index in range(3):
        write_cloud(root / "nut" / "train" / "good" / "xyz" / f"00{index}.tiff", 50 + index, scale=1000)
    report = check_dataset(root)
    assert report.usable
    finding = only(report)
    assert "in 3 scan(s), first in this one: coordinates look like millimetres" in finding.message
    assert finding.file.endswith("000.tiff")
    assert "divide them by 1000" in finding.advice


def test_few_points(root):
    write_cloud(root / "nut" / "train" / "good" / "xyz" / "004.tiff", 50, valid=0.02)
    messages = [finding.message for finding in check_dataset(root).findings]
    assert any("less than 5% of the pixels have a 3D point in 1 scan(s)" in message for message in messages)


def test_scan_that_was_cleaned_before(root):
    path = root / "nut" / "train" / "good" / "xyz" / "004.tiff"
    xyz = np.zeros((*SIZE, 3), np.float32)
    xyz[16:48, 16:48] = 0.5
    tifffile.imwrite(path, xyz, photometric="rgb", metadata=None)
    finding = only(check_dataset(root))
    assert "no table will be removed" in finding.message
    assert "cleaned before" in finding.advice


@pytest.mark.parametrize(("role", "ending"), [("xyz", "tiff"), ("rgb", "png")])
def test_leak_between_splits(root, role, ending):
    source = root / "nut" / "train" / "good" / role / f"004.{ending}"
    target = root / "nut" / "test" / "good" / role / f"001.{ending}"
    shutil.copy(source, target)
    report = check_dataset(root)
    assert report.usable
    finding = only(report)
    assert finding.file == str(target)
    assert f"same content as the {role} of train/good/004" in finding.message


def test_copies_within_a_split_are_no_leak(root):
    folder = root / "nut" / "train" / "good"
    shutil.copy(folder / "rgb" / "000.png", folder / "rgb" / "001.png")
    assert check_dataset(root).findings == ()


def test_ignored_folders_and_files_are_mentioned(root):
    (root / "nut" / "test" / "videos").mkdir()
    (root / "nut" / "test" / "dent" / "rgb" / "000.jpg").write_bytes(b"x")
    messages = sorted(finding.message for finding in check_dataset(root).findings)
    assert messages == ["holds neither rgb/ nor xyz/ and is ignored", "is ignored: only *.png files belong here"]

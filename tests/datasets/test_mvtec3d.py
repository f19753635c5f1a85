"""The reader on small datasets written by hand, good and bad ones."""

import os
import pickle
import struct

import numpy as np
import pytest
import tifffile
from PIL import Image

from mmad_cli.datasets import DATASETS, describe_datasets, open_dataset, published_train_counts
from mmad_cli.datasets.base import raw_files
from mmad_cli.errors import DataError

SIZE = (24, 32)


def cloud(seed=0, size=SIZE):
    xyz = np.random.default_rng(seed).uniform(0.1, 0.6, (*size, 3)).astype(np.float32)
    xyz[:3, :3] = 0
    return xyz


def write_scan(folder, stem, gt=None, seed=0):
    for role in ("rgb", "xyz"):
        (folder / role).mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(folder / "xyz" / f"{stem}.tiff", cloud(seed), photometric="rgb", rowsperstrip=1, metadata=None)
    rgb = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    Image.fromarray(rgb).save(folder / "rgb" / f"{stem}.png")
    if gt is not None:
        (folder / "gt").mkdir(exist_ok=True)
        mask = np.zeros(SIZE, np.uint8)
        mask[10:14, 10:14] = gt
        Image.fromarray(mask).save(folder / "gt" / f"{stem}.png")
    return rgb


@pytest.fixture
def root(tmp_path):
    """Two categories; the first has every split, hidden files and side files."""
    data = tmp_path / "data"
    nut = data / "nut"
    for seed, stem in enumerate(("000", "001", "010")):
        write_scan(nut / "train" / "good", stem, seed=seed)
    write_scan(nut / "validation" / "good", "000", seed=5)
    write_scan(nut / "test" / "good", "000", gt=0, seed=6)
    write_scan(nut / "test" / "dent", "001", gt=254, seed=7)
    write_scan(nut / "test" / "dent", "000", gt=255, seed=8)
    write_scan(nut / "test" / "cut", "000", gt=1, seed=9)
    write_scan(data / "bolt" / "train" / "good", "000", seed=10)
    write_scan(data / "bolt" / "test" / "dent", "000", gt=255, seed=11)
    (nut / "readme.txt").write_text("read")
    (nut / "calibration").mkdir()
    (data / "license.txt").write_text("free")
    (data / ".cache").mkdir()
    (nut / "train" / "good" / "rgb" / ".DS_Store").write_bytes(b"x")
    (nut / "train" / "good" / "xyz" / "._000.tiff").write_bytes(b"x")
    (nut / "test" / "dent" / "gt" / "notes.txt").write_text("x")
    return data


def first(root, id_="test/dent/000", category="nut"):
    dataset = open_dataset(root)
    return dataset, next(ref for ref in dataset.samples(category) if ref.id == id_)


def read_error(root, id_="test/dent/000"):
    dataset, ref = first(root, id_)
    with pytest.raises(DataError) as caught:
        dataset.read(ref)
    return str(caught.value)


def test_categories_and_order(root):
    dataset = open_dataset(root)
    assert dataset.name == "folder"
    assert dataset.root == root
    assert dataset.categories() == ["bolt", "nut"]
    assert [ref.id for ref in dataset.samples("nut")] == [
        "train/good/000",
        "train/good/001",
        "train/good/010",
        "validation/good/000",
        "test/cut/000",
        "test/dent/000",
        "test/dent/001",
        "test/good/000",
    ]
    assert [ref.label for ref in dataset.samples("nut")] == [0, 0, 0, 0, 1, 1, 1, 0]


def test_files_of_a_sample(root):
    _, ref = first(root)
    assert [role for role, _ in raw_files(ref)] == ["gt", "rgb", "xyz"]
    assert ref.files["xyz"] == root / "nut" / "test" / "dent" / "xyz" / "000.tiff"
    assert all(path.is_absolute() for path in ref.files.values())
    assert set(first(root, "train/good/000")[1].files) == {"rgb", "xyz"}
    assert "gt" in first(root, "test/good/000")[1].files


def test_no_validation(root):
    assert [ref.split for ref in open_dataset(root).samples("bolt")] == ["train", "test"]


def test_category_folder_alone(root):
    dataset = open_dataset(root / "nut")
    assert dataset.root == root
    assert dataset.categories() == ["nut"]
    assert len(dataset.samples("nut")) == 8
    with pytest.raises(DataError, match="there is no such category"):
        dataset.samples("bolt")


def test_dataset_goes_to_other_processes(root):
    dataset, ref = first(root)
    again = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(again.read(ref).xyz, dataset.read(ref).xyz)


def test_relative_path(root, monkeypatch):
    monkeypatch.chdir(root.parent)
    assert open_dataset("data").root == root


def test_read(root):
    dataset, ref = first(root, "test/dent/001")
    sample = dataset.read(ref)
    np.testing.assert_array_equal(sample.xyz, cloud(7))
    assert (sample.xyz.dtype, sample.rgb.dtype, sample.mask.dtype) == (np.float32, np.uint8, bool)
    with Image.open(ref.files["rgb"]) as image:
        np.testing.assert_array_equal(sample.rgb, np.asarray(image))
    # class id 254 counts like 255
    assert sample.mask[10:14, 10:14].all()
    assert sample.mask.sum() == 16
    assert (sample.category, sample.id, sample.label) == ("nut", "test/dent/001", 1)
    assert sample.xyz.flags.writeable


def test_smallest_class_id_counts(root):
    dataset, ref = first(root, "test/cut/000")
    assert dataset.read(ref).mask.sum() == 16


def test_ground_truth_of_good_samples_is_ignored(root):
    gt = root / "nut" / "test" / "good" / "gt" / "000.png"
    Image.fromarray(np.full(SIZE, 255, np.uint8)).save(gt)
    dataset, ref = first(root, "test/good/000")
    assert not dataset.read(ref).mask.any()
    examination = dataset.examine(ref)
    assert examination.sample is not None
    assert ["marks 768 pixels of a good sample" in f.message for f in examination.findings] == [True]


def test_missing_ground_truth_of_good_samples_is_fine(root):
    (root / "nut" / "test" / "good" / "gt" / "000.png").unlink()
    dataset, ref = first(root, "test/good/000")
    assert not dataset.read(ref).mask.any()


def test_endings_in_capitals(root):
    folder = root / "nut" / "test" / "dent"
    (folder / "xyz" / "000.tiff").rename(folder / "xyz" / "000.TIF")
    (folder / "rgb" / "000.png").rename(folder / "rgb" / "000.PNG")
    dataset, ref = first(root)
    assert dataset.read(ref).xyz.shape == (*SIZE, 3)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
def test_image_modes(root, mode):
    dataset, ref = first(root)
    with Image.open(ref.files["rgb"]) as image:
        converted = image.convert(mode)
    converted.save(ref.files["rgb"])
    np.testing.assert_array_equal(dataset.read(ref).rgb, np.asarray(converted.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "1", "P"])
def test_ground_truth_modes(root, mode):
    dataset, ref = first(root)
    with Image.open(ref.files["gt"]) as image:
        converted = image.convert(mode)
    converted.save(ref.files["gt"])
    assert dataset.read(ref).mask.sum() == 16


def test_dark_colour_in_ground_truth_counts(root):
    dataset, ref = first(root)
    mask = np.zeros((*SIZE, 3), np.uint8)
    mask[2, 3, 2] = 1  # turned to grey this would be 0
    Image.fromarray(mask).save(ref.files["gt"])
    assert np.argwhere(dataset.read(ref).mask).tolist() == [[2, 3]]


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_other_kinds_of_tiff(root, byteorder, compression):
    dataset, ref = first(root)
    tifffile.imwrite(
        ref.files["xyz"], cloud(3), photometric="rgb", byteorder=byteorder, compression=compression, metadata=None
    )
    sample = dataset.read(ref)
    np.testing.assert_array_equal(sample.xyz, cloud(3))
    assert sample.xyz.dtype == np.dtype("=f4")


def test_second_page_is_not_read(root):
    dataset, ref = first(root)
    with tifffile.TiffWriter(ref.files["xyz"]) as file:
        file.write(cloud(3), photometric="rgb", metadata=None)
        file.write(np.zeros(SIZE, np.uint8), metadata=None)
    np.testing.assert_array_equal(dataset.read(ref).xyz, cloud(3))


# --- folders that are no dataset


def test_no_such_folder(tmp_path):
    with pytest.raises(DataError, match="absent: no such folder"):
        open_dataset(tmp_path / "absent")


def test_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("x")
    with pytest.raises(DataError, match="is a file, a dataset is a folder"):
        open_dataset(path)


def test_empty_folder(tmp_path):
    with pytest.raises(DataError, match=r"the folder is empty; looked for <root>/<category>"):
        open_dataset(tmp_path)


def test_unknown_layout(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=r"no dataset found here; looked for .*xyz/\*.tiff") as caught:
        open_dataset(tmp_path)
    assert caught.value.exit_code == 2


def test_folder_above_and_below_is_named(root):
    with pytest.raises(DataError, match=f"There is one in {root}"):
        open_dataset(root.parent)
    with pytest.raises(DataError, match=f"There is one in {root / 'nut'}"):
        open_dataset(root / "nut" / "test" / "dent")


def test_2d_dataset_is_recognised(tmp_path):
    folder = tmp_path / "bottle" / "train" / "good"
    folder.mkdir(parents=True)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / "000.png")
    with pytest.raises(DataError, match="looks like MVTec AD"):
        open_dataset(tmp_path)


def test_unknown_category(root):
    with pytest.raises(DataError, match="there is no such category; known: bolt, nut"):
        open_dataset(root).samples("screw")


# --- files that do not pair


@pytest.mark.parametrize(
    ("role", "name", "words"),
    [
        ("rgb", "000.png", "rgb/000.png is missing, xyz/000.tiff, gt/000.png is there"),
        ("xyz", "000.tiff", "xyz/000.tiff is missing, rgb/000.png, gt/000.png is there"),
        ("gt", "000.png", "gt/000.png is missing, rgb/000.png, xyz/000.tiff is there"),
    ],
)
def test_missing_file(root, role, name, words):
    folder = root / "nut" / "test" / "dent"
    (folder / role / name).unlink()
    with pytest.raises(DataError) as caught:
        open_dataset(root).samples("nut")
    assert words in str(caught.value)
    assert str(folder) in str(caught.value)


def test_stray_ground_truth(root):
    gt = root / "nut" / "test" / "good" / "gt"
    (gt / "007.png").write_bytes((gt / "000.png").read_bytes())
    with pytest.raises(DataError, match=r"rgb/007.png, xyz/007.tiff is missing, gt/007.png is there"):
        open_dataset(root).samples("nut")


def test_pairs_by_name_not_by_position(root):
    folder = root / "nut" / "train" / "good"
    (folder / "rgb" / "000.png").rename(folder / "rgb" / "999.png")
    with pytest.raises(DataError) as caught:
        open_dataset(root).samples("nut")
    assert "rgb/000.png is missing" in str(caught.value)
    assert "xyz/999.tiff is missing" in str(caught.value)


def test_two_files_for_one_sample(root):
    folder = root / "nut" / "test" / "dent" / "xyz"
    (folder / "000.tif").write_bytes((folder / "000.tiff").read_bytes())
    with pytest.raises(DataError, match=r"2 files for one sample '000': 000.tif, 000.tiff"):
        open_dataset(root).samples("nut")


def test_many_errors_are_cut_short(root):
    for path in (root / "nut" / "train" / "good" / "rgb").glob("*.png"):
        for copy in range(5):
            (path.parent / f"x{copy}{path.name}").write_bytes(path.read_bytes())
    with pytest.raises(DataError, match="and 7 more; `mmad check` lists all"):
        open_dataset(root).samples("nut")


def test_defective_training_samples_are_not_used(root):
    write_scan(root / "nut" / "train" / "dent", "000")
    dataset = open_dataset(root)
    assert {ref.defect for ref in dataset.samples("nut") if ref.split == "train"} == {"good"}
    messages = [finding.message for finding in dataset.list_samples("nut").findings]
    assert messages == ["is ignored: of train only good/ is used"]


# --- files that cannot be used: each error names the file, what was found, and what to do


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (cloud()[..., 2], "has the shape (24, 32); expected are three float32 channels (H, W, 3)"),
        (cloud().astype(np.float64), "holds float64 values"),
        (np.ones((*SIZE, 3), np.int32), "holds int32 values"),
        (np.ones((*SIZE, 3), np.uint16), "holds uint16 values"),
        (cloud().astype(np.float16), "holds float16 values"),
        (np.ones((*SIZE, 4), np.float32), "has the shape (24, 32, 4)"),
        (np.zeros((*SIZE, 3), np.float32), "has no valid point"),
    ],
)
def test_wrong_cloud(root, array, words):
    path = root / "nut" / "test" / "dent" / "xyz" / "000.tiff"
    tifffile.imwrite(path, array, photometric="minisblack", metadata=None, planarconfig="contig")
    message = read_error(root)
    assert words in message
    assert message.startswith(str(path))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_cloud_that_is_not_finite(root, value):
    xyz = cloud()
    xyz[4, 5:8] = value
    xyz[9, 9, 1] = value
    tifffile.imwrite(root / "nut" / "test" / "dent" / "xyz" / "000.tiff", xyz, photometric="rgb", metadata=None)
    assert "4 pixels have NaN or infinite coordinates; mark missing points as (0, 0, 0)" in read_error(root)


def test_large_finite_coordinates_are_no_infinity(root):
    dataset, ref = first(root)
    xyz = cloud()
    xyz[5] = 3e38
    tifffile.imwrite(ref.files["xyz"], xyz, photometric="rgb", metadata=None)
    np.testing.assert_array_equal(dataset.read(ref).xyz, xyz)


@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.95])
def test_truncated_cloud(root, keep):
    path = root / "nut" / "test" / "dent" / "xyz" / "000.tiff"
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    message = read_error(root)
    assert message.startswith(str(path))
    assert "cannot be read as TIFF" in message or "is cut off" in message


def test_truncated_cloud_with_directory_first(root):
    # points last in the file: a lenient reader fills up what is missing
    path = root / "nut" / "test" / "dent" / "xyz" / "000.tiff"
    data = path.read_bytes()
    path.write_bytes(data[:-200])
    assert struct.unpack("<H", data[:2])[0] == 0x4949
    assert "is cut off" in read_error(root)


def test_cloud_that_is_no_tiff(root):
    path = root / "nut" / "test" / "dent" / "xyz" / "000.tiff"
    path.write_text("version https://git-lfs.github.com/spec/v1")
    assert "cannot be read as TIFF" in read_error(root)


@pytest.mark.parametrize("role", ["rgb", "gt"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: b"", "is not a PNG file"),
        (lambda data: b"GIF89a" + data, "is not a PNG file"),
        (lambda data: data[:20], "cannot be read as PNG"),
        (lambda data: data[: len(data) // 2], "cannot be read as PNG"),
        (lambda data: data[:45] + bytes(20) + data[65:], "cannot be read as PNG"),
    ],
)
def test_damaged_image(root, role, damage, words):
    path = root / "nut" / "test" / "dent" / role / "000.png"
    path.write_bytes(damage(path.read_bytes()))
    message = read_error(root)
    assert message.startswith(str(path))
    assert words in message


def test_16_bit_images(root):
    path = root / "nut" / "test" / "dent" / "rgb" / "000.png"
    Image.fromarray(np.full(SIZE, 4000, np.uint16)).save(path)
    assert "has 16 bits per channel; save it as 8-bit PNG" in read_error(root)


@pytest.mark.parametrize(("role", "kind"), [("rgb", "image"), ("gt", "ground truth")])
def test_sizes_differ(root, role, kind):
    path = root / "nut" / "test" / "dent" / role / "000.png"
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(path)
    assert f"{path}: {kind} is 20 x 30 pixels, the cloud beside it 24 x 32" in read_error(root)


@pytest.mark.parametrize("name", ["xyz/000.tiff", "rgb/000.png", "gt/000.png"])
def test_file_that_vanished(root, name):
    dataset, ref = first(root)
    path = root / "nut" / "test" / "dent" / name
    path.unlink()
    with pytest.raises(DataError, match="cannot be read") as caught:
        dataset.read(ref)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["xyz/000.tiff", "rgb/000.png", "gt/000.png"])
def test_no_permission(root, name, monkeypatch):
    path = root / "nut" / "test" / "dent" / name
    if os.geteuid() == 0:
        _refuse(monkeypatch, path)  # the administrator may read everything
    else:
        path.chmod(0)
    message = read_error(root)
    assert message.startswith(f"{path}: cannot be opened (Permission denied)")
    assert "give read permission" in message


def _refuse(monkeypatch, path):
    import io
    import pathlib

    def refuse(original, file, *args, **kwargs):
        if str(file) == str(path):
            raise PermissionError(13, "Permission denied", str(file))
        return original(file, *args, **kwargs)

    original_io, original_path = io.open, pathlib.Path.open
    monkeypatch.setattr("builtins.open", lambda file, *a, **k: refuse(original_io, file, *a, **k))
    monkeypatch.setattr(pathlib.Path, "open", lambda self, *a, **k: refuse(original_path, self, *a, **k))


def test_every_wrong_file_of_a_scan_is_named(root):
    folder = root / "nut" / "test" / "dent"
    for name in ("rgb/000.png", "xyz/000.tiff", "gt/000.png"):
        (folder / name).write_bytes(b"x")
    message = read_error(root)
    assert message.count("\n") == 2
    for name in ("rgb/000.png", "xyz/000.tiff", "gt/000.png"):
        assert str(folder / name) in message


def test_reading_changes_nothing(root):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    dataset = open_dataset(root)
    for category in dataset.categories():
        for ref in dataset.samples(category):
            dataset.read(ref)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


# --- what is known about datasets


def test_registry():
    assert {"mvtec3d", "synthetic"} <= set(DATASETS)
    assert sum(published_train_counts("mvtec3d").values()) == 2656
    assert published_train_counts("synthetic") == {}
    published_train_counts("mvtec3d").clear()
    assert published_train_counts("mvtec3d")
    rows = describe_datasets()
    assert [row["name"] for row in rows] == list(DATASETS)
    assert "cable_gland" in next(row for row in rows if row["name"] == "mvtec3d")["categories"]


def test_synthetic_data_has_its_own_name(root):
    (root / "synthetic.json").write_text("{}")
    assert open_dataset(root).name == "synthetic"
    assert open_dataset(root / "nut").name == "synthetic"

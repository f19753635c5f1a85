"""The reader of Eyecandies on small samples written by hand, good and bad ones, and what the stages make of them."""

import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

import mmad_cli
from mmad_cli.datasets import describe_datasets, open_dataset, published_train_counts
from mmad_cli.datasets.check import check_dataset
from mmad_cli.datasets.eyecandies import CATEGORIES, EyecandiesDataset, read_depth_bounds, read_pose
from mmad_cli.datasets.scan import Unusable
from mmad_cli.errors import DataError, UsageError
from mmad_cli.preprocessing import PreprocessConfig, preprocess, valid_pixels

FOCAL = 711.11


def data_of(root, split="test_public", category="CandyCane"):
    return root / category / split / "data"


def find(dataset, id_, category="CandyCane"):
    return next(ref for ref in dataset.samples(category) if ref.id == id_)


def errors(report):
    return [finding for finding in report.findings if finding.level == "error"]


# --- what is found


def test_layout(candies):
    dataset = open_dataset(candies)
    assert isinstance(dataset, EyecandiesDataset)
    assert (dataset.name, dataset.layout) == ("eyecandies", "eyecandies")
    assert dataset.categories() == ["CandyCane", "Lollipop"]
    assert dataset.modalities == ("rgb", "3d")
    assert pickle.loads(pickle.dumps(dataset)) == dataset


def test_samples(candies):
    refs = open_dataset(candies).samples("CandyCane")
    assert [ref.id for ref in refs] == [
        "train/good/000",
        "train/good/001",
        "train/good/002",
        "validation/good/00",
        "test/bad/01",
        "test/bad/02",
        "test/good/00",
        "test/good/03",
    ]
    assert [ref.label for ref in refs] == [0, 0, 0, 0, 1, 1, 0, 0]
    assert {role: path.name for role, path in refs[0].files.items()} == {
        "rgb": "000_image_4.png",
        "depth": "000_depth.png",
        "info": "000_info_depth.yaml",
        "pose": "000_pose.txt",
        "gt": "000_mask.png",
    }


def test_one_category_folder(candies):
    dataset = open_dataset(candies / "Lollipop")
    assert dataset.root == candies
    assert dataset.categories() == ["Lollipop"]
    assert len(dataset.samples("Lollipop")) == 8
    with pytest.raises(DataError, match="no such category; known: Lollipop"):
        dataset.samples("CandyCane")


def test_own_data_in_the_layout(candies, tmp_path):
    shutil.copytree(candies / "CandyCane", tmp_path / "own" / "washer")
    assert open_dataset(tmp_path / "own").name == "folder"


def test_published_dataset_is_known():
    assert published_train_counts("eyecandies") == dict.fromkeys(CATEGORIES, 1000)
    listed = {row["name"]: row["categories"] for row in describe_datasets()}
    assert listed["eyecandies"] == sorted(CATEGORIES)


def test_labels_follow_the_masks(candies):
    dataset = open_dataset(candies)
    assert [ref.stem for ref in dataset.samples("CandyCane") if ref.label] == ["01", "02"]
    shutil.copy(data_of(candies) / "01_mask.png", data_of(candies) / "00_mask.png")
    assert [ref.stem for ref in dataset.samples("CandyCane") if ref.label] == ["00", "01", "02"]


# --- what is read


def test_cloud_is_that_of_a_pinhole_camera(candies):
    dataset = open_dataset(candies)
    ref = find(dataset, "test/bad/01")
    sample = dataset.read(ref)
    codes = np.asarray(Image.open(ref.files["depth"])).astype(np.float64)
    depth = codes / 65535 * (2.5 - 1.5) + 1.5
    row, column = np.mgrid[: depth.shape[0], : depth.shape[1]]
    x, y = (column - 32) / FOCAL * depth, (row - 32) / FOCAL * depth
    expected = np.stack([0.1 * x, -0.1 * depth, 0.1 * y], axis=-1)
    assert sample.xyz.dtype == np.float32
    np.testing.assert_allclose(sample.xyz, expected, atol=1e-7)
    # 2 cm above the belt and more is the candy
    candy = depth < depth[-1, 32] - 0.02
    assert (sample.background == candy).mean() < 0.01
    assert sample.mask.sum() > 20
    assert not sample.mask[sample.background].any()


@pytest.mark.parametrize(("protocol", "kept"), [("none", False), ("m3dm", True), ("cfm", True)])
def test_protocols(candies, protocol, kept):
    dataset = open_dataset(candies)
    raw = dataset.read(find(dataset, "test/bad/01"))
    clean = preprocess(raw, PreprocessConfig(protocol=protocol))
    np.testing.assert_array_equal(clean.rgb, raw.rgb)
    np.testing.assert_array_equal(clean.mask, raw.mask)
    np.testing.assert_array_equal(clean.xyz[~raw.background], raw.xyz[~raw.background])
    assert clean.xyz is not raw.xyz
    assert clean.background is None
    if not kept:
        np.testing.assert_array_equal(clean.xyz, raw.xyz)
        return
    assert (clean.xyz[raw.background] == np.float32(raw.info["background_value"])).all()
    assert not valid_pixels(clean.xyz)[raw.background].any()
    # the middle column and row lie on an axis: a coordinate of 0, as published
    assert valid_pixels(clean.xyz).sum() > 0.9 * (~raw.background).sum()
    assert clean.info["removed_background_pixels"] == raw.background.sum()
    assert clean.info["plane"] is None


def test_light(candies):
    files = data_of(candies) / "00_image_4.png", data_of(candies) / "00_image_0.png"
    for light, file in zip((4, 0), files, strict=True):
        dataset = EyecandiesDataset(candies, light=light)
        sample = dataset.read(find(dataset, "test/good/00"))
        np.testing.assert_array_equal(sample.rgb, np.asarray(Image.open(file)))
    assert EyecandiesDataset(candies).departures() == []
    assert "image 0 instead of the published image 4" in EyecandiesDataset(candies, light=0).departures()[0]
    with pytest.raises(UsageError, match="light 6"):
        EyecandiesDataset(candies, light=6)


def test_mask_of_a_training_sample_is_not_used(candies):
    shutil.copy(data_of(candies) / "01_mask.png", data_of(candies, "train") / "000_mask.png")
    dataset = open_dataset(candies)
    ref = find(dataset, "train/good/000")
    assert not dataset.read(ref).mask.any()
    assert "of a good sample" in dataset.examine(ref).findings[0].message


def test_flow_style_yaml_is_read(tmp_path):
    path = tmp_path / "info.yaml"
    path.write_text("{normalization: {max: 2.5e+00, min: 1}}")
    assert read_depth_bounds(path) == (1.0, 2.5)


# --- what is wrong


def damage_png(path):
    path.write_bytes(path.read_bytes()[:100])


def eight_bits(path):
    Image.fromarray(np.full((64, 64), 100, np.uint8)).save(path)


def smaller(path):
    Image.fromarray(np.zeros((10, 10, 3), np.uint8)).save(path)


DAMAGE = [
    ("01_depth.png", damage_png, "cannot be read as PNG"),
    ("01_depth.png", eight_bits, "has 8 bits per channel"),
    ("01_depth.png", lambda path: path.write_bytes(b"x"), "is not a PNG file"),
    ("01_info_depth.yaml", lambda path: path.write_text("normalization:\n  max: 2\n"), "has no number for min"),
    ("01_info_depth.yaml", lambda path: path.write_text("min: 3\nmax: 2\n"), "has the depths min 3 and max 2"),
    ("01_info_depth.yaml", lambda path: path.write_text("min: 0\nmax: 2\n"), "has the depths min 0"),
    ("01_pose.txt", lambda path: path.write_text("1 0 0 0\n0 1 0 0\n"), "has 2 lines"),
    ("01_pose.txt", lambda path: path.write_text("a 0 0 0\n" * 4), "something else than numbers"),
    ("01_pose.txt", lambda path: path.write_text("0 0 0 0\n" * 4), "the matrix has no inverse"),
    ("01_pose.txt", lambda path: path.write_bytes(b"\xff\xfe\x00"), "cannot be read as text"),
    ("01_image_4.png", smaller, "image is 10 x 10 pixels, the cloud beside it 64 x 64"),
]


@pytest.mark.parametrize(("name", "damage", "words"), DAMAGE)
def test_damaged_files(candies, name, damage, words):
    path = data_of(candies) / name
    damage(path)
    found = errors(check_dataset(candies))
    assert [finding.file for finding in found] == [str(path)]
    assert words in found[0].message
    assert found[0].advice
    dataset = open_dataset(candies)
    with pytest.raises(DataError, match=name):
        dataset.read(find(dataset, "test/bad/01"))


def test_missing_files(candies):
    for name in ("00_info_depth.yaml", "01_image_4.png", "02_mask.png"):
        (data_of(candies) / name).unlink()
    (data_of(candies, "train") / "001_pose.txt").unlink()
    found = errors(check_dataset(candies, ["CandyCane"]))
    messages = [finding.message for finding in found]
    assert [message.split(" is missing")[0] for message in messages] == [
        "001_pose.txt",
        "00_info_depth.yaml",
        "01_image_4.png",
        "02_mask.png",
    ]
    assert "chosen by the setting light, and this sample has 0" in found[2].advice
    assert "002_" not in messages[0]
    with pytest.raises(DataError, match=r"001_pose\.txt is missing"):
        open_dataset(candies).samples("CandyCane")


def test_damaged_mask_of_a_test_sample(candies):
    path = data_of(candies) / "01_mask.png"
    path.write_bytes(b"x")
    found = errors(check_dataset(candies))
    assert [finding.file for finding in found] == [str(path)]


def test_a_good_dataset(candies):
    report = check_dataset(candies)
    assert report.usable
    assert report.layout == "eyecandies"
    assert {finding.message for finding in report.findings} == {"there are only 3 training samples"}
    assert report.counts["Lollipop"] == {"train": {"good": 3}, "validation": {"good": 1}, "test": {"bad": 2, "good": 2}}


def test_leak_between_splits(candies):
    for item in ("depth.png", "image_4.png"):
        shutil.copy(data_of(candies, "train") / f"000_{item}", data_of(candies) / f"00_{item}")
    messages = [finding.message for finding in check_dataset(candies, ["CandyCane"]).findings]
    assert sum("has the same content as the" in message for message in messages) == 2


def test_nothing_left(candies):
    dataset = open_dataset(candies)
    ref = find(dataset, "test/good/00")
    Image.fromarray(np.full((64, 64), 40000, np.uint16)).save(ref.files["depth"])
    examination = dataset.examine(ref)
    assert examination.sample is not None
    assert "every pixel is background" in examination.findings[0].message


def test_pose_reader_names_the_file(tmp_path):
    with pytest.raises(Unusable) as caught:
        read_pose(tmp_path / "absent.txt")
    assert caught.value.path == tmp_path / "absent.txt"


# --- through the stages


def test_stages_share_clean_scans_of_both_protocols(candies, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in candies.rglob("*")}
    store = tmp_path / "store"
    computed = [
        sum(
            outcome.reports["preprocess"].computed
            for outcome in mmad_cli.preprocess(candies, protocol=protocol, categories=["CandyCane"], store=store)
        )
        for protocol in ("m3dm", "cfm", "none")
    ]
    assert computed == [8, 0, 8]
    assert {path: path.stat().st_mtime_ns for path in candies.rglob("*")} == before
    dataset = open_dataset(candies)
    for clean in mmad_cli.load_preprocessed(candies, "cfm", False, categories=["CandyCane"], store=store):
        expected = preprocess(dataset.read(find(dataset, clean.id)), PreprocessConfig(protocol="cfm"))
        np.testing.assert_array_equal(clean.xyz, expected.xyz)
        np.testing.assert_array_equal(clean.mask, expected.mask)


def test_another_light_is_another_clean_scan(candies, tmp_path):
    store = tmp_path / "store"
    first = {s.id: s.rgb for s in mmad_cli.load_preprocessed(candies, resized=False, store=store)}
    (candies / "dataset.toml").write_text('layout = "eyecandies"\nlight = 0\n')
    for sample in mmad_cli.load_preprocessed(candies, resized=False, store=store, categories=["CandyCane"]):
        assert (sample.rgb != first[sample.id]).any()


def test_evaluate(candies, tmp_path):
    (candies / "dataset.toml").write_text('layout = "eyecandies"\nlight = 0\n')
    result, folder = mmad_cli.evaluate(
        candies,
        method="btf",
        variant="fpfh",
        categories=["CandyCane"],
        store=tmp_path / "store",
        out=tmp_path / "run",
        workers=1,
    )
    assert result.dataset.name == "eyecandies"
    assert result.failed_categories == []
    assert any("light: image 0" in reason for reason in result.not_comparable)
    assert any("incomplete category: CandyCane has 3" in reason for reason in result.not_comparable)
    assert (folder / "CandyCane" / "scores.csv").read_text().count("test/bad/") == 2
    assert result.categories["CandyCane"].metrics["p_auroc"] > 0.5


def test_commands(candies, tmp_path, monkeypatch, capfd):
    from mmad_cli.cli.app import run

    monkeypatch.chdir(tmp_path)
    assert run(["check", str(candies)]) == 0
    assert "layout: eyecandies" in capfd.readouterr().out
    options = ["--category", "Lollipop", "--workers", "1", "--store", str(tmp_path / "store")]
    assert run(["preprocess", str(candies), "--protocol", "cfm", *options]) == 0
    assert "8 computed" in capfd.readouterr().err
    method = ["--method", "btf", "--variant", "raw", "--protocol", "cfm", "--out", str(tmp_path / "run")]
    assert run(["evaluate", str(candies), *method, *options]) == 0
    assert (tmp_path / "run" / "Lollipop" / "scores.csv").is_file()
    eight_bits(data_of(candies, category="Lollipop") / "03_depth.png")
    assert run(["check", str(candies)]) == 3
    assert "03_depth.png: has 8 bits per channel" in capfd.readouterr().out.replace("\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cfm", "mafr", "cmdr_iad"])
def test_methods_of_the_mapping_family(candies, tmp_path, monkeypatch, capfd, method):
    """From the files of the dataset to a run, with the networks that come with the tool."""
    from mmad_cli.cli.app import run
    from mmad_cli.results.schema import RunResult

    monkeypatch.chdir(tmp_path)
    options = ["--backbones", "builtin", "--recipe", "fast", "--set", "epochs=1", "--set", "grid=16"]
    place = ["--category", "CandyCane", "--workers", "1", "--store", str(tmp_path / "store"), "--out", "run"]
    assert run(["evaluate", str(candies), "--method", method, *options, *place]) == 0
    assert "CandyCane" in capfd.readouterr().out
    result = RunResult.from_disk(tmp_path / "run")
    category = result.categories["CandyCane"]
    assert (result.dataset.name, result.preprocessing.protocol) == ("eyecandies", "cfm")
    assert (category.n_train, category.n_test) == (3, 4)
    assert category.training and all(len(curve) == 1 for curve in category.training.values())
    assert all(0 <= category.metrics[key] <= 1 for key in ("i_auroc", "p_auroc", "aupro_30_grid99"))
